"""XLA's buffer assignment, read from its text: what lies where, and when.

An allocation holds values; the large one for temporaries is a heap in which values that do not
live at the same time share bytes. Values that follow each other in one place with one shape are
one buffer here: what a loop carries and updates in place has a value for every step of that.
"""

from __future__ import annotations

import bisect
import dataclasses
import re

from lm.aot import hlo

_ALLOCATION = re.compile(r"allocation \d+: size (\d+),(.*)")
_VALUE = re.compile(
    r" value: <\d+ ([\w.\-]+)(?:\{([\d, ]*)\})?(?: \(phi\))? @\d+> "
    r"\(size=(\d+),offset=(\d+)\): (.*)"
)
_RANGE = re.compile(r"\s+([\w.\-]+)\{([\d, ]*)\}:(\d+)-(\d+)$")


@dataclasses.dataclass(frozen=True)
class Value:
    """A result, or a part of one, of an instruction."""

    name: str  # of the instruction
    index: str  # of the part: "", "2", "1,0"
    size: int
    offset: int
    shape: hlo.Shape | None  # None: a table of pointers
    start: int  # position in the schedule where it comes to life, and where it ends
    stop: int


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Bytes that one array holds from `start` to `stop`."""

    values: tuple[Value, ...]
    size: int
    offset: int
    start: int
    stop: int

    @property
    def shape(self) -> hlo.Shape | None:
        return self.values[0].shape


@dataclasses.dataclass(frozen=True)
class Allocation:
    size: int
    space: int  # hlo.HBM, hlo.HOST, ...
    kind: str  # parameter, output, constant, temporary, or thread: inside of an operation
    parameter: int | None  # number of the entry's parameter
    buffers: tuple[Buffer, ...]


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment when most bytes of a heap are in use."""

    position: int
    buffers: tuple[tuple[Buffer, int], ...]  # with the bytes that no larger one of them covers
    used: int


def parse(assignment: str, live_ranges: str) -> list[Allocation]:
    """All allocations of a program."""
    ranges: dict[tuple[str, str], tuple[int, int]] = {}
    for line in live_ranges.splitlines():
        found = _RANGE.match(line)
        if found:
            ranges[found[1], _index(found[2])] = (int(found[3]), int(found[4]))
    allocations: list[Allocation] = []
    head: tuple[int, str] | None = None
    values: list[Value] = []

    def close() -> None:
        if head is not None:
            allocations.append(_allocation(*head, values))

    for line in assignment.splitlines():
        found = _ALLOCATION.match(line)
        if found:
            close()
            head, values = (int(found[1]), found[2]), []
            continue
        found = _VALUE.match(line)
        if found and head is not None:
            index = _index(found[2] or "")
            shape = None if found[5].startswith("(") else next(iter(hlo.shapes(found[5])), None)
            live = ranges.get((found[1], index), (0, 0))
            values.append(
                Value(found[1], index, int(found[3]), int(found[4]), shape, live[0], live[1])
            )
        elif head is not None and line and not line.startswith(" "):
            break  # a list of totals follows
    close()
    return allocations


def _index(text: str) -> str:
    return text.replace(" ", "")


def _allocation(size: int, text: str, values: list[Value]) -> Allocation:
    space = re.search(r"\bcolor (\d+)", text)
    parameter = re.search(r"\bparameter (\d+)", text)
    kind = "output"
    for word, name in (
        ("thread-local", "thread"),
        ("constant", "constant"),
        ("preallocated-temp", "temporary"),
        ("parameter", "parameter"),
    ):
        if word in text:
            kind = name
            break
    return Allocation(
        size,
        int(space[1]) if space else hlo.HBM,
        kind,
        int(parameter[1]) if parameter else None,
        _buffers(values),
    )


def _buffers(values: list[Value]) -> tuple[Buffer, ...]:
    """Values in one place with one shape, joined where one ends as the next begins."""
    places: dict[tuple[int, int, str], list[Value]] = {}
    for value in values:
        places.setdefault((value.offset, value.size, str(value.shape)), []).append(value)
    buffers = []
    for found in places.values():
        run: list[Value] = []
        stop = 0
        for value in sorted(found, key=lambda v: (v.start, v.stop)):
            if run and value.start > stop + 1:
                buffers.append(_buffer(run, stop))
                run = []
            stop = value.stop if not run else max(stop, value.stop)
            run.append(value)
        buffers.append(_buffer(run, stop))
    return tuple(buffers)


def _buffer(run: list[Value], stop: int) -> Buffer:
    return Buffer(tuple(run), run[0].size, run[0].offset, run[0].start, stop)


def peak(buffers: tuple[Buffer, ...], *, least: int = 0) -> Peak:
    """The peak of buffers that share a heap; those smaller than `least` are left out."""
    large = [b for b in buffers if b.size >= least]
    best = Peak(0, (), 0)
    events = sorted({b.start for b in large})
    bounds = _upper_bounds(large, events)
    for bound, position in sorted(zip(bounds, events, strict=True), reverse=True):
        if bound <= best.used:
            break
        live = [b for b in large if b.start <= position <= b.stop]
        used, covered = _cover(live)
        if used > best.used:
            best = Peak(position, tuple(covered), used)
    return best


def _upper_bounds(buffers: list[Buffer], events: list[int]) -> list[int]:
    """At each event the sizes of the live buffers, without regard to bytes that they share."""
    change = [0] * (len(events) + 1)
    for b in buffers:
        change[bisect.bisect_left(events, b.start)] += b.size
        change[bisect.bisect_right(events, b.stop)] -= b.size
    total, bounds = 0, []
    for c in change[:-1]:
        total += c
        bounds.append(total)
    return bounds


def _cover(live: list[Buffer]) -> tuple[int, list[tuple[Buffer, int]]]:
    """(bytes in use, each buffer with its own part of them): an update in place has two buffers in
    the same bytes for a moment; they count once, for the larger.
    """
    taken: list[tuple[int, int]] = []  # disjoint, ascending
    covered = []
    for b in sorted(live, key=lambda b: -b.size):
        low, high = b.offset, b.offset + b.size
        free = high - low - sum(max(0, min(high, y) - max(low, x)) for x, y in taken)
        if free:
            covered.append((b, free))
            taken = _union([*taken, (low, high)])
    return sum(y - x for x, y in taken), covered


def _union(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def schedule(live_ranges: str) -> dict[str, int]:
    """Positions of the instructions in the order in which they run, bodies of loops in place."""
    found = re.findall(r"^    (\d+):([\w.\-]+)$", live_ranges, re.M)
    return {name: int(position) for position, name in found}
