"""A compiled program read from XLA's protos: instructions, source lines, and how often each one
runs.

XLA's cost analysis counts the body of a loop once; `walk` multiplies trip counts in, and goes
through calls, branches and the computations inside of fusions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lm.planning import protos

if TYPE_CHECKING:
    import jax

HBM, HOST = 0, 5  # memory spaces of a layout: everything else is on the chip
_CALLS = ("call", "async-start", "fusion")


def _bits(dtype: str) -> int:
    """The bits of an element: the first number of its type's name, as in bf16 and f8e4m3fn."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else {"pred": 8}.get(dtype, 0)  # token, opaque


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result, as a device holds it."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def bytes(self) -> int:
        """Without the padding of its tiles."""
        return math.ceil(math.prod(self.dims) * _bits(self.dtype) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    proto: Any  # its HloInstructionProto
    shapes: tuple[Shape, ...]  # a tuple's leaves
    operands: tuple[str, ...]
    called: tuple[str, ...]  # computations: of a loop its body and condition, or the branches

    @property
    def name(self) -> str:
        return self.proto.name

    @functools.cached_property
    def opcode(self) -> str:
        return self.proto.opcode

    @functools.cached_property
    def op_name(self) -> str:
        """The path of JAX scopes and primitives that the instruction came from."""
        return self.proto.metadata.op_name

    @property
    def frame(self) -> int:
        return self.proto.metadata.stack_frame_id

    @property
    def target(self) -> str:
        """The target of a custom call."""
        return self.proto.custom_call_target

    @property
    def index(self) -> int:
        """The index of a get-tuple-element."""
        return self.proto.tuple_index

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The backend config of a compiler that writes JSON, as XLA's own do."""
        text = self.proto.backend_config
        return json.loads(text) if text.startswith(b"{") else {}

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """The frontend attributes, set by JAX and the compiler."""
        return {entry.key: entry.value for entry in self.proto.frontend_attributes.map}

    @property
    def value(self) -> int | None:
        """The value of a constant integer."""
        literal = self.proto.literal
        for held in (literal.s32s, literal.u32s, literal.s64s, literal.u64s):
            if self.opcode == "constant" and len(held) == 1:
                return held[0]
        return None

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {i.proto.parameter_number: i for i in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in found:
                    found[operand].append(instruction)
        return found

    def operand(self, instruction: Instruction, i: int = 0) -> Instruction:
        return self.instructions[instruction.operands[i]]


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction in its computation, and how many times a step runs it."""

    instruction: Instruction
    computation: Computation
    times: float
    outer: Instruction | None  # the fusion that it is inside of: its result is no buffer

    @property
    def op_name(self) -> str:
        return self.instruction.op_name or (self.outer.op_name if self.outer else "")

    @property
    def frame(self) -> int:
        return self.instruction.frame or (self.outer.frame if self.outer else 0)


@dataclasses.dataclass(frozen=True)
class Module:
    proto: Any  # its HloModuleProto
    computations: dict[str, Computation]
    entry: Computation

    @functools.cached_property
    def instructions(self) -> dict[str, tuple[Instruction, Computation]]:
        """By name, which is unique in a module."""
        return {
            name: (instruction, computation)
            for computation in self.computations.values()
            for name, instruction in computation.instructions.items()
        }

    @functools.cached_property
    def by_id(self) -> dict[int, Instruction]:
        return {i.proto.id: i for i, _ in self.instructions.values()}

    def source(self, frame: int, inside: str) -> str:
        """FILE:LINE of the innermost frame whose file has `inside` in its path; "" if none."""
        table = self.proto.stack_frame_index
        while frame:  # numbers count from 1; the outermost frame has the parent 0
            found = table.stack_frames[frame - 1]
            location = table.file_locations[found.file_location_id - 1]
            file = table.file_names[location.file_name_id - 1]
            if inside in file:
                return f"{inside.lstrip('/')}{file.split(inside)[-1]}:{location.line}"
            frame = found.parent_frame_id
        return ""

    @functools.cached_property
    def schedule(self) -> dict[str, int]:
        """Positions of the instructions in the order in which they run, a loop's condition and then
        its body in front of the loop.
        """
        called = {c.id: c.name for c in self.proto.computations}
        waiting = {called[s.key]: s.value.instruction_ids for s in self.proto.schedule.sequences}
        found: dict[str, int] = {}

        def lay(computation: str) -> None:
            for number in waiting.pop(computation, ()):
                instruction = self.by_id[number]
                if instruction.opcode in ("while", "conditional", "call", "async-start"):
                    loop = instruction.opcode == "while"
                    for inner in instruction.called[:: -1 if loop else 1]:
                        lay(inner)
                found[instruction.name] = len(found)

        lay(self.entry.name)
        return found

    def walk(self) -> Iterator[Visit]:
        """Every instruction that a step runs. Branches count in equal parts, as data choose one."""
        yield from self._walk(self.entry, 1.0, None)

    def _walk(
        self, computation: Computation, times: float, outer: Instruction | None
    ) -> Iterator[Visit]:
        for instruction in computation.instructions.values():
            yield Visit(instruction, computation, times, outer)
            opcode = instruction.opcode
            if opcode == "while":
                found = self.trip_count(instruction, computation)
                times_inside = times * (1 if found is None else found)
            elif opcode == "conditional":
                times_inside = times / len(instruction.called)
            elif opcode in _CALLS:
                times_inside = times
            else:
                continue
            within = outer or (instruction if opcode == "fusion" else None)
            for called in instruction.called:
                yield from self._walk(self.computations[called], times_inside, within)

    def trip_count(self, loop: Instruction, computation: Computation) -> int | None:
        """The trip count of a while loop: the compiler's annotation, or the bound of its counter;
        None where neither is known (a loop that ends on data).
        """
        if "known_trip_count" in loop.config:
            return int(loop.config["known_trip_count"]["n"])
        body, condition = (self.computations[name] for name in loop.called)
        test = self._resolve(condition.root, condition)
        if test.opcode == "fusion":
            test = self.computations[test.called[0]].root
        direction = test.proto.comparison_direction
        if test.opcode != "compare" or direction not in ("LT", "LE", "GT", "GE"):
            return None
        if len(condition.root.operands) < 2:
            return None
        sides = [self._resolve(condition.operand(condition.root, i), condition) for i in (0, 1)]
        counters = [s for s in sides if s.opcode == "get-tuple-element"]
        bounds = [s.value for s in sides if s.value is not None]
        if len(counters) != 1 or len(bounds) != 1 or body.root.opcode != "tuple":
            return None
        step = self._resolve(body.operand(body.root, counters[0].index), body)
        start = self._start(loop, computation, counters[0].index)
        values = [self._resolve(body.instructions[n], body).value for n in step.operands]
        change = [v for v in values if v is not None]
        if step.opcode != "add" or start is None or len(change) != 1:
            return None
        span = abs(bounds[0] - start) + (direction in ("LE", "GE"))
        return max(0, -(-span // abs(change[0])))

    def _start(self, loop: Instruction, computation: Computation, index: int) -> int | None:
        """The initial value of a loop's counter."""
        initial = computation.operand(loop)
        if initial.opcode != "tuple":
            return None
        return self._resolve(computation.operand(initial, index), computation).value

    def _resolve(self, instruction: Instruction, computation: Computation) -> Instruction:
        """The source of a value's copies and bitcasts."""
        while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            instruction = computation.operand(instruction)
        return instruction


def shape_at(proto: Any, index: Sequence[int] = ()) -> Any:
    """The ShapeProto of a part of a tuple."""
    for i in index:
        proto = proto.tuple_shapes[i]
    return proto


def shapes(proto: Any) -> tuple[Shape, ...]:
    """The arrays of a ShapeProto; of a tuple its leaves."""
    if proto.tuple_shapes:
        return tuple(shape for part in proto.tuple_shapes for shape in shapes(part))
    dtype = protos.DTYPES[proto.element_type]
    if dtype == "tuple":
        return ()
    return (Shape(dtype, tuple(proto.dimensions), proto.layout.memory_space),)


def read(proto: Any) -> Module:
    """The module of an HloModuleProto."""
    called = {c.id: c.name for c in proto.computations}
    scheduled = {s.key: s.value.instruction_ids for s in proto.schedule.sequences}
    computations = {}
    for c in proto.computations:
        by_id = {i.id: i for i in c.instructions}
        ordered = [by_id[i] for i in scheduled.get(c.id, by_id)]
        instructions = {
            i.name: Instruction(
                i,
                shapes(i.shape),
                tuple(by_id[o].name for o in i.operand_ids),
                tuple(called[o] for o in i.called_computation_ids),
            )
            for i in ordered
        }
        root = instructions[by_id[c.root_id].name]
        computations[c.name] = Computation(c.name, instructions, root)
    return Module(proto, computations, computations[proto.entry_computation_name])


def of_compiled(compiled: jax.stages.Compiled) -> Module:
    """The optimized module of a compiled function."""
    executable = compiled.runtime_executable()
    assert executable is not None, "XLA compiled it"
    [module] = executable.hlo_modules()
    serialized = module.as_serialized_hlo_module_proto()
    return read(protos.message("HloModuleProto").FromString(serialized))
