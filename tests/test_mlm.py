"""Masked LM: which tokens are predicted, what stands in their place, and how often."""

import json

import numpy as np
import pytest

from lm.data.rows import Rows
from lm.objectives import ModelInterface, mlm
from lm.tokenizers.tokenizer import ByteTokenizer, from_bytes

TOKENIZER = ByteTokenizer()
EOS, MASK = TOKENIZER.eos_id, 259
FORM = ModelInterface(100, is_causal=False, vocab_size=264)


def generator(i):
    return np.random.default_rng([0, 0, i])


@pytest.fixture(scope="module")
def rows():
    """10,000 tokens of text in documents of 20, the last 10 places of a row empty."""
    ids = np.random.default_rng(1).integers(0, 256, (112, 100)).astype(np.int32)
    ids[:, 19::20] = EOS
    segments = np.tile(np.arange(100, dtype=np.int32) // 20 + 1, (112, 1))
    segments[:, 90:] = 0
    ids *= segments > 0
    positions = np.tile(np.arange(100, dtype=np.int32) % 20, (112, 1)) * (segments > 0)
    return Rows(ids, segments, positions, np.full_like(ids, -1))


@pytest.fixture(scope="module")
def batch(rows):
    return mlm.build(mlm.Config(), TOKENIZER, FORM)(rows, generator)


def test_targets_are_the_tokens_and_only_predicted_ones_change(rows, batch):
    np.testing.assert_array_equal(batch.targets, rows.ids)
    np.testing.assert_array_equal(batch.inputs.segments, rows.segments)
    np.testing.assert_array_equal(batch.inputs.positions, rows.positions)
    kept = batch.weights == 0
    np.testing.assert_array_equal(batch.inputs.ids[kept], rows.ids[kept])


def test_special_tokens_and_padding_are_never_predicted_nor_put_in(rows, batch):
    assert not batch.weights[(rows.ids == EOS) | (rows.segments == 0)].any()
    changed = batch.inputs.ids[(batch.weights > 0) & (batch.inputs.ids != MASK)]
    assert len(changed) and changed.max() < 256


def test_frequencies_are_those_of_the_config(rows, batch):
    """Within four standard deviations of the binomial distribution."""

    def close(count, total, probability):
        deviation = np.sqrt(total * probability * (1 - probability))
        assert abs(count - total * probability) < 4 * deviation, (count, total, probability)

    text = (rows.segments > 0) & (rows.ids != EOS)
    chosen = batch.weights > 0
    close(chosen.sum(), text.sum(), 0.15)
    hidden = batch.inputs.ids == MASK
    close(hidden.sum(), chosen.sum(), 0.8)
    same = chosen & (batch.inputs.ids == rows.ids)
    close(same.sum(), chosen.sum(), 0.1 + 0.1 / 256)  # a random token may be the same
    for position in (0, 10, 18):
        close(
            chosen[rows.positions == position].sum(), text[rows.positions == position].sum(), 0.15
        )


def test_a_row_is_masked_the_same_whatever_rows_come_with_it(rows, batch):
    build = mlm.build(mlm.Config(), TOKENIZER, FORM)
    part = Rows(rows.ids[7:9], rows.segments[7:9], rows.positions[7:9], rows.previous[7:9])
    alone = build(part, lambda i: generator(i + 7))
    np.testing.assert_array_equal(alone.inputs.ids, batch.inputs.ids[7:9])
    assert (batch.weights[7] != batch.weights[8]).any()


def test_words_by_hand():
    text = "ab c_1, über 中文 x"
    ids = TOKENIZER.encode(text)[None]
    goes_on = mlm.WordContinuation(TOKENIZER)(ids)[0]
    words, data = [], text.encode()
    for i, byte in enumerate(data):
        if goes_on[i]:
            words[-1] += bytes([byte])
        else:
            words.append(bytes([byte]))
    assert [w.decode() for w in words] == [
        "ab",
        " ",
        "c_1",
        ",",
        " ",
        "über",
        " ",
        "中",
        "文",
        " ",
        "x",
    ]


def test_pieces_of_a_word_piece_model_go_on_words():
    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "[MASK]": 4}
    vocab |= {"play": 5, "##ing": 6, "chess": 7, ".": 8}
    special = [
        {"id": i, "content": name, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for name, i in list(vocab.items())[:5]
    ]
    model = {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]"}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    spec = {"version": "1.0", "added_tokens": special, "model": model}
    spec |= {"pre_tokenizer": {"type": "BertPreTokenizer"}, "normalizer": None}
    spec |= {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False}}
    tokenizer = from_bytes("tokenizer.json", json.dumps(spec).encode())
    ids = tokenizer.encode("playing chess.")
    assert ids.tolist() == [5, 6, 7, 8]
    assert mlm.WordContinuation(tokenizer)(ids[None])[0].tolist() == [False, True, False, False]
    assert mlm.mask_id(None, tokenizer, FORM) == 4
    assert mlm.mask_id(7, tokenizer, FORM) == 7


def test_whole_words_are_predicted_or_not():
    text = np.concatenate([TOKENIZER.encode("some words, several of them "), [EOS]])
    ids = np.tile(text, (300, 1)).astype(np.int32)
    ones = np.ones_like(ids)
    positions = np.tile(np.arange(len(text), dtype=np.int32), (300, 1))
    rows = Rows(ids, ones, positions, np.full_like(ids, -1))
    config = mlm.Config(whole_word=True)
    form = ModelInterface(len(text), is_causal=False, vocab_size=260)
    weights = mlm.build(config, TOKENIZER, form)(rows, generator).weights
    goes_on = mlm.WordContinuation(TOKENIZER)(ids)
    assert (weights[:, 1:] == weights[:, :-1])[goes_on[:, 1:]].all()
    assert abs(weights[:, :-1].mean() - 0.15) < 0.03


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        (ModelInterface(8), {}, "config.model.name=encoder"),
        (ModelInterface(8, encoder_length=8), {}, "config.model.name=encoder"),
        (ModelInterface(8, is_causal=False, vocab_size=259), {}, r"at least 260"),
        (
            ModelInterface(8, is_causal=False, vocab_size=264),
            {"mask_id": 264},
            r"\(264\).*below 264",
        ),
        (FORM, {"rate": 0.0}, r"rate \(0.0\)"),
        (FORM, {"random_fraction": 0.3}, r"\(0.8\) \+ random_fraction \(0.3\)"),
    ],
)
def test_what_cannot_work_is_refused(form, config, message):
    with pytest.raises(ValueError, match=message):
        mlm.build(mlm.Config(**config), TOKENIZER, form)
