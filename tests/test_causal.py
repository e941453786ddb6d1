"""The causal objective: every token of the data is predicted once, from the one before it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.rows import Rows
from lm.objectives import ModelInterface, causal
from lm.tokenizers.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def no_randomness(i):
    raise AssertionError("the causal objective needs no generator")


def causal_batch(rows):
    return causal.build(causal.Config(), TOKENIZER, ModelInterface(rows.ids.shape[1]))(
        rows, no_randomness
    )


def make_rows(ids, segments, previous):
    segments = np.array(segments, np.int32)
    positions = np.zeros_like(segments)
    for r, row in enumerate(segments):
        for t in range(1, len(row)):
            positions[r, t] = positions[r, t - 1] + 1 if row[t] == row[t - 1] != 0 else 0
    before = np.full_like(segments, -1)
    before[:, 0] = previous
    return Rows(np.array(ids, np.int32), segments, positions, before)


def test_inputs_by_hand():
    rows = make_rows(
        ids=[[11, 12, EOS, 13, 14], [15, EOS, 16, EOS, 0], [EOS, EOS, 0, 0, 0], [0, 0, 0, 0, 0]],
        segments=[[1, 1, 1, 2, 2], [1, 1, 2, 2, 0], [1, 2, 0, 0, 0], [0, 0, 0, 0, 0]],
        previous=[-1, 14, 9, -1],
    )
    batch = causal_batch(rows)
    np.testing.assert_array_equal(
        batch.inputs.ids,
        [
            [BOS, 11, 12, BOS, 13],
            [14, 15, BOS, 16, 0],
            [9, BOS, 0, 0, 0],
            [0, 0, 0, 0, 0],
        ],
    )
    np.testing.assert_array_equal(batch.targets, rows.ids)
    np.testing.assert_array_equal(
        batch.weights, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    )
    assert batch.weights.dtype == np.float32 and batch.inputs.ids.dtype == np.int32
    assert batch.encoder is None and batch.inputs.bidirectional is None


def test_without_bos_a_document_begins_with_its_first_token_at_position_0():
    rows = make_rows(
        ids=[[11, 12, EOS, 13, 14], [15, EOS, 16, EOS, 0], [EOS, EOS, 0, 0, 0]],
        segments=[[1, 1, 1, 2, 2], [1, 1, 2, 2, 0], [1, 2, 0, 0, 0]],
        previous=[-1, 14, 9],
    )
    objective = causal.build(causal.Config(begins_with_bos=False), TOKENIZER, ModelInterface(5))
    batch = objective(rows, no_randomness)
    inputs, weights = batch.inputs, batch.weights
    assert inputs.ids.tolist() == [[0, 11, 12, 0, 13], [14, 15, 0, 16, 0], [9, 0, 0, 0, 0]]
    assert inputs.segments.tolist() == [[0, 1, 1, 0, 2], [1, 1, 0, 2, 0], [1, 0, 0, 0, 0]]
    assert inputs.positions.tolist() == [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert weights.tolist() == [[0, 1, 1, 0, 1], [1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert batch.targets is rows.ids and not objective.scores_every_token


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), pad=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_input_is_bos_then_the_targets_in_every_segment(lengths, pad):
    segments = [n + 1 for n, length in enumerate(lengths) for _ in range(length)] + [0] * pad
    ids = [i % 200 + 1 for i in range(sum(lengths))] + [0] * pad
    batch = causal_batch(make_rows([ids], [segments], [-1]))
    for number, length in enumerate(lengths, 1):
        held = np.array(segments) == number
        inputs, targets = batch.inputs.ids[0, held], batch.targets[0, held]
        assert len(inputs) == length and inputs[0] == BOS
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
    assert batch.weights.sum() == sum(lengths)


def test_input_does_not_change_when_a_later_target_does():
    rows = make_rows([[11, 12, 13, 14, 15]], [[1, 1, 1, 2, 2]], [7])
    before = causal_batch(rows).inputs.ids
    for t in range(5):
        ids = rows.ids.copy()
        ids[0, t] = 99
        after = causal_batch(Rows(ids, rows.segments, rows.positions, rows.previous)).inputs.ids
        np.testing.assert_array_equal(after[0, : t + 1], before[0, : t + 1])


def test_rows_are_left_as_they_were():
    rows = make_rows([[11, 12, 0]], [[1, 1, 0]], [7])
    for array in (rows.ids, rows.segments, rows.positions, rows.previous):
        array.flags.writeable = False
    causal_batch(rows)


def test_a_row_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 5, (6, 20)), axis=1)
    rows = make_rows(rng.integers(0, 255, (6, 20)), segments, rng.integers(-1, 255, 6))
    whole = causal_batch(rows)
    for i in range(6):
        one = slice(i, i + 1)
        part = causal_batch(
            Rows(rows.ids[one], rows.segments[one], rows.positions[one], rows.previous[one])
        )
        np.testing.assert_array_equal(part.inputs.ids, whole.inputs.ids[one])
        np.testing.assert_array_equal(part.weights, whole.weights[one])


def test_config_has_nothing_to_set():
    with pytest.raises(TypeError):
        causal.Config(anything=1)  # pyright: ignore[reportCallIssue]
