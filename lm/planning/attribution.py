"""The purpose of the values of a compiled program, and the lines of code that made them.

Arguments are named by the state that they are. Buffers in the heap are classified by their maker (a
kernel, a cast or gather of parameters, the forward pass), by their shape (that of a parameter, or
of a shard or a layer of one, and not made by the forward pass: a gradient) and by their lifetime
(from the forward into the backward pass: a saved activation).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

from lm.planning import hlo
from lm.planning.buffers import Allocation, Buffer

KERNELS = ("tpu_custom_call", "__cudnn", "__cublas", "triton", "mosaic")
_MOVE_OPCODES = """
    copy bitcast convert copy-start copy-done transpose reshape slice dynamic-slice all-gather
    all-gather-start all-gather-done
"""
_MOVES = frozenset(_MOVE_OPCODES.split())
_ELEMENTWISE = ("mul", "add_any", "exp", "logistic", "div")
_MODULE = re.compile(r"\bjvp\(|/layers/|\.run/")  # in the path of an operation of the model
_HOLDERS = ("parameter", "while", "tuple", "get-tuple-element", "conditional", "call")


class Attribution:
    """The purpose of the values of a program."""

    def __init__(
        self,
        module: hlo.Module,
        parameters: Iterable[tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        """parameters: (global shape, shape of a shard) of every parameter."""
        self.module = module
        self._loops = {
            loop.called[0]: (loop, computation)
            for loop, computation in module.instructions.values()
            if loop.opcode == "while"
        }
        self._gradient_shapes = {s for p in parameters for s in _parts(*p)}
        backward = [
            position
            for name, position in module.schedule.items()
            if self._is_backward(module.instructions[name][0])
        ]
        self._first_backward = min(backward, default=math.inf)
        self._last_backward = max(backward, default=-math.inf)

    def argument(self, allocation: Allocation) -> tuple[str, str]:
        """(group, path) of an argument."""
        instruction = self.module.entry.parameters[allocation.parameter or 0]
        path = instruction.op_name
        for prefix, group in (
            ("state.params", "parameters"),
            ("params", "parameters"),
            ("state.opt_state", "optimizer"),
            ("state.cache", "cache"),
        ):
            if path.startswith(prefix):
                return group, path
        return "batch", path

    def group(self, buffer: Buffer) -> str:
        """The group of a buffer in the heap."""
        makers = self.makers(buffer)
        if any(m.opcode == "custom-call" and _is_kernel(m) for m in makers):
            return "kernels"
        if makers and all(self._is_parameter(m.name) for m in makers):
            return "parameter copies"
        if makers and all(m.op_name.startswith("state.opt_state") for m in makers):
            return "optimizer"
        dims = tuple(sorted(d for d in buffer.shape.dims if d > 1)) if buffer.shape else ()
        if (
            dims in self._gradient_shapes
            and buffer.start <= self._last_backward
            and not any(_is_activation(m) or self._is_older(m) for m in makers)
        ):
            return "gradients"
        if buffer.start < self._first_backward <= buffer.stop:
            return "saved activations"
        return "temporaries"

    def makers(self, buffer: Buffer) -> list[hlo.Instruction]:
        """The instructions that write a buffer, without those that only hand it on."""
        found = (self.module.instructions.get(v.name) for v in buffer.values)
        return [i for i, _ in (f for f in found if f) if i.opcode not in _HOLDERS]

    def describe(self, buffer: Buffer) -> tuple[str, str]:
        """(operation, FILE:LINE) that made a buffer: of several the one that updates it in a loop,
        since the first only allocates.
        """
        found = [n for m in self.makers(buffer) if (n := self._named(self._written(m)))]
        if not found:
            values = (self.module.instructions.get(v.name) for v in buffer.values)
            found = [v[0] for v in values if v and v[0].op_name]
        if not found:
            return "", ""
        chosen = max(found, key=lambda m: ("while/body" in m.op_name, len(m.op_name)))
        return chosen.op_name, self.module.source(chosen.frame, "/lm/")

    def _written(self, instruction: hlo.Instruction) -> hlo.Instruction:
        """The maker of the values that an instruction puts into its buffer, for example layer by
        layer; itself where it makes them.
        """
        instruction = instruction if instruction.op_name else self._maker(instruction.name)
        inside = self._inside(instruction)
        update = next((i for i in inside if i.opcode == "dynamic-update-slice"), None)
        if update is None:
            return instruction
        made = self._maker(update.operands[1])
        if made.opcode == "parameter" and instruction.opcode == "fusion":
            made = self._maker(instruction.operands[made.proto.parameter_number])
        named = self._named(made)
        return named if named and "dynamic_update" not in named.op_name else instruction

    def _named(self, instruction: hlo.Instruction) -> hlo.Instruction | None:
        """The instruction whose path names the origin of a value."""
        for candidate in (instruction, *reversed(self._inside(instruction))):
            if candidate.op_name and not candidate.op_name.endswith("closed_call"):
                return candidate
        return None

    def _inside(self, instruction: hlo.Instruction) -> list[hlo.Instruction]:
        """The instructions of a fusion; any other instruction by itself."""
        if instruction.opcode != "fusion":
            return [instruction]
        return list(self.module.computations[instruction.called[0]].instructions.values())

    def _is_older(self, instruction: hlo.Instruction) -> bool:
        """True if a value is a copy of the optimizer's state, or the forward pass made it, at first
        or again for the backward pass.

        Zeros may be named by either pass, wherever they are added to.
        """
        made = self._maker(instruction.name)
        if made.op_name.startswith("state.opt_state"):
            return True
        inside = [i for i in self._inside(made) if not _only_moves(i)]
        if all(i.opcode == "broadcast" for i in inside):
            return False
        names = [i.op_name for i in ([made] if made.op_name else inside)]
        names = [name for name in names if _MODULE.search(name)]
        return bool(names) and all(
            "transpose(" not in name or "rematted_computation" in name for name in names
        )

    def _maker(self, name: str, depth: int = 0) -> hlo.Instruction:
        """The instruction that made a value which others may have moved, also out of a loop."""
        instruction, computation = self.module.instructions[name]
        source = instruction.operands[0] if instruction.operands else ""
        if instruction.opcode == "get-tuple-element":
            loop = computation.operand(instruction)
            if loop.opcode != "while":
                return instruction
            root = self.module.computations[loop.called[0]].root
            source = root.operands[instruction.index] if root.opcode == "tuple" else ""
        elif instruction.opcode == "fusion" and not instruction.op_name:
            if not all(_only_moves(i) for i in self._inside(instruction)):
                return instruction
        elif instruction.opcode not in _MOVES:
            return instruction
        if source not in self.module.instructions or depth > 40:
            return instruction
        return self._maker(source, depth + 1)

    def _is_backward(self, instruction: hlo.Instruction) -> bool:
        """True for a product of the backward pass. Its other operations do not count: zeros to add
        gradients to, or an operand in another layout, may be made at the very start.
        """
        return any(
            "transpose(jvp(" in i.op_name
            and (i.opcode in ("dot", "convolution") or i.op_name.endswith("dot_general"))
            for i in self._inside(instruction)
            if i.opcode in ("dot", "convolution", "custom-call")
        ) or (_is_kernel(instruction) and "transpose(jvp(" in instruction.op_name)

    def _is_parameter(self, name: str, depth: int = 0) -> bool:
        """True if a value is a parameter, moved, gathered or cast."""
        if name not in self.module.instructions or depth > 40:
            return False
        instruction, computation = self.module.instructions[name]
        if instruction.opcode == "parameter":
            return computation is self.module.entry and self._named_parameter(instruction)
        if instruction.opcode == "get-tuple-element":
            holder = computation.operand(instruction)
            if holder.opcode == "parameter" and computation.name in self._loops:
                loop, outside = self._loops[computation.name]
                initial = outside.operand(loop)
                if initial.opcode != "tuple" or not self._is_invariant(
                    computation, instruction.index
                ):
                    return False
                return self._is_parameter(initial.operands[instruction.index], depth + 1)
            return holder.opcode == "copy-start" and self._is_parameter(holder.name, depth + 1)
        if instruction.opcode in _MOVES:
            return self._is_parameter(instruction.operands[0], depth + 1)
        if instruction.opcode == "fusion":
            inner = self.module.computations[instruction.called[0]]
            if not all(_only_moves(i) for i in inner.instructions.values()):
                return False
            large = [o for o in instruction.operands if _elements(computation, o) > 1]
            return bool(large) and all(self._is_parameter(o, depth + 1) for o in large)
        return False

    def _is_invariant(self, body: hlo.Computation, index: int) -> bool:
        """True if a loop passes part `index` of its carry on unchanged."""
        if body.root.opcode != "tuple":
            return False
        handed = body.operand(body.root, index)
        return handed.opcode == "get-tuple-element" and handed.index == index

    def _named_parameter(self, instruction: hlo.Instruction) -> bool:
        return instruction.op_name.startswith(("state.params", "params"))


def _is_activation(instruction: hlo.Instruction) -> bool:
    """True for an elementwise operation of a module: on activations, whatever their shape."""
    last = instruction.op_name.rpartition("/")[2]
    return "/layers/" in instruction.op_name and last in _ELEMENTWISE


def _is_kernel(instruction: hlo.Instruction) -> bool:
    return any(name in instruction.target for name in KERNELS)


def _only_moves(instruction: hlo.Instruction) -> bool:
    return instruction.opcode in _MOVES | {"parameter", "constant", "fusion", "tuple", "iota"}


def _elements(computation: hlo.Computation, name: str) -> int:
    found = computation.instructions.get(name)
    return max((math.prod(s.dims) for s in found.shapes), default=0) if found else 0


def _parts(whole: tuple[int, ...], shard: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Shapes, without order and ones, of a parameter with any of its sharded dimensions whole,
    and of one of its slices along the first: a layer.
    """
    parts = set()
    for dims in itertools.product(*({a, b} for a, b in zip(whole, shard, strict=True))):
        for kept in (dims, dims[1:]) if len(dims) > 2 else (dims,):
            parts.add(tuple(sorted(d for d in kept if d > 1)))
    return parts
