"""Matrices in 8 or 4 bits as tensors of compressed-tensors' `pack-quantized` format.

`transformers` reads it with the package compressed-tensors, on a CPU too. A matrix [out, in] of
integers q is `weight_packed`, int32 [out, in * bits / 32], q + 2 ** (bits - 1) from the low bits
up; `weight_scale` is float [out, groups], `weight_shape` the shape. The numbers are q * scale, as
ours. Tables of the vocabulary are written as these products, in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lm.compression.quantized_weights import QuantizedMatrix, WeightFormat
from lm.hf import table
from lm.hf.keys import Json
from lm.hf.table import ParameterSlice
from lm.optim import param_tree
from lm.types import Params

BITS = {"int8": 8, "int4": 4}


def quantization_config(weights: WeightFormat, tensors: Mapping[str, Any]) -> Json:
    """`quantization_config` of config.json; tensors: those that stay floats, by name."""
    bits, in_groups = BITS[weights.name], weights.name == "int4"
    scheme = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group" if in_groups else "channel",
        "group_size": weights.group if in_groups else None,
    }
    ignore = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": sorted({*ignore, "lm_head"}),
    }


def in_layers(params: Params) -> dict[str, QuantizedMatrix]:
    """The matrices inside layers, by name."""
    leaves = param_tree.flatten(params).items()
    return {
        name: x
        for name, x in leaves
        if isinstance(x, QuantizedMatrix) and "layers" in name.split(".")
    }


def check(
    weights: WeightFormat,
    matrices: Mapping[str, QuantizedMatrix],
    model: Any,
    transposed: bool,
    dtype: str,
) -> None:
    """Raise ValueError for what the format cannot hold exactly; matrices: those of `in_layers`."""
    if getattr(model, "parametrization", "standard") != "standard":
        reason = f"config.model.parametrization={model.parametrization} scales weights"
    elif getattr(getattr(model, "moe", None), "num_experts", 0):
        reason = "experts are no torch.nn.Linear in transformers"
    elif not transposed:
        reason = "the format is for torch.nn.Linear, and this family has Conv1D"
    elif dtype != "float32":
        reason = f"scales are float32, and --dtype={dtype} would round them"
    else:
        for name, x in matrices.items():
            size = math.prod(x.inputs)
            if x.packed and size % weights.group:
                raise ValueError(
                    f"{name}: --group ({weights.group}) must divide its {size} inputs in an "
                    "export; choose another one, or --weights=int8"
                )
        return
    raise ValueError(f"--weights={weights.name} can't be exported: {reason}")


def packed_tensors(
    name: str, parts: list[ParameterSlice], leaves: Mapping[str, QuantizedMatrix]
) -> dict[str, np.ndarray]:
    """The tensors in place of the matrix `name`, which holds `parts` of parameters."""
    integers = {part.parameter: _integers(leaves[part.parameter]) for part in parts}
    q = table.join(parts, integers)  # pyright: ignore[reportArgumentType]
    scales = [_scale(part, leaves[part.parameter]) for part in parts]
    stem = name.removesuffix("weight")
    bits = 4 if leaves[parts[0].parameter].packed else 8
    return {
        f"{stem}weight_packed": pack(q, bits),
        f"{stem}weight_scale": np.concatenate(scales, axis=0),
        f"{stem}weight_shape": np.array(q.shape, np.int64),
    }


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """int32 [out, ceil(in * bits / 32)] of integers [out, in], 4 or 8 bits each."""
    each = 32 // bits
    unsigned = (q.astype(np.int64) + (1 << (bits - 1))).astype(np.uint32)
    unsigned = np.pad(unsigned, [(0, 0), (0, -q.shape[1] % each)])
    lanes = unsigned.reshape(q.shape[0], -1, each) << (bits * np.arange(each, dtype=np.uint32))
    return np.bitwise_or.reduce(lanes, axis=-1).view(np.int32)


def _integers(leaf: QuantizedMatrix) -> np.ndarray:
    """The integers, in the parameter's shape."""
    ones = dataclasses.replace(leaf, scale=np.ones(leaf.scale.shape, np.float32))
    return np.asarray(ones.unbox()).astype(np.int8)


def _scale(part: ParameterSlice, leaf: QuantizedMatrix) -> np.ndarray:
    """float32 [out, groups] of a part."""
    scale = np.asarray(leaf.scale)[part.index]
    return scale.reshape(-1 if leaf.packed else 1, part.matrix[-1]).T
