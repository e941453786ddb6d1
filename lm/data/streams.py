"""Tokens of many rows as one flat stream, and back to rows: for objectives that move tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lm.data.rows import Rows


class Stream(NamedTuple):
    """n tokens of several rows, row after row and segment after segment; no padding.

    ids: int32 [n]. rows, segments: int [n], the row and the segment of each token.
    """

    ids: np.ndarray
    rows: np.ndarray
    segments: np.ndarray

    def keep(self, tokens: np.ndarray) -> Stream:
        """Return the tokens of a bool mask [n], or of indices."""
        return Stream(self.ids[tokens], self.rows[tokens], self.segments[tokens])

    def is_segment_start(self) -> np.ndarray:
        """Return bool [n]: True at the first token of each segment."""
        return boundaries(self.rows) | boundaries(self.segments)


def flatten(rows: Rows, field: int | None = None) -> Stream:
    """Return the non-padding tokens of `rows`, of one field where it is given."""
    held = rows.segments != 0
    if field is not None:
        assert rows.fields is not None, "the objective's layout has several fields"
        held &= rows.fields == field
    return Stream(rows.ids[held], np.nonzero(held)[0], rows.segments[held])


def boundaries(values: np.ndarray) -> np.ndarray:
    """Return bool [n]: True at the first value and wherever a value differs from the one before."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def last_start(starts: np.ndarray) -> np.ndarray:
    """Return int [n]: the index of the last True of the bool mask [n], 0 before the first."""
    return np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))


def positions_since(starts: np.ndarray) -> np.ndarray:
    """Return int [n]: the distance to the last True of the bool mask [n]."""
    return np.arange(len(starts)) - last_start(starts)


def scatter_to_rows(stream: Stream, shape: tuple[int, int], *more: np.ndarray) -> list[np.ndarray]:
    """Return ids, segments, positions and `more` values [n], int32 of `shape`, rows filled from the
    left.
    """
    columns = positions_since(boundaries(stream.rows))
    assert not len(columns) or columns.max() < shape[1], (
        f"a row of {columns.max() + 1} tokens in rows of {shape[1]}: the layout was too long"
    )
    at = stream.rows * shape[1] + columns
    values = (stream.ids, stream.segments, positions_since(stream.is_segment_start()), *more)
    arrays = [np.zeros(shape, np.int32) for _ in values]
    for array, value in zip(arrays, values, strict=True):
        array.flat[at] = value
    return arrays


def shift_right(
    ids: np.ndarray, segments: np.ndarray, positions: np.ndarray, bos: int
) -> np.ndarray:
    """Return int32 [B, T]: the previous token of the segment, bos before the first; padding: 0."""
    inputs = np.empty_like(ids)
    inputs[:, 1:] = ids[:, :-1]
    inputs[positions == 0] = bos
    return inputs * (segments != 0)


def join(source: Stream, target: Stream) -> tuple[Stream, np.ndarray]:
    """Return each segment's source followed by its target, and bool [n]: True in the target."""
    parts = Stream(*(np.concatenate(pair) for pair in zip(source, target, strict=True)))
    is_target = np.arange(len(parts.ids)) >= len(source.ids)
    order = np.lexsort((is_target, parts.segments, parts.rows))  # stable
    return parts.keep(order), is_target[order]


def concatenate(parts: Iterable[Stream]) -> Stream:
    """Return the streams one after another, in the order of their rows (stable)."""
    joined = Stream(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return joined.keep(np.argsort(joined.rows, kind="stable"))


def with_inserted(
    stream: Stream,
    before: np.ndarray,
    token: np.integer | np.ndarray | int,
    keep: np.ndarray | None = None,
) -> Stream:
    """Return the stream with `token` inserted before the tokens of the bool mask `before` [n].

    token: an id, or int [n] ids. keep: bool [n], the tokens of the stream that stay; None: all.
    """
    kept = np.ones(len(before), int) if keep is None else keep.astype(int)
    source = np.repeat(np.arange(len(before)), kept + before)
    is_new = boundaries(source) & before[source]
    new = np.broadcast_to(np.asarray(token, np.int32), before.shape)
    ids = np.where(is_new, new[source], stream.ids[source])
    return Stream(ids, stream.rows[source], stream.segments[source])
