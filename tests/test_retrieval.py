"""Recall and zero-shot accuracy of a whole source of pictures and texts."""

import numpy as np
import pytest

from lm.objectives import contrastive

NONE = np.zeros((0, 0), np.float32)


def words(captions, pictures, classes=None):
    hashes = np.stack([captions, pictures], 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    classes = np.full(len(hashes), -1) if classes is None else classes
    return np.concatenate([hashes.view(np.int32), np.int32(classes)[:, None]], 1)


def test_recall_is_that_of_a_plain_loop_over_distinct_captions_and_pictures():
    rng = np.random.default_rng(0)
    captions, pictures = rng.integers(0, 25, 60), rng.integers(0, 30, 60)
    vectors = [rng.normal(size=(n, 4)).astype(np.float32) for n in (30, 25)]
    embeddings = np.stack([vectors[0][pictures], vectors[1][captions]], 1)
    found = contrastive.compare(embeddings, words(captions, pictures), NONE, num_classes=0)
    belongs = {(int(p), int(c)) for p, c in zip(pictures, captions, strict=True)}
    scores = vectors[0] @ vectors[1].T
    for name, table, pairs in (
        ("picture_to_text", scores, belongs),
        ("text_to_picture", scores.T, {(c, p) for p, c in belongs}),
    ):
        queries, candidates = ({pair[i] for pair in pairs} for i in (0, 1))
        for k in (1, 5, 10):
            hits = 0
            for q in queries:
                nearest = sorted(candidates, key=lambda c: -table[q, c])[:k]
                hits += any((q, c) in pairs for c in nearest)
            assert found[f"{name}_recall_{k}"] == pytest.approx(hits / len(queries)), (name, k)
    assert 0 < found["picture_to_text_recall_1"] < found["picture_to_text_recall_10"] < 1


def test_captions_and_pictures_that_occur_twice_are_no_rivals_of_themselves():
    e = np.eye(4, dtype=np.float32)
    embeddings = np.stack([np.stack([e[i], e[j]]) for i, j in ((0, 0), (1, 0), (2, 2), (2, 3))])
    # pictures 0 and 1 have caption 0, picture 2 has captions 2 and 3
    found = contrastive.compare(embeddings, words([0, 0, 2, 3], [0, 1, 2, 2]), NONE, num_classes=0)
    assert found["picture_to_text_recall_1"] == pytest.approx(2 / 3)  # picture 1 finds nothing
    assert found["text_to_picture_recall_1"] == pytest.approx(2 / 3)  # caption 3 neither


def test_equal_embeddings_find_nothing():
    embeddings = np.ones((50, 2, 4), np.float32) / 2
    found = contrastive.compare(
        embeddings, words(np.arange(50), np.arange(50)), None, num_classes=0
    )
    assert set(found.values()) == {0.0}


def test_blocks_of_queries_give_the_same_figures(monkeypatch):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(40, 2, 3)).astype(np.float32)
    targets = words(rng.integers(0, 20, 40), np.arange(40))
    whole = contrastive.compare(embeddings, targets, NONE, num_classes=0)
    monkeypatch.setattr(contrastive, "_BLOCK", 60)
    assert contrastive.compare(embeddings, targets, NONE, num_classes=0) == whole


def test_the_class_is_that_with_the_nearest_mean_of_its_prompts():
    prompts = np.float32([[1, 0], [0.6, 0.8], [0, 1], [0, 1]])  # means (0.89, 0.45) and (0, 1)
    pictures = np.float32([[1, 0], [0.6, 0.8], [0, 1], [0, 1]])
    embeddings = np.stack([pictures, pictures], 1)
    targets = words(np.arange(4), np.arange(4), [0, 0, 1, -1])
    found = contrastive.compare(embeddings, targets, prompts, num_classes=2)
    assert found["zero_shot_pictures"] == 3
    assert found["zero_shot_accuracy"] == 1.0  # (0.6, 0.8): 0.894 against 0.8
    targets[1, 4] = 1
    found = contrastive.compare(embeddings, targets, prompts, num_classes=2)
    assert found["zero_shot_accuracy"] == pytest.approx(2 / 3)
