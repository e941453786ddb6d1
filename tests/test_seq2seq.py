"""Sequence to sequence: the target is predicted, every token of it once, and nothing else is."""

import numpy as np
import pytest

from lm.data.rows import Rows
from lm.objectives import ModelInterface, seq2seq
from lm.tokenizers.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
TOGETHER = Rows(  # "ab" -> "x", "c" -> "yz"
    ids=np.array([[1, 2, EOS, 7, EOS, 3, EOS, 8, 9, EOS, 0, 0], [0] * 12], np.int32),
    segments=np.array([[1] * 5 + [2] * 5 + [0, 0], [0] * 12], np.int32),
    positions=np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0], [0] * 12], np.int32),
    previous=np.full((2, 12), -1, np.int32),
    fields=np.array([[0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0], [0] * 12], np.int32),
)
APART = Rows(
    ids=np.array([[1, 2, EOS, 3, EOS, 0, 7, EOS, 8, 9, EOS, 0]], np.int32),
    segments=np.array([[1, 1, 1, 2, 2, 0, 1, 1, 2, 2, 2, 0]], np.int32),
    positions=np.array([[0, 1, 2, 0, 1, 0, 0, 1, 0, 1, 2, 0]], np.int32),
    previous=np.full((1, 12), -1, np.int32),
    fields=np.array([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0]], np.int32),
)


def batch_of(rows, form, **config):
    return seq2seq.build(seq2seq.Config(**config), TOKENIZER, form)(rows, None)


def test_a_decoder_by_hand():
    batch = batch_of(TOGETHER, ModelInterface(12), bidirectional=True)
    inputs = [BOS, 1, 2, EOS, 7, BOS, 3, EOS, 8, 9, 0, 0]
    np.testing.assert_array_equal(batch.inputs.ids, [inputs, [0] * 12])
    np.testing.assert_array_equal(batch.inputs.segments, TOGETHER.segments)
    np.testing.assert_array_equal(batch.inputs.positions, TOGETHER.positions)
    np.testing.assert_array_equal(batch.targets, TOGETHER.ids)
    weights = [0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0]
    np.testing.assert_array_equal(batch.weights, [weights, [0] * 12])
    prefix = [1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(batch.inputs.bidirectional, [prefix, [0] * 12])
    assert batch.encoder is None
    assert batch_of(TOGETHER, ModelInterface(12)).inputs.bidirectional is None


def test_an_encoder_and_a_decoder_by_hand():
    batch = batch_of(APART, ModelInterface(6, encoder_length=6))
    np.testing.assert_array_equal(batch.encoder.ids, [[1, 2, EOS, 3, EOS, 0]])
    np.testing.assert_array_equal(batch.encoder.segments, [[1, 1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(batch.encoder.positions, [[0, 1, 2, 0, 1, 0]])
    np.testing.assert_array_equal(batch.inputs.ids, [[BOS, 7, BOS, 8, 9, 0]])
    np.testing.assert_array_equal(batch.inputs.segments, [[1, 1, 2, 2, 2, 0]])
    np.testing.assert_array_equal(batch.inputs.positions, [[0, 1, 0, 1, 2, 0]])
    np.testing.assert_array_equal(batch.targets, [[7, EOS, 8, 9, EOS, 0]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 1, 1, 1, 0]])
    assert batch.inputs.bidirectional is None and batch.encoder.bidirectional is None


def test_the_layout_is_one_part_for_a_decoder_and_two_for_an_encoder_with_one():
    fields = ("question", "answer")
    config = seq2seq.Config(fields=fields)
    assert seq2seq.build(config, TOKENIZER, ModelInterface(12)).layout.lengths == (12,)
    objective = seq2seq.build(config, TOKENIZER, ModelInterface(6, encoder_length=9))
    assert (objective.layout.lengths, objective.layout.fields) == ((9, 6), fields)


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        (ModelInterface(8, is_causal=False), {}, "needs a decoder"),
        (ModelInterface(8, encoder_length=8), {"bidirectional": True}, "objective.bidirectional"),
    ],
)
def test_a_model_that_cannot_do_it_is_refused(form, config, message):
    with pytest.raises(ValueError, match=message):
        seq2seq.build(seq2seq.Config(**config), TOKENIZER, form)
