"""The work of a device in a step: FLOPs of its products, and bytes between HBM and the chip."""

from __future__ import annotations

import dataclasses
import json
import math

from lm.planning import hlo
from lm.planning.hlo import Computation, Instruction, Module

_FREE_OPCODES = """
    parameter constant tuple get-tuple-element bitcast while conditional call after-all
    partition-id replica-id copy-done async-done iota all-gather-done all-reduce-done
    collective-permute-done async-start async-update opt-barrier add-dependency send-done
    recv-done
"""
_FREE = frozenset(_FREE_OPCODES.split())  # move no bytes
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Work:
    flops: float  # of products, rematerialization included
    unknown: tuple[str, ...]  # kernels that don't say how much they compute
    hbm_bytes: float
    loops: tuple[str, ...] = ()  # that end on data, as far as the program tells: counted once


def count_flops_and_hbm_bytes(module: Module) -> Work:
    """The work of one device in a step, trip counts multiplied in."""
    total, moved = 0.0, 0.0
    unknown: dict[str, None] = {}
    loops: dict[str, None] = {}
    for visit in module.walk():
        if not visit.times:
            continue
        instruction, computation = visit.instruction, visit.computation
        if instruction.opcode == "while" and module.trip_count(instruction, computation) is None:
            loops[visit.op_name or instruction.name] = None
        count = flops(instruction, computation)
        if count is None:
            unknown[visit.op_name or instruction.target] = None
        else:
            total += visit.times * count
        if visit.outer is None:
            moved += visit.times * _hbm_traffic(instruction, computation, module)
    return Work(total, tuple(unknown), moved, tuple(loops))


def flops(instruction: Instruction, computation: Computation) -> float | None:
    """FLOPs of one run of an instruction, 2 for a product and its addition; None: a kernel that
    doesn't say.
    """
    opcode = instruction.opcode
    if opcode == "dot":
        left = computation.operand(instruction).shapes[0]
        inner = instruction.proto.dot_dimension_numbers.lhs_contracting_dimensions
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(left.dims[i] for i in inner)
    if opcode == "convolution":
        return _convolution(instruction, computation)
    if opcode == "custom-call":
        return _custom_call(instruction, computation)
    return 0.0


def _convolution(instruction: Instruction, computation: Computation) -> float:
    """The TPU compiler writes products as convolutions, with batch dimensions as space in which
    most taps of the window meet padding: only those that meet an element count.
    """
    labels = instruction.proto.convolution_dimension_numbers
    left = computation.operand(instruction, 0).shapes[0].dims
    right = computation.operand(instruction, 1).shapes[0].dims
    out = instruction.shapes[0].dims
    valid = 1
    for i, window in enumerate(instruction.proto.window.dimensions):
        valid *= _valid_window_positions(
            left[labels.input_spatial_dimensions[i]],
            right[labels.kernel_spatial_dimensions[i]],
            out[labels.output_spatial_dimensions[i]],
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
    if (stride, low, spread, dilate) == (1, 0, 1, 1) and out + kernel - 1 <= size:
        return out * kernel
    reach = (size - 1) * spread
    count = 0
    for tap in range(kernel):
        for o in range(out):
            at = o * stride + tap * dilate - low
            count += 0 <= at <= reach and at % spread == 0
    return count


def _custom_call(instruction: Instruction, computation: Computation) -> float | None:
    """FLOPs that a Pallas kernel declares, or that follow from the shapes of cuBLAS and cuDNN."""
    target = instruction.target
    declared = instruction.config.get("custom_call_config", {}).get("cost_estimate", {})
    if "flops" in declared:
        return float(declared["flops"])
    if target.startswith("__cublas"):
        dims = instruction.config["gemm_backend_config"]["dot_dimension_numbers"]
        left = computation.operand(instruction).shapes[0].dims
        inner = [int(i) for i in dims["lhs_contracting_dimensions"]]
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(left[i] for i in inner)
    if target.startswith("__cudnn$fmha"):
        # q and k: [B, T, N, H] in the layout of cuDNN; scores and values, each 2 B N T S H
        q = computation.operand(instruction, 0).shapes[0].dims
        k = computation.operand(instruction, 1).shapes[0].dims
        scores = 2.0 * math.prod(q) * k[-3]
        return scores * (5 if "Backward" in target else 2)
    if target == "tpu_custom_call" and instruction.name.startswith("splash_"):
        return _splash(instruction, computation)
    return None if any(n in target for n in ("tpu_custom_call", "triton")) else 0.0


# Products of [T, H] and [T, S] matrices of each kernel; the suffix of its block sizes.
_SPLASH = {"_fwd": (2, ""), "_dq": (3, "_dq"), "_dkv": (4, "_dkv")}


def _splash(instruction: Instruction, computation: Computation) -> float | None:
    """FLOPs of the blocks that a splash attention kernel works on. Where a row of blocks may be as
    long as the keys, attention is taken to be causal, and half of them are masked. The compiler
    omits the first dimension of a single row.
    """
    kinds = [kind for name, kind in _SPLASH.items() if name in instruction.name]
    operands = [computation.instructions[o].shapes[0] for o in instruction.operands]
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


def _hbm_traffic(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes that one run reads from and writes to HBM; only the slice where it reads or updates a
    slice of an array.
    """
    opcode = instruction.opcode
    if opcode in _FREE or instruction.target == "AllocateBuffer":
        return 0.0
    if opcode == "dynamic-update-slice":
        update = computation.operand(instruction, 1)
        return float(_hbm(update) + (update.bytes if _hbm(instruction) else 0))
    if opcode in _SLICES:
        source = computation.operand(instruction)
        return float((instruction.bytes if _hbm(source) else 0) + _hbm(instruction))
    if opcode == "copy-start":  # (destination, source, a flag)
        return float(sum(s.bytes for s in instruction.shapes[:2] if s.space == hlo.HBM))
    if opcode != "fusion":
        read = sum(
            _hbm(computation.instructions[o])
            for o in instruction.operands
            if o in computation.instructions
        )
        out = _hbm(instruction)
        # what starts a collective returns its input beside its result
        return float(out if opcode.endswith("-start") and out > read else read + out)
    inner = module.computations[instruction.called[0]]
    moved = 0.0
    for i, name in enumerate(instruction.operands):
        operand = computation.instructions[name]
        if _hbm(operand) and i in inner.parameters:
            moved += min(_hbm(operand), _read(inner.parameters[i], inner, module))
    return moved + _written(instruction, inner)


def _hbm(instruction: Instruction) -> int:
    return sum(s.bytes for s in instruction.shapes if s.space == hlo.HBM)


def _read(parameter: Instruction, inner: Computation, module: Module) -> float:
    """Bytes of its parameter that a fused computation reads."""
    total = 0.0
    for user in inner.users[parameter.name]:
        if user.opcode in _SLICES and user.operands[0] == parameter.name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # in place
        elif user.opcode == "bitcast":
            total += _read(user, inner, module)
        elif user.opcode == "fusion":
            nested = module.computations[user.called[0]]
            for i, name in enumerate(user.operands):
                if name == parameter.name:
                    total += _read(nested.parameters[i], nested, module)
        else:
            return parameter.bytes
    return total


def _written(instruction: Instruction, inner: Computation) -> float:
    """Bytes that a fusion writes."""
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[o] for o in inner.root.operands]
    total = 0.0
    for root, shape in zip(roots, instruction.shapes, strict=False):
        if shape.space != hlo.HBM:
            continue
        while root.opcode == "bitcast":
            root = inner.operand(root)
        update = root.opcode == "dynamic-update-slice"
        total += inner.operand(root, 1).bytes if update else shape.bytes
    return total
