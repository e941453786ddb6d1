"""Denoising: what each kind of noise does to a text, by hand and in numbers."""

import numpy as np
import pytest

from lm.data.rows import Rows
from lm.objectives import ModelInterface, denoising
from lm.tokenizers.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
EOS, MASK = TOKENIZER.eos_id, 259


def generator(i):
    return np.random.default_rng([0, 0, i])


def rows_of(texts, length):
    """A row for every list of texts."""
    ids, segments, positions = np.zeros((3, len(texts), length), np.int32)
    for r, row in enumerate(texts):
        start = 0
        for number, text in enumerate(row, 1):
            tokens = [*text.encode(), EOS]
            place = slice(start, start + len(tokens))
            ids[r, place], segments[r, place] = tokens, number
            positions[r, place] = np.arange(len(tokens))
            start += len(tokens)
    return Rows(ids, segments, positions, np.full_like(ids, -1))


def noisy(texts, length, **config):
    """The batch, and the encoder's tokens by (row, segment)."""
    form = ModelInterface(length, encoder_length=length, vocab_size=264)
    objective = denoising.build(denoising.Config(**config), TOKENIZER, form)
    batch = objective(rows_of(texts, length), generator)
    found = {
        (r, s): batch.encoder.ids[r][batch.encoder.segments[r] == s].tolist()
        for r in range(len(texts))
        for s in range(1, len(texts[r]) + 1)
    }
    return batch, found


TEXTS = [["ab. cde! f", "gh"], ["Is it? No. Yes. Well.", "one two"]] * 50
TOKENS = [[*text.encode(), EOS] for text in TEXTS[0]]


@pytest.mark.parametrize("name", denoising.NOISES)
def test_targets_are_the_whole_text_and_eos_stays_last(name):
    batch, found = noisy(TEXTS, 40, noises=(name,))
    np.testing.assert_array_equal(batch.targets, rows_of(TEXTS, 40).ids)
    np.testing.assert_array_equal(batch.weights, batch.targets > 0)
    assert all(ids[-1] == EOS and EOS not in ids[:-1] for ids in found.values())
    assert any(ids[:-1] != list(TEXTS[r][s - 1].encode()) for (r, s), ids in found.items())


def test_masked_tokens_are_hidden_and_the_others_stay():
    _, found = noisy(TEXTS, 40, noises=("mask",))
    for (r, s), ids in found.items():
        text = [*TEXTS[r][s - 1].encode(), EOS]
        assert len(ids) == len(text)
        assert all(a in (b, MASK) for a, b in zip(ids, text, strict=True))


def test_deleted_tokens_are_gone_and_the_others_keep_their_order():
    _, found = noisy(TEXTS, 40, noises=("delete",))
    for (r, s), ids in found.items():
        rest = iter([*TEXTS[r][s - 1].encode(), EOS])
        assert all(token in rest for token in ids)  # a subsequence


def test_shuffled_and_rotated_texts_have_the_same_tokens():
    _, found = noisy(TEXTS, 40, noises=("shuffle",))
    sentences = {"Is it?", " No.", " Yes.", " Well."}
    orders = set()
    for (r, s), ids in found.items():
        text = bytes(ids[:-1]).decode()
        assert sorted(text) == sorted(TEXTS[r][s - 1])
        if (r % 2, s) == (1, 1):
            assert all(sentence in text for sentence in sentences)
            orders.add(text)
    assert len(orders) > 10
    _, found = noisy(TEXTS, 40, noises=("rotate",))
    for (r, s), ids in found.items():
        assert bytes(ids[:-1]).decode() in 2 * TEXTS[r][s - 1]


def test_infilled_spans_are_one_mask_each():
    _, found = noisy(TEXTS, 40, noises=("infill",))
    for (r, s), ids in found.items():
        text, at = TEXTS[r][s - 1].encode(), 0
        pieces = [[]]
        for token in ids[:-1]:
            pieces.append([]) if token == MASK else pieces[-1].append(token)
        for piece in pieces:  # what is left stands in the text, in this order
            at = text.find(bytes(piece), at)
            assert at >= 0
            at += len(piece)


def test_rates_and_lengths_are_those_of_the_config():
    """Hidden tokens within four percent of the rate; rows do not get longer."""
    texts = [["x" * 999]] * 60
    for name in ("mask", "delete", "infill"):
        batch, found = noisy(texts, 1000, noises=(name,), rate=0.3)
        kept = np.mean([sum(token == ord("x") for token in ids) for ids in found.values()])
        assert kept / 999 == pytest.approx(0.7, abs=0.04), name
        assert (batch.encoder.segments > 0).sum(1).max() <= 1000
    spans = [(np.array(ids) == MASK).sum() for ids in found.values()]
    # a Poisson process of spans: those that begin inside of another one are no masks
    assert 0.3 < np.mean(spans) * 3 / 300 < 1.2


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        (ModelInterface(16, is_causal=False), {}, "needs a decoder"),
        (ModelInterface(16, 8), {}, r"encoder_length \(8\) must be at least data\.length \(16\)"),
        (ModelInterface(16, vocab_size=264), {"noises": ("blur",)}, "blur.*mask, delete, infill"),
        (ModelInterface(16, vocab_size=264), {"rate": 1.0}, r"rate \(1.0\)"),
    ],
)
def test_what_cannot_work_is_refused(form, config, message):
    with pytest.raises(ValueError, match=message):
        denoising.build(denoising.Config(**config), TOKENIZER, form)
