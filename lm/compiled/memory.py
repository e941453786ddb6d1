"""HBM of a program by purpose (lm/compiled/attribution.py), at the moment of peak use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from lm.compiled import buffers, hlo
from lm.compiled.attribution import Attribution, argument_group
from lm.compiled.buffers import Allocation
from lm.compiled.compiling import Compiled

# Every group, in the order of tables and pictures, and what is in it.
GROUPS = {
    "parameters": "parameters",
    "optimizer": "state of the optimizer",
    "teacher": "parameters of the teacher",
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
    source: str = ""  # FILE:LINE of the project
    padding: int = 0  # bytes of these that hold no element


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
    """The memory of a compiled step. parameters: as of `Attribution`."""
    attribution = Attribution(module, parameters)
    arguments: list[Line] = []
    heap: list[Line] = []
    groups = dict.fromkeys(GROUPS, 0)
    for allocation in buffers.read(compiled.program.buffer_assignment, module):
        if allocation.space != hlo.HBM or allocation.kind == "thread":
            continue
        if allocation.kind == "temporary":
            found = list(_heap(allocation, attribution))
            groups["fragmentation"] += allocation.size - sum(line.bytes for line in found)
            heap += found
        else:
            arguments.append(_argument(allocation, module))
    for line in (*arguments, *heap):
        groups[line.group] += line.bytes
    stated = None
    if compiled.stats is not None:
        groups["code"] = compiled.size("generated_code_size")
        stated = _in_use(compiled, "") + groups["code"]
        if platform == "tpu":
            # libtpu's temporaries are no heap that it assigned: up to half as much again. Its peak
            # is, without gaps and code, but with what is in the chip's own memory at that moment.
            stated = compiled.size("peak_memory") + groups["fragmentation"] + groups["code"]
    return Memory(
        groups={name: size for name, size in groups.items() if size},
        total=sum(groups.values()),
        stated=stated,
        host=_in_use(compiled, "host_"),
        largest=_ten([*arguments, *heap]),
        largest_temporary=_ten(heap),
    )


def _in_use(compiled: Compiled, space: str) -> int:
    """Bytes of arguments, results and temporaries, by the compiler's analysis."""
    parts = {"argument": 1, "output": 1, "alias": -1, "temp": 1}
    return sum(sign * compiled.size(f"{space}{name}_size") for name, sign in parts.items())


def _ten(lines: list[Line]) -> tuple[Line, ...]:
    return tuple(sorted(lines, key=lambda line: -line.bytes)[:10])


def _argument(allocation: Allocation, module: hlo.Module) -> Line:
    """The line of an argument, a result or a constant."""
    size = allocation.size
    group, op = {"output": ("outputs", "output")}.get(allocation.kind, ("temporaries", "constant"))
    if allocation.kind == "parameter":
        op = module.entry.parameters[allocation.parameter].op_name
        group = argument_group(op)
    shape = next((b.shape for b in allocation.buffers if b.size == size), None)
    padding = max(0, size - shape.bytes) if shape else 0
    return Line(size, str(shape or ""), group, op, padding=padding)


def _heap(allocation: Allocation, attribution: Attribution) -> Iterator[Line]:
    """The buffers of a heap at its peak; those below a ten-thousandth of it as one."""
    min_size = allocation.size // 10_000
    small = 0
    for buffer, size in buffers.peak(allocation.buffers, min_size=min_size):
        if buffer.shape is None or size < min_size:
            small += size
            continue
        op, source = attribution.describe(buffer)
        padding = max(0, buffer.size - buffer.shape.bytes)
        yield Line(size, str(buffer.shape), attribution.group(buffer), op, source, padding)
    if small:
        yield Line(small, "", "temporaries", "small buffers")
