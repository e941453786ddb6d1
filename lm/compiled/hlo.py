"""A compiled program read from XLA's protos: instructions, source lines, trip counts.

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
from typing import TYPE_CHECKING

from lm.compiled import protos
from lm.compiled.protos import Proto

if TYPE_CHECKING:
    import jax

HBM = 0  # memory space of a layout; 5 is the host's, everything else is on the chip
OPTIMIZER = "lm/optim/"  # how the source lines of the optimizer's update start
_CALLS = ("call", "async-start", "fusion")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result, as a device holds it."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def bytes(self) -> int:
        """Without the padding of its tiles."""
        number = re.search(r"\d+", self.dtype)  # the first one is the bits, as in bf16 and f8e4m3fn
        bits = int(number[0]) if number else {"pred": 8}.get(self.dtype, 0)  # token, opaque
        return math.ceil(math.prod(self.dims) * bits / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Instruction:
    proto: Proto  # its HloInstructionProto
    name: str
    opcode: str
    op_name: str  # the path of JAX scopes and primitives that it came from
    target: str  # of a custom call
    index: int  # of a get-tuple-element
    computation: Computation
    shapes: tuple[Shape, ...]  # a tuple's leaves
    operands: tuple[Instruction, ...]
    called: tuple[Computation, ...]  # of a loop its body and condition, or the branches
    users: list[Instruction] = dataclasses.field(default_factory=list)

    @property
    def frame(self) -> int:
        return self.proto.metadata.stack_frame_id

    @functools.cached_property
    def config(self) -> dict:
        """The backend config where it is JSON, as XLA's own are; Triton kernels have MLIR's."""
        text = self.proto.backend_config
        return json.loads(text) if text.startswith(b'{"') else {}

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """The frontend attributes, set by JAX and the compiler."""
        return {entry.key: entry.value for entry in self.proto.frontend_attributes.map}

    @property
    def value(self) -> int | None:
        """The value of a constant integer."""
        literal = self.proto.literal
        held = [*literal.s32s, *literal.u32s, *literal.s64s, *literal.u64s]
        return held[0] if self.opcode == "constant" and len(held) == 1 else None

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def hbm_bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes if shape.space == HBM)


@dataclasses.dataclass(eq=False, repr=False)
class Computation:
    id: int
    instructions: list[Instruction] = dataclasses.field(init=False)  # as scheduled, if they are
    root: Instruction = dataclasses.field(init=False)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {i.proto.parameter_number: i for i in self.instructions if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction, and how many times a step runs it."""

    instruction: Instruction
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
    proto: Proto  # its HloModuleProto
    instructions: dict[int, Instruction]  # of all computations, by id
    entry: Computation

    def source(self, frame: int) -> str:
        """FILE:LINE of the innermost frame that is in the project; "" if none."""
        table = self.proto.stack_frame_index
        while frame:  # numbers count from 1; the outermost frame has the parent 0
            found = table.stack_frames[frame - 1]
            location = table.file_locations[found.file_location_id - 1]
            _, is_ours, file = table.file_names[location.file_name_id - 1].rpartition("/lm/")
            if is_ours:
                return f"lm/{file}:{location.line}"
            frame = found.parent_frame_id
        return ""

    @functools.cached_property
    def schedule(self) -> dict[str, int]:
        """Positions of the instructions, by name, in the order in which they run, a loop's
        condition and then its body in front of the loop.
        """
        waiting = {sequence.key for sequence in self.proto.schedule.sequences}
        found: dict[str, int] = {}

        def lay(computation: Computation) -> None:
            if computation.id not in waiting:
                return
            waiting.remove(computation.id)
            for instruction in computation.instructions:
                if instruction.opcode in ("while", "conditional", "call", "async-start"):
                    for inner in instruction.called[:: -1 if instruction.opcode == "while" else 1]:
                        lay(inner)
                found[instruction.name] = len(found)

        lay(self.entry)
        return found


def walk(
    computation: Computation, times: float = 1.0, outer: Instruction | None = None
) -> Iterator[Visit]:
    """Every instruction that a step runs. Branches count in equal parts, as data choose one."""
    for instruction in computation.instructions:
        yield Visit(instruction, times, outer)
        opcode, inside = instruction.opcode, times
        if opcode == "while":
            count = trip_count(instruction)
            inside *= 1 if count is None else count
        elif opcode == "conditional":
            inside /= len(instruction.called)
        elif opcode not in _CALLS:
            continue
        within = outer or (instruction if opcode == "fusion" else None)
        for called in instruction.called:
            yield from walk(called, inside, within)


def trip_count(loop: Instruction) -> int | None:
    """The trip count of a while loop: the compiler's annotation, or the bound of its counter; None
    where neither is known (a loop that ends on data).
    """
    if "known_trip_count" in loop.config:
        return int(loop.config["known_trip_count"]["n"])
    body, condition = (computation.root for computation in loop.called)
    test = _unmoved(condition)
    if test.opcode == "fusion":
        test = test.called[0].root
    direction = test.proto.comparison_direction
    if test.opcode != "compare" or direction not in ("LT", "LE", "GT", "GE"):
        return None
    sides = [_unmoved(operand) for operand in condition.operands[:2]]
    counters = [side.index for side in sides if side.opcode == "get-tuple-element"]
    bounds = [side.value for side in sides if side.value is not None]
    [initial] = loop.operands
    if len(counters) != 1 or len(bounds) != 1 or {body.opcode, initial.opcode} != {"tuple"}:
        return None
    start = _unmoved(initial.operands[counters[0]]).value
    step = _unmoved(body.operands[counters[0]])
    change = [v for operand in step.operands if (v := _unmoved(operand).value) is not None]
    if step.opcode != "add" or start is None or len(change) != 1:
        return None
    span = abs(bounds[0] - start) + (direction in ("LE", "GE"))
    return max(0, -(-span // abs(change[0])))


def _unmoved(instruction: Instruction) -> Instruction:
    """The source of a value's copies and bitcasts."""
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        instruction = instruction.operands[0]
    return instruction


def shape_at(proto: Proto, index: Sequence[int] = ()) -> Proto:
    """The ShapeProto of a part of a tuple."""
    return functools.reduce(lambda part, i: part.tuple_shapes[i], index, proto)


def shapes(proto: Proto) -> tuple[Shape, ...]:
    """The arrays of a ShapeProto; of a tuple its leaves."""
    if proto.tuple_shapes:
        return tuple(shape for part in proto.tuple_shapes for shape in shapes(part))
    dtype = protos.DTYPES[proto.element_type]
    if dtype == "tuple":
        return ()
    return (Shape(dtype, tuple(proto.dimensions), proto.layout.memory_space),)


def read(proto: Proto) -> Module:
    """The module of an HloModuleProto, which lists operands and callees before their users."""
    scheduled = {s.key: s.value.instruction_ids for s in proto.schedule.sequences}
    computations: dict[int, Computation] = {}
    instructions: dict[int, Instruction] = {}
    for c in proto.computations:
        computation = computations[c.id] = Computation(c.id)
        own: dict[int, Instruction] = {}
        for i in c.instructions:
            own[i.id] = Instruction(
                i,
                name=i.name,
                opcode=i.opcode,
                op_name=i.metadata.op_name,
                target=i.custom_call_target,
                index=i.tuple_index,
                computation=computation,
                shapes=shapes(i.shape),
                operands=tuple(own[number] for number in i.operand_ids),
                called=tuple(computations[number] for number in i.called_computation_ids),
            )
            for operand in dict.fromkeys(own[i.id].operands):
                operand.users.append(own[i.id])
        computation.instructions = [own[number] for number in scheduled.get(c.id, own)]
        computation.root = own[c.root_id]
        instructions |= own
    [entry] = (c.id for c in proto.computations if c.name == proto.entry_computation_name)
    return Module(proto, instructions, computations[entry])


def of_compiled(compiled: jax.stages.Compiled) -> Module:
    """The optimized module of a compiled function."""
    executable = compiled.runtime_executable()
    assert executable is not None, "XLA compiled it"
    [module] = executable.hlo_modules()
    serialized = module.as_serialized_hlo_module_proto()
    return read(protos.message("HloModuleProto").FromString(serialized))
