"""Documents to rows of a fixed length, as sources: `split` and `best_fit`.

split     Concatenate and cut: row r is the tokens [r * T, (r + 1) * T) of the store. Every row but
          the last is full; a document continues in the next row. Needs no plan.
best_fit  Best-fit decreasing (Ding et al. 2024, "Fewer truncations improve language modeling"):
          whole documents, each assigned to the fullest row that still has room. Only a document
          longer than T is cut, into chunks of T and a rest. The plan is computed once and cached
          by the hash of the document lengths.

Both have every token of the store in exactly one row. A row is a list of chunks: ranges of the
store inside one document.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm import storage
from lm.data.sources import Rows
from lm.data.sources.tokens import TokenStore

_PLAN_VERSION = 2


class Chunks(NamedTuple):
    """The chunks of B rows, row after row: token positions in the store, int64."""

    counts: np.ndarray  # [B], at least 1
    starts: np.ndarray  # [sum of counts]
    stops: np.ndarray  # [sum of counts]


class Span(NamedTuple):
    """A part of a row: tokens `start` to `stop` of a document."""

    document: int
    id: str
    start: int
    stop: int


class PackedRows:
    """The rows of a packed token store; a `RowSource`."""

    truncation_summary = ""  # no token is dropped

    def __init__(
        self,
        store: TokenStore,
        length: int,
        *,
        num_rows: int,
        chunks_of: Callable[[np.ndarray], Chunks],
    ):
        self.store = store
        self.length = length
        self._num_rows = num_rows
        self._chunks_of = chunks_of

    def __len__(self) -> int:
        return self._num_rows

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the store's text per token, eos included."""
        return self.store.num_bytes / self.store.num_tokens

    def read(self, rows: np.ndarray) -> Rows:
        """Return the rows with the indices `rows`: int64 [B]; IndexError outside of `[0, len)`."""
        counts, starts, stops = self._chunks_of(check_rows(rows, len(self), self.store.path))
        tokens, is_rest, before = self._fetch(starts, stops)
        numbers = (ranges(np.ones_like(counts), counts)).astype(np.int32)
        lengths = stops - starts
        shape = (len(counts), self.length)
        previous = np.full(shape, -1, np.int32)
        if len(before):
            begins = np.cumsum(lengths) - lengths
            row = np.repeat(np.arange(len(counts)), counts)
            column = begins - begins[np.cumsum(counts) - counts][row]
            previous[row[is_rest], column[is_rest]] = before
        padded = len(tokens) < shape[0] * shape[1]
        if padded:  # one more chunk for every row, of segment 0
            ends = np.cumsum(counts)
            used = np.add.reduceat(lengths, ends - counts)
            lengths = np.insert(lengths, ends, self.length - used)
            numbers = np.insert(numbers, ends, 0)
        segments = np.repeat(numbers, lengths)
        begins = (np.cumsum(lengths) - lengths).astype(np.int32)
        positions = np.arange(len(segments), dtype=np.int32)
        positions -= np.repeat(begins, lengths)
        if padded:
            scored = segments > 0
            positions *= scored
            ids = np.zeros(len(segments), np.int32)
            ids[scored] = tokens
        else:
            ids = tokens
        return Rows(ids.reshape(shape), segments.reshape(shape), positions.reshape(shape), previous)

    def documents(self, rows: np.ndarray) -> list[list[Span]]:
        """Return for each row the documents that it holds, in the order of its segments."""
        counts, starts, stops = self._chunks_of(check_rows(rows, len(self), self.store.path))
        documents = self._documents_at(starts)
        begins = self.store.offsets[documents]
        chunks = np.stack([documents, starts - begins, stops - begins], 1).tolist()
        spans = [Span(n, self.store.document_ids(n), start, stop) for n, start, stop in chunks]
        return by_row(spans, counts)

    def _documents_at(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.store.offsets, positions, "right") - 1

    def _fetch(
        self, starts: np.ndarray, stops: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens of all chunks, bool [P]: True where a chunk is the rest of a document,
        and the tokens just before those chunks.
        """
        is_rest = self.store.offsets[self._documents_at(starts)] < starts
        before = starts[is_rest] - 1
        new = np.ones(len(starts) + 1, bool)  # adjacent chunks are one read
        new[1:-1] = starts[1:] != stops[:-1]
        ranges = self.store.read_ranges(
            np.concatenate([starts[new[:-1]], before]).tolist(),
            np.concatenate([stops[new[1:]], before + 1]).tolist(),
        )
        tokens = np.concatenate([np.empty(0, np.int32), *ranges], dtype=np.int32, casting="unsafe")
        num_tokens = len(tokens) - len(before)
        return tokens[:num_tokens], is_rest, tokens[num_tokens:]


def split(store: TokenStore, length: int) -> PackedRows:
    """Return the store cut into rows of `length` tokens; the last row is padded."""
    _check(store, length)
    offsets = store.offsets

    def chunks_of(rows: np.ndarray) -> Chunks:
        begin = rows * length
        end = np.minimum(begin + length, store.num_tokens)
        first = np.searchsorted(offsets, begin, "right") - 1
        counts = np.searchsorted(offsets, end, "left") - first
        documents = ranges(first, counts)
        starts = np.maximum(offsets[documents], np.repeat(begin, counts))
        stops = np.minimum(offsets[documents + 1], np.repeat(end, counts))
        return Chunks(counts, starts, stops)

    num_rows = -(-store.num_tokens // length)
    return PackedRows(store, length, num_rows=num_rows, chunks_of=chunks_of)


def best_fit(
    store: TokenStore, length: int, *, cache: str | os.PathLike | None = None
) -> PackedRows:
    """Return the store packed into rows of `length` tokens without cutting a document that fits.

    Rows are in the order of their first document. In a row, the rest of a document that was cut
    comes first. The plan is kept in the folder `cache` (None: in memory only), which any number of
    processes may share.
    """
    _check(store, length)
    row_offsets, starts, stops = cached_plan(
        lambda: plan(store.offsets, length), f"best_fit-{length}", [store.offsets], cache
    )

    def chunks_of(rows: np.ndarray) -> Chunks:
        counts = row_offsets[rows + 1] - row_offsets[rows]
        chosen = ranges(row_offsets[rows], counts)
        return Chunks(counts, starts[chosen], stops[chosen])

    return PackedRows(store, length, num_rows=len(row_offsets) - 1, chunks_of=chunks_of)


def check_rows(rows: np.ndarray, num_rows: int, path: str) -> np.ndarray:
    """Return `rows` as int64; IndexError where they are not within `num_rows`."""
    rows = np.asarray(rows, np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= num_rows):
        raise IndexError(f"{path}: no rows {rows.min()} to {rows.max()} in {num_rows} rows")
    return rows


def by_row(spans: Iterable[Span], counts: np.ndarray) -> list[list[Span]]:
    """Return the spans of each row; counts: int [B]."""
    spans = iter(spans)
    return [list(itertools.islice(spans, count)) for count in counts.tolist()]


def _check(store: TokenStore, length: int) -> None:
    if length < 1:
        raise ValueError(f"data.length ({length}) must be at least 1")
    if not store.num_tokens:
        raise ValueError(f"{store.path}: the store has no tokens")


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return counts[0] integers from first[0] up, then counts[1] from first[1] up, ..."""
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


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
            storage.write_atomically(file, content.getbuffer())
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
    bins = in_order_of_first(assign_bins(stops - starts, length))
    order = np.argsort(2 * bins + (starts == begins), kind="stable")
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(bins))])
    return row_offsets, starts[order], stops[order]


def in_order_of_first(bins: np.ndarray) -> np.ndarray:
    """Return the bins numbered in the order of their first items."""
    _, first, bins = np.unique(bins, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[bins]


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
