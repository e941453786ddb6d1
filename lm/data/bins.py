"""Packing plans: documents of given lengths to rows, by best-fit decreasing; pure functions.

best_fit  Whole documents, each assigned to the fullest row that still has room (Ding et al. 2024,
          "Fewer truncations improve language modeling"). Only a document longer than a row is cut,
          into chunks of a row and a rest.
pairs     Documents of several fields, whole, in rows with one capacity for all or one for each.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

VERSION = 2  # to be raised when a plan of the same lengths changes


class Packing(NamedTuple):
    """Rows that documents are packed into.

    lengths: of a row, as in `RowLayout`. too_long: of several fields, see `pairs.Pairs`.
    """

    fields: tuple[str, ...]
    lengths: tuple[int, ...]
    too_long: str = "error"

    @property
    def name(self) -> str:
        """The name of its plans, also in files."""
        lengths = "-".join(map(str, self.lengths))
        if len(self.fields) == 1:
            return f"best_fit-{self.fields[0]}-{lengths}-v{VERSION}"
        return f"pairs-{'-'.join(self.fields)}-{self.too_long}-{lengths}-v{VERSION}"


def make_plan(packing: Packing, offsets: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the plan of documents whose fields have the token offsets int64 [num_documents + 1].

    All int64: a summary; row_offsets [R + 1], where row r has the items row_offsets[r] to
    row_offsets[r + 1]; and columns of the items [P]. The items of one field are chunks, with the
    columns start and stop; those of several are documents, by number. The summary of one field is
    empty; that of several has the documents that were cut and dropped, the greatest length of each
    field, and the greatest sum of them.
    """
    if len(packing.fields) == 1:
        [length] = packing.lengths
        return [np.zeros(0, np.int64), *plan_chunks(offsets[0], length)]
    lengths = np.stack([np.diff(values) for values in offsets], 1)  # [documents, fields]
    wanted = shorten(lengths, packing.lengths) if packing.too_long == "cut" else lengths
    fits = _fits(wanted, packing.lengths)
    num_cut = (fits & (wanted < lengths).any(1)).sum()
    longest = [*lengths.max(0, initial=0), lengths.sum(1).max(initial=0)]
    summary = np.array([num_cut, (~fits).sum(), *longest], np.int64)
    return [summary, *plan_documents(np.flatnonzero(fits), wanted[fits], packing.lengths)]


def _fits(lengths: np.ndarray, row_lengths: Sequence[int]) -> np.ndarray:
    one_stream = len(row_lengths) == 1
    used = lengths.sum(1, keepdims=True) if one_stream else lengths
    return (lengths[:, 0] >= 1) & (used <= np.array(row_lengths)).all(1)


def shorten(lengths: np.ndarray, row_lengths: Sequence[int]) -> np.ndarray:
    """Return the lengths with the first field cut to fit; 0 where it cannot."""
    room = np.full(len(lengths), row_lengths[0])
    if len(row_lengths) == 1:
        room -= lengths[:, 1:].sum(1)
    result = lengths.copy()
    result[:, 0] = np.minimum(
        lengths[:, 0], np.where(room >= np.minimum(2, lengths[:, 0]), room, 0)
    )
    return result


def plan_chunks(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row_offsets [R + 1], and starts and stops [P] of the chunks, all int64.

    Row r has the chunks row_offsets[r] to row_offsets[r + 1]. offsets: int64 [num_documents + 1].
    """
    num_chunks = -(-np.diff(offsets) // length)
    begins = np.repeat(offsets[:-1], num_chunks)
    starts = begins + length * ranges(np.zeros_like(num_chunks), num_chunks)
    stops = np.minimum(starts + length, np.repeat(offsets[1:], num_chunks))
    row_offsets, order = rows_of_bins(assign_bins(stops - starts, length), starts == begins)
    return row_offsets, starts[order], stops[order]


def plan_documents(
    documents: np.ndarray, lengths: np.ndarray, capacities: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return row_offsets [R + 1] and the documents of all rows, row after row, int64.

    documents: int64 [P]; lengths: [P, fields]; rows are in the order of their first document.
    """
    if not len(documents):
        return np.zeros(1, np.int64), documents
    if len(capacities) == 1:
        bins = assign_bins(lengths.sum(1), capacities[0])
    else:
        bins = assign_bins_with_capacities(lengths, capacities)
    row_offsets, order = rows_of_bins(bins, np.zeros(len(bins), bool))
    return row_offsets, documents[order]


def rows_of_bins(bins: np.ndarray, is_late: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row_offsets int64 [R + 1] and the items row after row [P], for the bin of each item.

    Rows are in the order of their first items; is_late: bool [P], items behind others of the row.
    """
    _, first, bins = np.unique(bins, return_index=True, return_inverse=True)
    bins = np.argsort(np.argsort(first))[bins]
    order = np.argsort(2 * bins + is_late, kind="stable")
    return np.concatenate([[0], np.cumsum(np.bincount(bins))]), order


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return counts[0] integers from first[0] up, then counts[1] from first[1] up, ..."""
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


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


def assign_bins_with_capacities(lengths: np.ndarray, capacities: Sequence[int]) -> np.ndarray:
    """Return int64 [P]: the bin of every item of `lengths` [P, capacities].

    Best-fit decreasing with several capacities: items in the order of the sum of their shares of
    the capacities; each into the bin with the smallest sum of free shares among those where it
    fits. Items of equal lengths are assigned together, in each bin as many as it holds. Other
    orders and other measures of the best fit gain or lose 0.2% on sentence pairs.
    """
    capacity = np.asarray(capacities, np.int64)
    shapes, kind, counts = np.unique(lengths, axis=0, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(kind, kind="stable"), np.cumsum(counts)[:-1])
    shares = shapes / capacity
    order = np.argsort(-shares.sum(1), kind="stable")
    # the smallest item still to come: a bin with less room than that is full
    smallest = np.minimum.accumulate(shapes[order][::-1], axis=0)[::-1]
    result = np.empty(len(lengths), np.int64)
    open_bins, rooms, num_bins = np.empty(0, np.int64), np.empty((0, len(capacities)), np.int64), 0
    for shape, least, items in zip(
        shapes[order], smallest, (members[k] for k in order), strict=True
    ):
        if len(open_bins) > 1024 and (full := (rooms < least).any(1)).mean() > 0.5:
            open_bins, rooms = open_bins[~full], rooms[~full]
        fitting = np.flatnonzero((rooms >= shape).all(1))
        each = (rooms[fitting] // shape).min(1)
        tightest = np.argsort((rooms[fitting] / capacity).sum(1), kind="stable")
        fitting, each = fitting[tightest], each[tightest]
        needed = int(np.searchsorted(np.cumsum(each), len(items))) + 1
        fitting, each = fitting[:needed], each[:needed]
        missing = len(items) - int(each.sum())
        if missing > 0:
            in_new = int((capacity // shape).min())
            new = -(-missing // in_new)
            fitting = np.concatenate([fitting, len(open_bins) + np.arange(new)])
            each = np.concatenate([each, np.full(new, in_new)])
            open_bins = np.concatenate([open_bins, num_bins + np.arange(new)])
            rooms = np.concatenate([rooms, np.tile(capacity, (new, 1))])
            num_bins += new
        each[-1] -= each.sum() - len(items)
        result[items] = np.repeat(open_bins[fitting], each)
        rooms[fitting] -= each[:, None] * shape
    return result
