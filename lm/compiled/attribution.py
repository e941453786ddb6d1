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

from lm.compiled.buffers import Buffer
from lm.compiled.hlo import Instruction, Module

KERNELS = ("tpu_custom_call", "__cudnn", "__cublas", "triton", "mosaic")
ARGUMENTS = {  # groups of the arguments whose path starts so; the others are the batch
    "state.params": "parameters",
    "params": "parameters",
    "state.opt_state": "optimizer",
    "state.teacher": "teacher",
    "state.cache": "cache",
}
_MOVE_OPCODES = """copy bitcast convert copy-start copy-done transpose reshape slice dynamic-slice
    all-gather all-gather-start all-gather-done"""
_MOVES = frozenset(_MOVE_OPCODES.split())
_ELEMENTWISE = ("mul", "add_any", "exp", "logistic", "div")
_MODULE = re.compile(r"\bjvp\(|/layers/|\.run/")  # in the path of an operation of the model
_HOLDERS = ("parameter", "while", "tuple", "get-tuple-element", "conditional", "call")
_MAX_DEPTH = 40  # of moves of a value, which a loop may hand on to itself


def argument_group(path: str) -> str:
    """The group of an argument of the step."""
    return next((group for start, group in ARGUMENTS.items() if path.startswith(start)), "batch")


class Attribution:
    """The purpose of the buffers in a program's heap."""

    def __init__(
        self, module: Module, parameters: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> None:
        """parameters: (global shape, shape of a shard) of every parameter."""
        self._module = module
        instructions = module.instructions.values()
        self._loops = {loop.called[0]: loop for loop in instructions if loop.opcode == "while"}
        self._gradient_shapes = {s for p in parameters for s in _parts(*p)}
        scheduled = (i for i in instructions if i.name in module.schedule)
        backward = [module.schedule[i.name] for i in scheduled if _is_backward(i)]
        self._first_backward = min(backward, default=math.inf)
        self._last_backward = max(backward, default=-math.inf)

    def group(self, buffer: Buffer) -> str:
        """The group of a buffer in the heap."""
        makers = _makers(buffer)
        if any(m.opcode == "custom-call" and _is_kernel(m) for m in makers):
            return "kernels"
        if makers and all(self._is_parameter(m) for m in makers):
            return "parameter copies"
        if makers and all(m.op_name.startswith("state.opt_state") for m in makers):
            return "optimizer"
        dims = tuple(sorted(d for d in buffer.shape.dims if d > 1)) if buffer.shape else ()
        if (
            dims in self._gradient_shapes
            and buffer.start <= self._last_backward
            and not any(_is_activation(m) or _is_older(m) for m in makers)
        ):
            return "gradients"
        if buffer.start < self._first_backward <= buffer.stop:
            return "saved activations"
        return "temporaries"

    def describe(self, buffer: Buffer) -> tuple[str, str]:
        """(operation, FILE:LINE) that made a buffer: of several the one that updates it in a loop,
        since the first only allocates.
        """
        found = [n for m in _makers(buffer) if (n := _named(_written(m)))]
        found = found or [w for w in buffer.writers if w.op_name]
        if not found:
            return "", ""
        chosen = max(found, key=lambda m: ("while/body" in m.op_name, len(m.op_name)))
        return chosen.op_name, self._module.source(chosen.frame)

    def _is_parameter(self, instruction: Instruction, depth: int = 0) -> bool:
        """True if a value is a parameter, moved, gathered or cast."""
        if depth > _MAX_DEPTH:
            return False
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            is_argument = instruction.computation is self._module.entry
            group = argument_group(instruction.op_name)
            return is_argument and group in ("parameters", "teacher")
        if opcode == "get-tuple-element":
            [holder] = operands
            loop = self._loops.get(instruction.computation)
            if holder.opcode == "parameter" and loop is not None:
                [initial], body, index = loop.operands, loop.called[0].root, instruction.index
                if {initial.opcode, body.opcode} != {"tuple"}:
                    return False
                handed = body.operands[index]
                is_invariant = handed.opcode == "get-tuple-element" and handed.index == index
                return is_invariant and self._is_parameter(initial.operands[index], depth + 1)
            return holder.opcode == "copy-start" and self._is_parameter(holder, depth + 1)
        if opcode in _MOVES:
            return self._is_parameter(operands[0], depth + 1)
        if opcode == "fusion" and all(_only_moves(i) for i in _inside(instruction)):
            large = [o for o in operands if any(math.prod(s.dims) > 1 for s in o.shapes)]
            return bool(large) and all(self._is_parameter(o, depth + 1) for o in large)
        return False


def _makers(buffer: Buffer) -> list[Instruction]:
    """The instructions that write a buffer, without those that only hand it on."""
    return [writer for writer in buffer.writers if writer.opcode not in _HOLDERS]


def _inside(instruction: Instruction) -> list[Instruction]:
    """The instructions of a fusion; any other instruction by itself."""
    is_fusion = instruction.opcode == "fusion"
    return instruction.called[0].instructions if is_fusion else [instruction]


def _named(instruction: Instruction) -> Instruction | None:
    """The instruction whose path names the origin of a value."""
    candidates = (instruction, *reversed(_inside(instruction)))
    named = (i for i in candidates if i.op_name and not i.op_name.endswith("closed_call"))
    return next(named, None)


def _written(instruction: Instruction) -> Instruction:
    """The maker of the values that an instruction puts into its buffer, for example layer by layer;
    itself where it makes them.
    """
    instruction = instruction if instruction.op_name else _maker(instruction)
    updates = (i for i in _inside(instruction) if i.opcode == "dynamic-update-slice")
    update = next(updates, None)
    if update is None:
        return instruction
    made = _maker(update.operands[1])
    if made.opcode == "parameter" and instruction.opcode == "fusion":
        made = _maker(instruction.operands[made.proto.parameter_number])
    named = _named(made)
    return named if named and "dynamic_update" not in named.op_name else instruction


def _maker(instruction: Instruction) -> Instruction:
    """The instruction that made a value which others may have moved, also out of a loop."""
    for _ in range(_MAX_DEPTH + 1):
        source = _source(instruction)
        if source is None:
            break
        instruction = source
    return instruction


def _source(instruction: Instruction) -> Instruction | None:
    """The value that an instruction moves; None if it makes one."""
    operands = instruction.operands
    if instruction.opcode == "get-tuple-element":
        [loop] = operands
        root = loop.called[0].root if loop.opcode == "while" else None
        return root.operands[instruction.index] if root and root.opcode == "tuple" else None
    if instruction.opcode == "fusion":
        moves = not instruction.op_name and all(_only_moves(i) for i in _inside(instruction))
    else:
        moves = instruction.opcode in _MOVES
    return operands[0] if moves and operands else None


def _is_older(instruction: Instruction) -> bool:
    """True if a value is a copy of the optimizer's state, or the forward pass made it, at first or
    again for the backward pass.

    Zeros may be named by either pass, wherever they are added to.
    """
    made = _maker(instruction)
    if made.op_name.startswith("state.opt_state"):
        return True
    inside = [i for i in _inside(made) if not _only_moves(i)]
    if all(i.opcode == "broadcast" for i in inside):
        return False
    names = [i.op_name for i in ([made] if made.op_name else inside)]
    names = [name for name in names if _MODULE.search(name)]
    return bool(names) and all(
        "transpose(" not in name or "rematted_computation" in name for name in names
    )


def _is_backward(instruction: Instruction) -> bool:
    """True for a product of the backward pass. Its other operations do not count: zeros to add
    gradients to, or an operand in another layout, may be made at the very start.
    """
    if _is_kernel(instruction) and "transpose(jvp(" in instruction.op_name:
        return True
    return any(
        "transpose(jvp(" in i.op_name
        and (
            i.opcode in ("dot", "convolution")
            or (i.opcode == "custom-call" and i.op_name.endswith("dot_general"))
        )
        for i in _inside(instruction)
    )


def _is_activation(instruction: Instruction) -> bool:
    """True for an elementwise operation of a module: on activations, whatever their shape."""
    last = instruction.op_name.rpartition("/")[2]
    return "/layers/" in instruction.op_name and last in _ELEMENTWISE


def _is_kernel(instruction: Instruction) -> bool:
    return any(name in instruction.target for name in KERNELS)


def _only_moves(instruction: Instruction) -> bool:
    return instruction.opcode in _MOVES | {"parameter", "constant", "fusion", "tuple", "iota"}


def _parts(whole: tuple[int, ...], shard: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Shapes, without order and ones, of a parameter with any of its sharded dimensions whole,
    and of one of its slices along the first: a layer.
    """
    parts = set()
    for dims in itertools.product(*({a, b} for a, b in zip(whole, shard, strict=True))):
        for kept in (dims, dims[1:]) if len(dims) > 2 else (dims,):
            parts.add(tuple(sorted(d for d in kept if d > 1)))
    return parts
