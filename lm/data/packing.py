"""Documents to rows of a fixed length, as sources: `split` and `best_fit`.

split     Concatenate and cut: row r is the tokens [r * T, (r + 1) * T) of the store.
best_fit  Best-fit decreasing (Ding et al. 2024, "Fewer truncations improve language modeling"):
          whole documents, each assigned to the fullest row that still has room. Only a document
          longer than T is cut, into chunks of T and a rest.

Both have every token of the store in exactly one row. A row is a list of chunks: ranges of the
store inside one document.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lm.data.sources import RowLayout, Rows, Span
from lm.data.sources.tokens import TokenStore
from lm.storage.files import write_atomically

_PLAN_VERSION = 2


class FieldStore(Protocol):
    """The part of a `TokenStore` that rows are read from: one field of its documents."""

    path: str
    offsets: np.ndarray

    @property
    def eos_id(self) -> int: ...

    def document_ids(self, i: int) -> str: ...

    def read_ranges(self, starts: Sequence[int], stops: Sequence[int], /) -> list[np.ndarray]: ...


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
        stores: Sequence[FieldStore],
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
        first, last = (
            np.stack([store.offsets[documents + i] for store in self.stores], 1) for i in (0, 1)
        )
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
    offsets = store.offsets

    def chunks_of(rows: np.ndarray) -> Chunks:
        begin = rows * length
        end = np.minimum(begin + length, store.num_tokens)
        first = np.searchsorted(offsets, begin, "right") - 1
        counts = np.searchsorted(offsets, end, "left") - first
        documents = ranges(first, counts)
        starts = np.maximum(offsets[documents], np.repeat(begin, counts))
        stops = np.minimum(offsets[documents + 1], np.repeat(end, counts))
        return Chunks(counts, documents, starts[:, None], stops[:, None])

    return _single_field(store, length, -(-store.num_tokens // length), chunks_of)


def best_fit(
    store: TokenStore, length: int, *, cache: str | os.PathLike | None = None
) -> PackedRows:
    """Return the store packed into rows of `length` tokens without cutting a document that fits.

    Rows are in the order of their first document. In a row, the rest of a document that was cut
    comes first. The plan is kept in the folder `cache` (None: in memory only), which any number of
    processes may share.
    """
    row_offsets, starts, stops = cached_plan(
        lambda: plan(store.offsets, length), f"best_fit-{length}", [store.offsets], cache
    )

    def chunks_of(rows: np.ndarray) -> Chunks:
        counts, chosen = items_of_rows(row_offsets, rows)
        documents = np.searchsorted(store.offsets, starts[chosen], "right") - 1
        return Chunks(counts, documents, starts[chosen, None], stops[chosen, None])

    return _single_field(store, length, len(row_offsets) - 1, chunks_of)


def _single_field(
    store: TokenStore, length: int, num_rows: int, chunks_of: Callable[[np.ndarray], Chunks]
) -> PackedRows:
    if not store.num_tokens:
        raise ValueError(f"{store.path}: the store has no tokens")
    ratio = store.num_bytes / store.num_tokens
    return PackedRows([store], RowLayout((length,)), num_rows, chunks_of, bytes_per_token=ratio)


def check_rows(rows: np.ndarray, num_rows: int, path: str) -> np.ndarray:
    """Return `rows` as int64; IndexError where they are not within `num_rows`."""
    rows = np.asarray(rows, np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= num_rows):
        raise IndexError(f"{path}: no rows {rows.min()} to {rows.max()} in {num_rows} rows")
    return rows


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return counts[0] integers from first[0] up, then counts[1] from first[1] up, ..."""
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def items_of_rows(row_offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of items of each row [B], and their indices, row after row.

    row_offsets: int64 [R + 1], row r has the items row_offsets[r] to row_offsets[r + 1] of a plan.
    """
    counts = row_offsets[rows + 1] - row_offsets[rows]
    return counts, ranges(row_offsets[rows], counts)


def cached_plan(
    make: Callable[[], tuple[np.ndarray, ...]],
    name: str,
    inputs: Sequence[np.ndarray],
    cache: str | os.PathLike | None,
) -> tuple[np.ndarray, ...]:
    """Return the int64 arrays of `make()`, from the folder `cache` if they are there (None: no
    cache). The key is the name and the hash of `inputs`.
    """
    if cache is None:
        return make()
    key = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in inputs)).hexdigest()
    file = Path(cache) / f"{name}-{_PLAN_VERSION}-{key[:16]}.npy"
    if not file.exists():
        arrays = make()
        header = [len(arrays), *map(len, arrays)]
        content = io.BytesIO()
        np.save(content, np.concatenate([header, *arrays]).astype(np.int64))
        try:
            write_atomically(file, content.getbuffer())
        except OSError as error:
            raise ValueError(
                f"the packing plan cannot be kept in {cache} ({error}); "
                "set loader.cache_dir to a folder that can be written"
            ) from error
    content = np.load(file, mmap_mode="r")
    count = int(content[0])
    ends = np.cumsum(content[1 : 1 + count])
    return tuple(np.split(content[1 + count :], ends[:-1]))


def plan(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row_offsets [R + 1], and starts and stops [P] of the chunks, all int64.

    Row r has the chunks row_offsets[r] to row_offsets[r + 1]. offsets: int64 [num_documents + 1].
    """
    num_chunks = -(-np.diff(offsets) // length)
    begins = np.repeat(offsets[:-1], num_chunks)
    starts = begins + length * ranges(np.zeros_like(num_chunks), num_chunks)
    stops = np.minimum(starts + length, np.repeat(offsets[1:], num_chunks))
    row_offsets, order = rows_of_bins(assign_bins(stops - starts, length), starts == begins)
    return row_offsets, starts[order], stops[order]


def rows_of_bins(bins: np.ndarray, is_late: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row_offsets int64 [R + 1] and the items row after row [P], for the bin of each item.

    Rows are in the order of their first items; is_late: bool [P], items behind others of the row.
    """
    _, first, bins = np.unique(bins, return_index=True, return_inverse=True)
    bins = np.argsort(np.argsort(first))[bins]
    order = np.argsort(2 * bins + is_late, kind="stable")
    return np.concatenate([[0], np.cumsum(np.bincount(bins))]), order


def assign_bins(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return int64 [P]: the bin of every item by best-fit decreasing; 1 <= lengths <= capacity.

    Items of one length are assigned together: the fullest bin with room for one takes as many as
    it can hold before the next fullest gets any, so that bins with equal room are filled in one
    vectorised move.
    """
    order = np.argsort(-lengths.astype(np.int32), kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    result = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # the rooms that open bins have, ascending
    bins_by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]

    def put(room: int, bins: np.ndarray) -> None:
        if room and len(bins):
            if not bins_by_room[room]:
                bisect.insort(rooms, room)
            bins_by_room[room].append(bins)

    placed = num_bins = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        missing = int(counts[length])
        while missing:
            at = bisect.bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else capacity
            each = room // length
            needed = -(-missing // each)
            if at < len(rooms):
                bins = bins_by_room[room].pop()
                if not bins_by_room[room]:
                    rooms.pop(at)
                put(room, bins[needed:])
                bins = bins[:needed]
            else:
                bins = np.arange(num_bins, num_bins + needed)
                num_bins += needed
            taken = min(missing, each * len(bins))
            result[order[placed : placed + taken]] = np.repeat(bins, each)[:taken]
            full = taken // each
            put(room - each * length, bins[:full])
            put(room - taken % each * length, bins[full:])
            placed += taken
            missing -= taken
    return result
