"""A compiled program read from its text: instructions, source lines, and how often each one runs.

XLA's cost analysis counts the body of a loop once; `walk` multiplies trip counts in, and goes
through calls, branches and the computations inside of fusions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {
    **{"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16},
    **{"f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64},
    **{"c64": 64, "c128": 128, "token": 0, "opaque": 0, "f4e2m1fn": 4, "f8e8m0fnu": 8},
}
HBM, HOST = 0, 5  # memory spaces of a layout, S(n): everything else is on the chip

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)?)")  # %x#1 is part 1 of a tuple, since libtpu 0.0.5x
_HEAD = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_CLOSING = re.compile(r"\}(?:, execution_thread=.*)?\s*$")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result, as a device holds it."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def bytes(self) -> int:
        """Without the padding of its tiles."""
        bits = BITS.get(self.dtype, 8)  # the float8 kinds
        return -(-math.prod(self.dims) * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # a tuple's leaves
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str
    root: bool

    @functools.cached_property
    def op_name(self) -> str:
        """The path of JAX scopes and primitives that the instruction came from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    @functools.cached_property
    def frame(self) -> int:
        found = re.search(r"stack_frame_id=(\d+)", self.attributes)
        return int(found[1]) if found else 0

    @functools.cached_property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def index(self) -> int:
        """Of a get-tuple-element."""
        found = re.search(r"\bindex=(\d+)", self.attributes)
        return int(found[1]) if found else 0

    def called(self, role: str) -> str:
        found = re.search(rf"\b{role}=%([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def branches(self) -> tuple[str, ...]:
        """Of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return tuple(_NAME.findall(listed[1]))
        pair = (self.called("true_computation"), self.called("false_computation"))
        return pair if all(pair) else ()

    def numbers(self, name: str) -> tuple[int, ...]:
        """Of an attribute such as dimensions={0,2}."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.literal): i for i in found}

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
    """An instruction in the place where it runs, and how many times a step runs it."""

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
class Frame:
    file: str
    line: int
    function: str
    parent: int


@dataclasses.dataclass(frozen=True)
class Module:
    name: str
    computations: dict[str, Computation]
    entry: Computation
    frames: dict[int, Frame]

    @functools.cached_property
    def instructions(self) -> dict[str, tuple[Instruction, Computation]]:
        """By name, which is unique in a module."""
        return {
            name: (instruction, computation)
            for computation in self.computations.values()
            for name, instruction in computation.instructions.items()
        }

    def source(self, frame: int, inside: str) -> str:
        """FILE:LINE of the innermost frame whose file has `inside` in its path; "" if none."""
        seen: set[int] = set()
        while frame in self.frames and frame not in seen:
            seen.add(frame)
            found = self.frames[frame]
            if inside in found.file:
                return f"{inside.lstrip('/')}{found.file.split(inside)[-1]}:{found.line}"
            frame = found.parent
        return ""

    def walk(self) -> Iterator[Visit]:
        """Every instruction that a step runs. Branches count in equal parts: which one runs is
        data.
        """
        yield from self._walk(self.entry, 1.0, None)

    def _walk(
        self, computation: Computation, times: float, outer: Instruction | None
    ) -> Iterator[Visit]:
        for instruction in computation.instructions.values():
            yield Visit(instruction, computation, times, outer)
            opcode = instruction.opcode
            if opcode == "while":
                found = self.trip_count(instruction, computation)
                trips = times * (1 if found is None else found)
                for role in ("body", "condition"):
                    yield from self._walk(self.computations[instruction.called(role)], trips, outer)
            elif opcode == "conditional":
                branches = instruction.branches
                for branch in branches:
                    yield from self._walk(self.computations[branch], times / len(branches), outer)
            elif opcode in ("call", "async-start", "fusion"):
                inner = instruction.called("calls") or instruction.called("to_apply")
                within = outer or (instruction if opcode == "fusion" else None)
                yield from self._walk(self.computations[inner], times, within)

    def trip_count(self, loop: Instruction, computation: Computation) -> int | None:
        """How often the body of a while loop runs: what the compiler noted, or the bound of its
        counter; None where neither is known (a loop that ends on data).
        """
        noted = _TRIPS.search(loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations[loop.called("condition")]
        body = self.computations[loop.called("body")]
        test = self._resolve(condition.root, condition)
        if test.opcode == "fusion":
            test = self.computations[test.called("calls")].root
        direction = re.search(r"direction=(LT|LE|GT|GE)", test.attributes)
        if test.opcode != "compare" or not direction or len(condition.root.operands) < 2:
            return None
        sides = [self._resolve(condition.operand(condition.root, i), condition) for i in (0, 1)]
        counters = [s for s in sides if s.opcode == "get-tuple-element"]
        bounds = [s for s in sides if s.opcode == "constant"]
        if len(counters) != 1 or len(bounds) != 1 or body.root.opcode != "tuple":
            return None
        step = self._resolve(body.operand(body.root, counters[0].index), body)
        start = self._start(loop, computation, counters[0].index)
        change = [
            int(o.literal)
            for o in (self._resolve(body.instructions[n], body) for n in step.operands)
            if o.opcode == "constant"
        ]
        if step.opcode != "add" or start is None or len(change) != 1:
            return None
        inclusive = direction[1] in ("LE", "GE")
        span = abs(int(bounds[0].literal) - start) + inclusive
        return max(0, -(-span // abs(change[0])))

    def _start(self, loop: Instruction, computation: Computation, index: int) -> int | None:
        """The initial value of a loop's counter."""
        initial = computation.operand(loop)
        if initial.opcode != "tuple":
            return None
        value = self._resolve(computation.operand(initial, index), computation)
        return int(value.literal) if value.opcode == "constant" else None

    def _resolve(self, instruction: Instruction, computation: Computation) -> Instruction:
        """What copies and bitcasts of one value are copies of."""
        while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
            instruction = computation.operand(instruction)
        return instruction


def _closing(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if not depth:
                return i + 1
    return len(text)


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays in the text of a shape or of a tuple of shapes."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Shape(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(found)


def _elements(text: str) -> list[str]:
    """The texts of a tuple's parts, of which each may be a tuple itself."""
    found, depth, start = [], 0, 1
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == (letter == ","):  # a comma of the tuple itself, or its end
            found.append(text[start:i])
            start = i + 1
    return found


def _part(name: str, tuples: dict[str, str]) -> Instruction:
    """Meaning of an operand `%x#1`. Compilers before wrote an instruction of its own for it,
    which the rest of this package goes by.
    """
    source, _, index = name.partition("#")
    shape = shapes(_elements(tuples[source])[int(index)])
    attributes = f", index={index}"
    return Instruction(
        name, "get-tuple-element", shape, (source,), f"%{source}", attributes, root=False
    )


def _instruction(line: str) -> tuple[Instruction, str] | None:
    """The instruction of a line, and the text of its shape."""
    head = _HEAD.match(line)
    if not head:
        return None
    start = head.end()
    stop = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", stop)
    closing = _closing(line, opening)
    inner = line[opening + 1 : closing - 1]
    instruction = Instruction(
        name=head[2],
        opcode=line[stop:opening].strip(),
        shapes=shapes(line[start:stop]),
        operands=tuple(_NAME.findall(inner)),
        literal=inner,
        attributes=line[closing:],
        root=bool(head[1]),
    )
    return instruction, line[start:stop].strip()


def parse(text: str) -> Module:
    """The module of an HLO text, as `compiled.as_text()` gives it."""
    name = re.match(r"HloModule ([\w.\-]+)", text)
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    tuples: dict[str, str] = {}  # name -> text of its shape
    for line in _logical_lines(text):
        if current is not None and not _CLOSING.match(line):
            found = _instruction(line)
            if found:
                instruction, shape = found
                if shape.startswith("("):
                    tuples[instruction.name] = shape
                for operand in instruction.operands:
                    if "#" in operand and operand not in current.instructions:
                        current.instructions[operand] = _part(operand, tuples)
                current.instructions[instruction.name] = instruction
            continue
        opened = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$", line)
        current = Computation(opened[2], {}) if opened else None
        if opened and current is not None:
            computations[opened[2]] = current
            entry = opened[2] if opened[1] else entry
    return Module(name[1] if name else "", computations, computations[entry], _frames(text))


def _logical_lines(text: str) -> Iterator[str]:
    """Lines of a module, where the attributes of an instruction may take several: those of a
    kernel hold its own metadata as it was written.
    """
    kept: str | None = None
    for line in text.splitlines():
        if kept is not None and not (_HEAD.match(line) or _CLOSING.match(line)):
            kept += line
            continue
        if kept is not None:
            yield kept
            kept = None
        if _HEAD.match(line):
            kept = line
        else:
            yield line
    if kept is not None:
        yield kept


def _frames(text: str) -> dict[int, Frame]:
    """The table of stack frames in front of the computations."""
    head = text[: text.find("\n%")] if "\n%" in text else text

    def rows(title: str) -> dict[int, str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)+)", head, re.M)
        lines = found[1].splitlines() if found else []
        return {int(row.split(" ", 1)[0]): row.split(" ", 1)[1] for row in lines}

    def number(row: str, name: str) -> int:
        found = re.search(rf"\b{name}=(\d+)", row)
        return int(found[1]) if found else 0

    files = {i: row.strip('"') for i, row in rows("FileNames").items()}
    functions = {i: row.strip('"') for i, row in rows("FunctionNames").items()}
    locations = rows("FileLocations")
    frames = rows("StackFrames")
    # the text gives a parent's number plus one: the first frame, which has none, names itself
    shift = 1 if number(frames.get(1, ""), "parent_frame_id") == 1 else 0
    result = {}
    for i, row in frames.items():
        location = locations.get(number(row, "file_location_id"), "")
        result[i] = Frame(
            files.get(number(location, "file_name_id"), ""),
            number(location, "line"),
            functions.get(number(location, "function_name_id"), ""),
            number(row, "parent_frame_id") - shift,
        )
    return result
