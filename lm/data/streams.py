"""Tokens of many rows as one flat stream, and back: what objectives that move tokens work with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lm.data.sources import Rows
from lm.types import Batch, Tokens


class Stream(NamedTuple):
    """n tokens of several rows, row after row and segment after segment; no padding.

    ids: int32 [n]. rows, segments: int [n], where each belongs.
    """

    ids: np.ndarray
    rows: np.ndarray
    segments: np.ndarray

    def keep(self, mask: np.ndarray) -> Stream:
        """Returns the tokens where the bool mask [n] is true."""
        return Stream(self.ids[mask], self.rows[mask], self.segments[mask])

    def is_segment_start(self) -> np.ndarray:
        """Returns bool [n]: whether a token is the first of its segment."""
        return boundaries(self.rows) | boundaries(self.segments)


def flatten(rows: Rows, field: int | None = None) -> Stream:
    """Returns the tokens of `rows`, of one field where it is given."""
    held = rows.segments != 0
    if field is not None:
        assert rows.fields is not None, "the objective's layout has several fields"
        held &= rows.fields == field
    return Stream(rows.ids[held], np.nonzero(held)[0], rows.segments[held])


def boundaries(values: np.ndarray) -> np.ndarray:
    """Returns bool [n]: whether a value differs from the one before it; the first one does."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def positions_since(begins: np.ndarray) -> np.ndarray:
    """Returns int [n]: how many places ago, or 0, the last true of the bool mask [n] was."""
    places = np.arange(len(begins))
    return places - np.maximum.accumulate(np.where(begins, places, 0))


def scatter_to_rows(
    stream: Stream, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ids, segments and positions, int32 of `shape`, each row's tokens from its left."""
    columns = positions_since(boundaries(stream.rows))
    assert not len(columns) or columns.max() < shape[1], (
        f"a row of {columns.max() + 1} tokens for {shape[1]} places: the layout was too long"
    )
    at = stream.rows * shape[1] + columns
    arrays = []
    for values in (stream.ids, stream.segments, positions_since(stream.is_segment_start())):
        array = np.zeros(shape, np.int32)
        array.flat[at] = values
        arrays.append(array)
    return tuple(arrays)


def shift_right(ids: np.ndarray, segments: np.ndarray, positions: np.ndarray, bos: int):
    """Returns int32 [B, T]: the token before each one of its segment, bos before the first."""
    inputs = np.empty_like(ids)
    inputs[:, 1:] = ids[:, :-1]
    inputs[positions == 0] = bos
    return inputs * (segments != 0)


def join(source: Stream, target: Stream) -> tuple[Stream, np.ndarray]:
    """Returns each segment's source followed by its target, and bool [n]: what is target."""
    parts = Stream(*(np.concatenate(pair) for pair in zip(source, target, strict=True)))
    is_target = np.arange(len(parts.ids)) >= len(source.ids)
    order = np.lexsort((is_target, parts.segments, parts.rows))  # stable
    return Stream(*(part[order] for part in parts)), is_target[order]


def conditional(
    source: Stream,
    target: Stream,
    *,
    batch_size: int,
    length: int,
    encoder_length: int | None,
    bos: int,
    bidirectional: bool,
) -> Batch:
    """Returns the batch that predicts every token of `target` from `source` and those before it.

    With an encoder, the source is its input, and the decoder's is bos and the target:

        encoder   a b . c .       inputs  ^ x ^ y z      (`.` is eos, `^` bos)
                  1 1 1 2 2       targets x . y z .

    Without one, the target follows the source, whose tokens are not scored; `bidirectional` marks
    bos and the source as a prefix that its whole segment sees:

        inputs    ^ a b . x ^ c . y z
        targets   a b . x . c . y z .
        weights   0 0 0 1 1 0 0 1 1 1
    """
    if encoder_length is not None:
        ids, segments, positions = scatter_to_rows(target, (batch_size, length))
        inputs = shift_right(ids, segments, positions, bos)
        return Batch(
            inputs=Tokens(inputs, segments, positions),
            targets=ids,
            weights=(segments != 0).astype(np.float32),
            encoder=Tokens(*scatter_to_rows(source, (batch_size, encoder_length))),
        )
    stream, is_target = join(source, target)
    ids, segments, positions = scatter_to_rows(stream, (batch_size, length))
    scored, _, _ = scatter_to_rows(stream._replace(ids=is_target), (batch_size, length))
    inputs = shift_right(ids, segments, positions, bos)
    prefix = None
    if bidirectional:  # the input at a place is the token before it
        prefix = (segments != 0) & (shift_right(scored, segments, positions, 0) == 0)
    return Batch(
        inputs=Tokens(inputs, segments, positions, bidirectional=prefix),
        targets=ids,
        weights=scored.astype(np.float32),
    )
