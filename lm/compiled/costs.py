"""The work of a device in a step: FLOPs of its products, and bytes between HBM and the chip."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence

import numpy as np

from lm.compiled import hlo
from lm.compiled.hlo import Instruction, Module

_FREE_OPCODES = """parameter constant tuple get-tuple-element bitcast while conditional call
    after-all partition-id replica-id copy-done async-done iota all-gather-done all-reduce-done
    collective-permute-done async-start async-update opt-barrier add-dependency send-done
    recv-done"""
_FREE = frozenset(_FREE_OPCODES.split())  # move no bytes
_SLICES = ("dynamic-slice", "slice", "gather")
NARROW = ("s8", "f8")  # how the names of types of 8 bits start
# That a Triton kernel declares as metadata, in a backend config that is not JSON but MLIR's.
_DECLARED = re.compile(rb"\\22flops\\22: \\22(\d+)\\22")
_DECLARED_TYPE = re.compile(rb"\\22dtype\\22: \\22int8\\22")
# Of each splash attention kernel: products of [T, H] and [T, S] matrices, suffix of block sizes.
_SPLASH = {"_fwd": (2, ""), "_dq": (3, "_dq"), "_dkv": (4, "_dkv")}


@dataclasses.dataclass(frozen=True)
class Work:
    flops: float  # of products, rematerialization included
    unknown: tuple[str, ...]  # kernels that don't say how much they compute
    hbm_bytes: float
    loops: tuple[str, ...] = ()  # that end on data, as far as the program tells: counted once
    optimizer_flops: float = 0.0  # those of the optimizer's update
    narrow_flops: dict[str, float] = dataclasses.field(default_factory=dict)  # by `narrow_type`


def count_flops_and_hbm_bytes(module: Module) -> Work:
    """The work of one device in a step, trip counts multiplied in."""
    total, moved, optimizer = 0.0, 0.0, 0.0
    unknown: dict[str, None] = {}
    loops: dict[str, None] = {}
    narrow: dict[str, float] = {}
    for visit in hlo.walk(module.entry):
        instruction = visit.instruction
        if not visit.times:
            continue
        if instruction.opcode == "while" and hlo.trip_count(instruction) is None:
            loops[visit.op_name or instruction.name] = None
        count = flops(instruction)
        if count is None:
            unknown[visit.op_name or instruction.target] = None
        elif count:
            total += visit.times * count
            if kind := narrow_type(instruction):
                narrow[kind] = narrow.get(kind, 0.0) + visit.times * count
            if module.source(visit.frame).startswith(hlo.OPTIMIZER):
                optimizer += visit.times * count
        if visit.outer is None:
            moved += visit.times * hbm_traffic(instruction)
    return Work(total, tuple(unknown), moved, tuple(loops), optimizer, narrow)


def flops(instruction: Instruction) -> float | None:
    """FLOPs of one run of an instruction, 2 for a product and its addition; None: a kernel that
    doesn't say.
    """
    if instruction.opcode == "dot":
        dimensions = instruction.proto.dot_dimension_numbers
        return _product(instruction, dimensions.lhs_contracting_dimensions)
    if instruction.opcode == "convolution":
        return _convolution(instruction)
    return _custom_call(instruction) if instruction.opcode == "custom-call" else 0.0


def narrow_type(instruction: Instruction) -> str:
    """s8 or f8 if both operands of a product have a type of 8 bits of that kind, else empty."""
    target, operands = instruction.target, instruction.operands[:2]
    if "triton" in target:
        return "s8" if _DECLARED_TYPE.search(instruction.proto.backend_config) else ""
    if target == "tpu_custom_call" and instruction.name.startswith("ragged-dot-none"):
        operands = instruction.operands[-2:]
    elif instruction.opcode not in ("dot", "convolution") and not target.startswith("__cublas"):
        return ""  # kernels have tables of small integers among their operands
    left, right = (operand.shapes[0].dtype[:2] for operand in operands)
    return left if left == right and left in NARROW else ""


def _product(instruction: Instruction, contracted: Sequence[int]) -> float:
    left = instruction.operands[0].shapes[0].dims
    return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(left[int(i)] for i in contracted)


def _convolution(instruction: Instruction) -> float:
    """The TPU compiler writes products as convolutions, with batch dimensions as space in which
    most taps of the window meet padding: only those that meet an element count.
    """
    labels = instruction.proto.convolution_dimension_numbers
    left, right = (operand.shapes[0].dims for operand in instruction.operands)
    valid = 1
    for i, window in enumerate(instruction.proto.window.dimensions):
        valid *= _valid_window_positions(
            left[labels.input_spatial_dimensions[i]],
            right[labels.kernel_spatial_dimensions[i]],
            instruction.shapes[0].dims[labels.output_spatial_dimensions[i]],
            stride=window.stride,
            low=window.padding_low,
            spread=window.base_dilation,
            dilate=window.window_dilation,
        )
    batch = left[labels.input_batch_dimension] // max(1, instruction.proto.batch_group_count)
    inner = right[labels.kernel_input_feature_dimension]
    return 2.0 * valid * batch * inner * right[labels.kernel_output_feature_dimension]


def _valid_window_positions(
    size: int, kernel: int, out: int, *, stride: int, low: int, spread: int, dilate: int
) -> int:
    """Pairs of an output and a tap of the window that meet an element of the input."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * dilate - low
    return int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))


def _custom_call(instruction: Instruction) -> float | None:
    """FLOPs that a Pallas kernel declares, or that follow from the shapes of cuBLAS and cuDNN."""
    target, config = instruction.target, instruction.config
    declared = config.get("custom_call_config", {}).get("cost_estimate", {})
    if "flops" in declared:
        return float(declared["flops"])
    if "triton" in target and (found := _DECLARED.search(instruction.proto.backend_config)):
        return float(found[1])
    if target.startswith("__cublas"):
        dimensions = config["gemm_backend_config"]["dot_dimension_numbers"]
        return _product(instruction, dimensions["lhs_contracting_dimensions"])
    if target.startswith("__cudnn$fmha"):
        # q and k: [B, T, N, H] in the layout of cuDNN; scores and values, each 2 B N T S H
        q, k = (operand.shapes[0].dims for operand in instruction.operands[:2])
        return 2.0 * math.prod(q) * k[-3] * (5 if "Backward" in target else 2)
    if target == "tpu_custom_call" and instruction.name.startswith("splash_"):
        return _splash(instruction)
    return None if any(n in target for n in ("tpu_custom_call", "triton")) else 0.0


def _splash(instruction: Instruction) -> float | None:
    """FLOPs of the blocks that a splash attention kernel works on. Where a row of blocks may be as
    long as the keys, attention is taken to be causal, and half of them are masked. The compiler
    omits the first dimension of a single row.
    """
    kinds = [kind for name, kind in _SPLASH.items() if name in instruction.name]
    operands = [operand.shapes[0] for operand in instruction.operands]
    streams = [s.dims for s in operands if len(s.dims) >= 3 and s.dtype in ("bf16", "f32")]
    tables = [s.dims for s in operands if len(s.dims) == 3 and s.dtype in ("s8", "s16", "s32")]
    if len(kinds) != 1 or len(streams) < 2 or not tables:
        return None
    (products, suffix), (q, k) = kinds[0], streams[:2]
    noted = instruction.attributes.get("kernel_metadata", "{}")
    blocks = json.loads(json.loads(noted).get("xprof_metadata", "{}"))
    block_q, block_kv = blocks.get(f"block_q{suffix}"), blocks.get(f"block_kv{suffix}")
    if not block_q or not block_kv:
        return None
    *heads, length, size = q  # [B, N], or [N]
    rows, columns = length // block_q, k[-2] // block_kv
    seen = math.prod(tables[0][1:])
    if seen >= rows * columns:
        seen = (rows * columns + max(rows, columns)) / 2
    return 2.0 * products * math.prod(heads) * size * seen * block_q * block_kv


def hbm_traffic(instruction: Instruction) -> int:
    """Bytes that one run reads from and writes to HBM; only the slice where it reads or updates a
    slice of an array.
    """
    opcode, operands, written = instruction.opcode, instruction.operands, instruction.hbm_bytes
    if opcode in _FREE or instruction.target == "AllocateBuffer":
        return 0
    if opcode == "dynamic-update-slice":
        return operands[1].hbm_bytes + (operands[1].bytes if written else 0)
    if opcode in _SLICES:
        return (instruction.bytes if operands[0].hbm_bytes else 0) + written
    if opcode == "copy-start":  # (destination, source, a flag)
        return sum(s.bytes for s in instruction.shapes[:2] if s.space == hlo.HBM)
    if opcode == "fusion":
        inner = instruction.called[0].parameters
        sizes = [(operand.hbm_bytes, inner[i]) for i, operand in enumerate(operands)]
        return _written(instruction) + sum(min(n, _read(p)) for n, p in sizes if n)
    read = sum(operand.hbm_bytes for operand in operands)
    # what starts a collective returns its input beside its result
    return written if opcode.endswith("-start") and written > read else read + written


def _read(value: Instruction) -> int:
    """Bytes that a fused computation reads of its parameter, or of a bitcast of that."""
    total = 0
    for user in value.users:
        is_first = user.operands[0] is value
        if user.opcode in _SLICES and is_first:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and is_first:
            continue  # in place
        elif user.opcode == "bitcast":
            total += _read(user)
        elif user.opcode == "fusion":
            inner = user.called[0].parameters
            total += sum(_read(inner[i]) for i, o in enumerate(user.operands) if o is value)
        else:
            return value.bytes
    return total


def _written(fusion: Instruction) -> int:
    """Bytes that a fusion writes."""
    root, total = fusion.called[0].root, 0
    parts = root.operands if root.opcode == "tuple" else (root,)
    for part, shape in zip(parts, fusion.shapes, strict=False):
        if shape.space != hlo.HBM:
            continue
        while part.opcode == "bitcast":
            part = part.operands[0]
        is_update = part.opcode == "dynamic-update-slice"
        total += part.operands[1].bytes if is_update else shape.bytes
    return total
