"""XLA's buffer assignment, read from its proto: offsets and lifetimes of arrays.

An allocation holds buffers; the large one for temporaries is a heap in which buffers that do not
live at the same time share bytes. Values of one shape that follow each other at one offset are one
buffer here: a loop's carry, updated in place, has a value for each instruction that updates it.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable

from lm.compiled import hlo, protos
from lm.compiled.protos import Proto


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Bytes that one array holds from `start` to `stop`, positions in the schedule."""

    writers: tuple[hlo.Instruction, ...]  # whose results it holds, one after the other
    shape: hlo.Shape | None  # None: a table of pointers
    size: int
    offset: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Allocation:
    size: int
    space: int  # as in `hlo.Shape`
    kind: str  # parameter, output, constant, temporary, or thread: inside of an operation
    parameter: int  # of the kind parameter: its number in the entry computation
    buffers: list[Buffer]


def read(assignment: Proto, module: hlo.Module) -> list[Allocation]:
    """All allocations of a program, from the BufferAssignmentProto of its module."""
    lives = _lives(assignment, module)
    defined = {b.id: b.defined_at for b in assignment.logical_buffers}
    allocations = []
    for a in assignment.buffer_allocations:
        values = []
        for part in a.assigned:
            at = defined[part.logical_buffer_id]
            writer = module.instructions[at.instruction_id]
            shape = hlo.shape_at(writer.proto.shape, at.shape_index)
            array = None if shape.tuple_shapes else next(iter(hlo.shapes(shape)), None)
            live = lives.get(part.logical_buffer_id, (0, 0))
            values.append(Buffer((writer,), array, part.size, part.offset, *live))
        kinds = {
            "thread": a.is_thread_local,
            "constant": a.is_constant,
            "parameter": a.is_entry_computation_parameter,
            "output": a.maybe_live_out,
            "temporary": True,
        }
        kind = next(name for name, holds in kinds.items() if holds)
        allocations.append(Allocation(a.size, a.color, kind, a.parameter_number, _joined(values)))
    return allocations


def _lives(assignment: Proto, module: hlo.Module) -> dict[int, tuple[int, int]]:
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


def _joined(values: Iterable[Buffer]) -> list[Buffer]:
    """Values of one shape at one offset, joined where one ends as the next begins."""
    groups: dict[tuple[int, int, str], list[Buffer]] = {}
    for value in values:
        groups.setdefault((value.offset, value.size, str(value.shape)), []).append(value)
    joined: list[Buffer] = []
    for group in groups.values():
        runs: list[Buffer] = []
        for value in sorted(group, key=lambda v: (v.start, v.stop)):
            if not runs or value.start > runs[-1].stop + 1:
                runs.append(value)
                continue
            writers, stop = runs[-1].writers + value.writers, max(runs[-1].stop, value.stop)
            runs[-1] = dataclasses.replace(runs[-1], writers=writers, stop=stop)
        joined += runs
    return joined


def peak(buffers: Iterable[Buffer], *, min_size: int = 0) -> list[tuple[Buffer, int]]:
    """The buffers that share a heap at its largest use, with the bytes of each that no larger one
    of them covers. Those smaller than `min_size` are left out.
    """
    large = [b for b in buffers if b.size >= min_size]
    events = sorted({b.start for b in large})
    most, found = 0, []
    bounds = _upper_bounds(large, events)
    for bound, position in sorted(zip(bounds, events, strict=True), reverse=True):
        if bound <= most:
            break
        covered = _cover([b for b in large if b.start <= position <= b.stop])
        used = sum(size for _, size in covered)
        if used > most:
            most, found = used, covered
    return found


def _upper_bounds(buffers: list[Buffer], events: list[int]) -> list[int]:
    """The sum of the sizes of live buffers at each event; bytes that they share count twice."""
    change = [0] * (len(events) + 1)
    for b in buffers:
        change[bisect.bisect_left(events, b.start)] += b.size
        change[bisect.bisect_right(events, b.stop)] -= b.size
    return list(itertools.accumulate(change[:-1]))


def _cover(live: list[Buffer]) -> list[tuple[Buffer, int]]:
    """Each buffer with its own part of the bytes in use: an update in place has two buffers in the
    same bytes for a moment; they count once, for the larger.
    """
    taken: list[tuple[int, int]] = []  # disjoint
    covered = []
    for b in sorted(live, key=lambda b: -b.size):
        low, high = b.offset, b.offset + b.size
        free = b.size - sum(max(0, min(high, y) - max(low, x)) for x, y in taken)
        if free:
            covered.append((b, free))
            touching = [(x, y) for x, y in taken if x <= high and low <= y]
            ends = [low, high, *itertools.chain(*touching)]
            taken = [t for t in taken if t not in touching] + [(min(ends), max(ends))]
    return covered
