"""Prefix LM: a random split of every segment, seen both ways before it and scored after it."""

import numpy as np
import pytest

from lm.data.rows import Rows
from lm.objectives import ModelInterface, prefix
from lm.tokenizers.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS = TOKENIZER.bos_id


def segments_of(lengths, count):
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    ids = np.tile(np.arange(len(segments)) % 200, (count, 1))
    tiled = (np.tile(x, (count, 1)) for x in (segments, positions))
    return Rows(
        *(x.astype(np.int32) for x in (ids, *tiled)), np.full((count, len(segments)), -1, np.int32)
    )


def build(length, **config):
    return prefix.build(prefix.Config(**config), TOKENIZER, ModelInterface(length))


class Fixed:
    """A generator that draws what it is told."""

    def __init__(self, values):
        self.values = values

    def random(self, size):
        assert size == len(self.values)
        return np.array(self.values)


def test_by_hand():
    rows = segments_of([5, 3], 1)
    batch = build(8)(rows, lambda i: Fixed([0.4, 0.0]))  # 2 of 5 tokens, 0 of 3
    np.testing.assert_array_equal(batch.inputs.ids, [[BOS, 0, 1, 2, 3, BOS, 5, 6]])
    np.testing.assert_array_equal(batch.inputs.bidirectional, [[1, 1, 1, 0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(batch.weights, [[0, 0, 1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(batch.targets, rows.ids)
    assert (
        build(8, bidirectional=False)(rows, lambda i: Fixed([0.4, 0])).inputs.bidirectional is None
    )


def test_every_split_is_as_likely_as_any_other():
    """Within five standard errors over 8,000 segments of eight tokens."""
    rows = segments_of([8] * 4, 2000)
    batch = build(32)(rows, lambda i: np.random.default_rng([0, 0, i]))
    scored = batch.weights.reshape(-1, 8).sum(1).astype(int)
    counts = np.bincount(scored, minlength=9)[1:]
    assert counts.sum() == 8000
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(8000 * (1 / 8) * (7 / 8))


def test_an_encoder_is_refused():
    with pytest.raises(ValueError, match="without an encoder"):
        prefix.build(prefix.Config(), TOKENIZER, ModelInterface(8, encoder_length=8))
