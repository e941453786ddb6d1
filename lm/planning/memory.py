"""HBM of a program by purpose (lm/planning/attribution.py), at the moment of peak use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from lm.planning import buffers, hlo
from lm.planning.attribution import Attribution
from lm.planning.buffers import Allocation
from lm.planning.compiling import Compiled

# Every group, in the order of tables and pictures, and what is in it.
GROUPS = {
    "parameters": "parameters",
    "optimizer": "state of the optimizer",
    "cache": "keys and values of earlier tokens",
    "batch": "inputs of the step",
    "outputs": "results that share no memory with arguments",
    "gradients": "gradients, whole or in part",
    "saved activations": "what the forward pass saves for the backward pass",
    "parameter copies": "parameters gathered from other devices, or cast to the compute type",
    "kernels": "results and scratch of custom kernels",
    "temporaries": "everything else that is live at the peak",
    "fragmentation": "gaps of the heap at the peak",
    "code": "instructions",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One buffer of the report."""

    bytes: int
    shape: str
    group: str
    op: str  # the path of an argument, or of the operation that made it
    source: str  # FILE:LINE of the project
    padding: int  # bytes of these that hold no element


@dataclasses.dataclass(frozen=True)
class Memory:
    groups: dict[str, int]  # bytes of a device's HBM by group; absent where none
    total: int  # their sum, which the compiler compares with the capacity
    stated: int | None  # the same by memory_analysis(); None where the program doesn't fit
    host: int  # bytes of the host's memory for a device
    largest: tuple[Line, ...]  # the ten largest buffers
    largest_temporary: tuple[Line, ...]  # of those in the heap at its peak


def measure(
    compiled: Compiled,
    module: hlo.Module,
    parameters: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    platform: str,
) -> Memory:
    """The memory of a compiled step."""
    allocations = buffers.read(compiled.program.buffer_assignment, module)
    attribution = Attribution(module, parameters)
    groups = dict.fromkeys(GROUPS, 0)
    lines: list[Line] = []
    heap: list[Line] = []
    for allocation in allocations:
        if allocation.space != hlo.HBM or allocation.kind == "thread":
            continue
        if allocation.kind == "temporary":
            found = list(_heap(allocation, attribution))
            heap += found
            for line in found:
                groups[line.group] += line.bytes
            groups["fragmentation"] += allocation.size - sum(line.bytes for line in found)
            continue
        group, op = "temporaries", "constant"
        if allocation.kind == "parameter":
            group, op = attribution.argument(allocation)
        elif allocation.kind == "output":
            group, op = "outputs", "output"
        groups[group] += allocation.size
        shape = next((b.shape for b in allocation.buffers if b.size == allocation.size), None)
        padding = allocation.size - shape.bytes if shape else 0
        lines.append(Line(allocation.size, str(shape or ""), group, op, "", max(0, padding)))
    stated = None
    if compiled.sizes:
        s = compiled.sizes
        groups["code"] = s["generated_code"]
        stated = s["argument"] + s["output"] - s["alias"] + s["temp"] + s["generated_code"]
        if platform == "tpu":
            # libtpu's temporaries are no heap that it assigned: up to half as much again. Its peak
            # is, without gaps and code, but with what is in the chip's own memory at that moment.
            assert compiled.peak is not None
            stated = compiled.peak + groups["fragmentation"] + groups["code"]
    h = compiled.host_sizes
    host = h["argument"] + h["output"] - h["alias"] + h["temp"] if h else 0
    return Memory(
        groups={name: size for name, size in groups.items() if size},
        total=sum(groups.values()),
        stated=stated,
        host=host,
        largest=_ten([*lines, *heap]),
        largest_temporary=_ten(heap),
    )


def _ten(lines: list[Line]) -> tuple[Line, ...]:
    return tuple(sorted(lines, key=lambda line: -line.bytes)[:10])


def _heap(allocation: Allocation, attribution: Attribution) -> Iterable[Line]:
    """The buffers of a heap at its peak; those below a ten-thousandth of it as one."""
    least = allocation.size // 10_000
    small = 0
    for buffer, size in buffers.peak(allocation.buffers, least=least).buffers:
        if buffer.shape is None or size < least:
            small += size
            continue
        op, source = attribution.describe(buffer)
        padding = max(0, buffer.size - buffer.shape.bytes)
        yield Line(size, str(buffer.shape), attribution.group(buffer), op, source, padding)
    if small:
        yield Line(small, "", "temporaries", "small buffers", "", 0)
