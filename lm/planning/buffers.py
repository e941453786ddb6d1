"""XLA's buffer assignment, read from its proto: offsets and lifetimes of arrays.

An allocation holds values; the large one for temporaries is a heap in which values that do not
live at the same time share bytes. Values of one shape that follow each other at one offset are one
buffer here: a loop's carry, updated in place, has a value for each instruction that updates it.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from typing import Any

from lm.planning import hlo, protos


@dataclasses.dataclass(frozen=True)
class Value:
    """A result, or a part of one, of an instruction."""

    name: str  # of the instruction
    size: int
    offset: int
    shape: hlo.Shape | None  # None: a table of pointers
    start: int  # first and last position in the schedule at which it is live
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
    """The moment of the largest use of a heap."""

    position: int
    buffers: tuple[tuple[Buffer, int], ...]  # with the bytes that no larger one of them covers
    used: int


def read(assignment: Any, module: hlo.Module) -> list[Allocation]:
    """All allocations of a program, from the BufferAssignmentProto of its module."""
    lives = _lives(assignment, module)
    defined = {b.id: b.defined_at for b in assignment.logical_buffers}
    allocations = []
    for a in assignment.buffer_allocations:
        values = []
        for part in a.assigned:
            at = defined[part.logical_buffer_id]
            instruction = module.by_id[at.instruction_id]
            shape = hlo.shape_at(instruction.proto.shape, at.shape_index)
            array = None if shape.tuple_shapes else next(iter(hlo.shapes(shape)), None)
            live = lives.get(part.logical_buffer_id, (0, 0))
            values.append(Value(instruction.name, part.size, part.offset, array, *live))
        parameter = a.parameter_number if a.is_entry_computation_parameter else None
        allocations.append(Allocation(a.size, a.color, _kind(a), parameter, _buffers(values)))
    return allocations


def _kind(allocation: Any) -> str:
    if allocation.is_thread_local:
        return "thread"
    if allocation.is_constant:
        return "constant"
    if allocation.is_entry_computation_parameter:
        return "parameter"
    return "output" if allocation.maybe_live_out else "temporary"


def _lives(assignment: Any, module: hlo.Module) -> dict[int, tuple[int, int]]:
    """First and last positions in the schedule of the values of heaps, by number: a value is freed
    after all those that start at its last position.
    """
    found: dict[int, tuple[int, int]] = {}
    for trace in assignment.heap_simulator_traces:
        now = 0
        for event in trace.events:
            if event.kind == protos.FREE:
                found[event.buffer_id] = (found[event.buffer_id][0], now)
            else:
                now = module.schedule[event.instruction_name]
                found[event.buffer_id] = (now, now)
    return found


def _buffers(values: list[Value]) -> tuple[Buffer, ...]:
    """Values of one shape at one offset, joined where one ends as the next begins."""
    groups: dict[tuple[int, int, str], list[Value]] = {}
    for value in values:
        groups.setdefault((value.offset, value.size, str(value.shape)), []).append(value)
    buffers = []
    for found in groups.values():
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
    """The sum of the sizes of live buffers at each event; bytes that they share count twice."""
    change = [0] * (len(events) + 1)
    for b in buffers:
        change[bisect.bisect_left(events, b.start)] += b.size
        change[bisect.bisect_right(events, b.stop)] -= b.size
    return list(itertools.accumulate(change[:-1]))


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
