"""Documents to rows of a fixed length, as sources: `split` and `best_fit`.

split     Concatenate and cut: row r is the tokens [r * T, (r + 1) * T) of the store.
best_fit  Best-fit decreasing (see `bins`), in each shard of the store by itself: whole documents;
          only one longer than T is cut, into chunks of T and a rest.

Both have every token of the store in exactly one row. A row is a list of chunks: ranges of the
store inside one document.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lm.data.bins import Packing, ranges
from lm.data.plans import ShardPlans
from lm.data.rows import RowLayout, Rows, Span
from lm.data.tokens import TokenStore


class Chunks(NamedTuple):
    """The chunks of B rows, row after row, all int64: ranges of a document in each of F stores."""

    counts: np.ndarray  # [B], at least 1
    documents: np.ndarray  # [sum of counts]
    starts: np.ndarray  # [sum of counts, F], token positions in the stores
    stops: np.ndarray  # [sum of counts, F]


class _Pieces(NamedTuple):
    """The fields of chunks in the order in which they fill rows, and padding, of field F and
    segment 0; all int64 [n].
    """

    part: np.ndarray  # of all rows, with as many parts as the layout has lengths
    field: np.ndarray
    segment: np.ndarray
    position: np.ndarray  # of the first token in the segment
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray  # tokens of the whole document: first to last
    last: np.ndarray


class PackedRows:
    """The rows of packed documents; a `RowSource`."""

    truncation_summary = ""  # no token is dropped

    def __init__(
        self,
        stores: Sequence[TokenStore],
        layout: RowLayout,
        num_rows: int,
        chunks_of: Callable[[np.ndarray], Chunks],
        bytes_per_token: float | None = None,
    ):
        self.stores = tuple(stores)
        self.layout = layout
        self.path = stores[0].path
        self.bytes_per_token = bytes_per_token
        self._num_rows = num_rows
        self._chunks_of = chunks_of

    def __len__(self) -> int:
        return self._num_rows

    def read(self, rows: np.ndarray) -> Rows:
        """Return the rows with the indices `rows`: int64 [B]; IndexError outside of `[0, len)`."""
        chunks = self._chunks_of(check_rows(rows, len(self), self.path))
        shape = (len(chunks.counts), self.layout.length)
        num_tokens = shape[0] * shape[1]
        pieces = self._pieces(chunks)
        lengths, ends = pieces.stop - pieces.start, np.cumsum(pieces.stop - pieces.start)
        begins = ends - lengths
        is_rest = pieces.start > pieces.first
        before = pieces.start[is_rest]  # the tokens before are read with the others
        tokens = self._fetch(
            np.append(pieces.field, pieces.field[is_rest]),
            np.append(pieces.start, before - 1),
            np.append(pieces.stop, before),
        )
        ids, previous = tokens[:num_tokens], np.full(num_tokens, -1, np.int32)
        previous[begins[is_rest]] = tokens[num_tokens:]
        segments = np.repeat(pieces.segment.astype(np.int32), lengths)
        positions = np.arange(num_tokens, dtype=np.int32)
        positions -= np.repeat((begins - pieces.position).astype(np.int32), lengths)
        positions *= segments > 0
        fields = None
        if len(self.stores) > 1:
            # a field that was cut keeps its eos
            ids[ends[pieces.stop < pieces.last] - 1] = self.stores[0].eos_id
            fields = np.where(pieces.segment > 0, pieces.field, 0).astype(np.int32)
            fields = np.repeat(fields, lengths).reshape(shape)
        ids, segments, positions = (x.reshape(shape) for x in (ids, segments, positions))
        return Rows(ids, segments, positions, previous.reshape(shape), fields)

    def _pieces(self, chunks: Chunks) -> _Pieces:
        counts, documents, starts, stops = chunks
        num_parts = len(self.layout.lengths)  # of a row
        field = np.arange(len(self.stores))
        part = np.repeat(np.arange(len(counts)) * num_parts, counts)[:, None]
        position = 0
        if num_parts == 1:  # the fields of a document follow each other
            position = np.cumsum(stops - starts, 1) - (stops - starts)
        else:
            part = part + field
        segment = ranges(np.ones_like(counts), counts)[:, None]
        both = np.stack([documents, documents + 1])
        first, last = np.stack([store.offsets[both] for store in self.stores], 2)
        columns = np.broadcast_arrays(part, field, segment, position, starts, stops, first, last)
        pieces = _Pieces(*(column.ravel() for column in columns))
        free = np.tile(self.layout.lengths, len(counts))
        used = np.bincount(pieces.part, pieces.stop - pieces.start, minlength=len(free))
        free -= used.astype(np.int64)
        [part] = np.nonzero(free)
        padding = np.broadcast_arrays(part, len(self.stores), 0, 0, 0, free[part], 0, free[part])
        order = np.argsort(np.append(pieces.part, part), kind="stable")
        return _Pieces(*(np.append(*pair)[order] for pair in zip(pieces, padding, strict=True)))

    def documents(self, rows: np.ndarray) -> list[list[Span]]:
        counts, documents, *limits = self._chunks_of(check_rows(rows, len(self), self.path))
        begins = np.stack([store.offsets[documents] for store in self.stores], 1)
        starts, stops = ((positions - begins).sum(1).tolist() for positions in limits)
        spans = (
            Span(n, self.stores[0].document_ids(n), start, stop)
            for n, start, stop in zip(documents.tolist(), starts, stops, strict=True)
        )
        return [list(itertools.islice(spans, count)) for count in counts.tolist()]

    def _fetch(self, field: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Return the tokens of all ranges, joined; those of field F are zeros."""
        is_new = (field[1:] != field[:-1]) | (starts[1:] != stops[:-1])
        first = np.flatnonzero(np.append(True, is_new)[: len(field)])
        stops = np.append(stops[first[1:] - 1], stops[-1:])  # adjacent ranges are one read
        field, starts = field[first], starts[first]
        arrays = [np.empty(0)] * len(first)
        for number, store in enumerate((*self.stores, None)):
            chosen = np.flatnonzero(field == number)
            limits = starts[chosen].tolist(), stops[chosen].tolist()
            found = store.read_ranges(*limits) if store else map(np.zeros, limits[1])
            for i, tokens in zip(chosen.tolist(), found, strict=True):
                arrays[i] = tokens
        return np.concatenate([np.empty(0, np.int32), *arrays], dtype=np.int32, casting="unsafe")


def split(store: TokenStore, length: int) -> PackedRows:
    """Return the store cut into rows of `length` tokens; the last row is padded."""
    _check_tokens(store)

    def chunks_of(rows: np.ndarray) -> Chunks:
        begin = rows * length
        end = np.minimum(begin + length, store.num_tokens)
        first, last = store.offsets.find(np.concatenate([begin, end - 1])).reshape(2, -1)
        counts = last + 1 - first
        documents = ranges(first, counts)
        limits = store.offsets[np.stack([documents, documents + 1])]
        starts = np.maximum(limits[0], np.repeat(begin, counts))
        stops = np.minimum(limits[1], np.repeat(end, counts))
        return Chunks(counts, documents, starts[:, None], stops[:, None])

    return _single_field(store, length, -(-store.num_tokens // length), chunks_of)


def best_fit(
    store: TokenStore, length: int, *, cache: str | os.PathLike | None = None
) -> PackedRows:
    """Return the store packed into rows of `length` tokens without cutting a document that fits.

    Rows are of one shard, and in the order of their first document. In a row, the rest of a
    document that was cut comes first. Plans that the preparation has not stored are kept in the
    folder `cache` (None: in memory only), which any number of processes may share.
    """
    _check_tokens(store)
    plans = ShardPlans([store], Packing((store.field,), (length,)), cache)

    def chunks_of(rows: np.ndarray) -> Chunks:
        counts, shards, chunks = plans.items(rows)
        starts, stops = chunks + store.first_tokens[shards]
        return Chunks(counts, store.offsets.find(starts), starts[:, None], stops[:, None])

    return _single_field(store, length, int(plans.first_rows[-1]), chunks_of)


def _single_field(
    store: TokenStore, length: int, num_rows: int, chunks_of: Callable[[np.ndarray], Chunks]
) -> PackedRows:
    ratio = store.num_bytes / store.num_tokens
    return PackedRows([store], RowLayout((length,)), num_rows, chunks_of, bytes_per_token=ratio)


def _check_tokens(store: TokenStore) -> None:
    if not store.num_tokens:
        raise ValueError(f"{store.path}: the store has no tokens")


def check_rows(rows: np.ndarray, num_rows: int, path: str) -> np.ndarray:
    """Return `rows` as int64; IndexError where they are not within `num_rows`."""
    rows = np.asarray(rows, np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= num_rows):
        raise IndexError(f"{path}: no rows {rows.min()} to {rows.max()} in {num_rows} rows")
    return rows
