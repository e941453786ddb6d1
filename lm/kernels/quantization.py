"""Products of matrices in 8 or 4 bits (qwix), forward and backward.

Each operand is divided by a scale, the largest magnitude of what shares it over the largest number
of the format, and rounded to nearest. The gradient of the output is an operand of both products of
the backward pass; rounding passes gradients through unchanged.

    int8    integers of up to 127, summed as int32 (arXiv:1712.05877)
    fp8     e4m3, and e5m2 for gradients (arXiv:2209.05433)
    mxfp8   e4m3 in blocks of 32 with a power of two each (arXiv:2310.10537)
    nvfp4   e2m1 in blocks of 16 with an e4m3 scale each, and a scale of the tensor
            (arXiv:2509.25149), here a power of two; rounded to nearest, gradients too

Blocks lie along the dimension that is summed over. Formats in blocks are emulated: their operands
are rounded to numbers of the format, which the compute type holds exactly, and multiplied in it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from lm.config.fields import field
from lm.types import Array

# of the operands of the forward pass, and of the gradients
TYPES: dict[str, tuple[Any, Any]] = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
    "mxfp8": ("mxfp8", "mxfp8"),
    "nvfp4": ("nvfp4", "nvfp4"),
}
# qwix divides by 127.5, so that the largest number is a tie of 127 and what is out of range
CALIBRATIONS = {"int8": f"absmax,{127.5 / 127}", "fp8": "absmax"}
BLOCKS = {"mxfp8": 32, "nvfp4": 16}  # numbers that share a scale
NVFP4_MAX = 448.0 * 6.0  # the largest scale of a block times the largest number in it
SCALES = ("row", "tensor")

Operand: TypeAlias = Any  # Array or qwix.QArray


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    format: str = field(
        "none",
        "Format of the products of the layers' matrices: int8, fp8 (e4m3, gradients e5m2), or, "
        "emulated, mxfp8 or nvfp4.",
        choices=("none", *TYPES),
    )
    scales: str = field(
        "row",
        "int8 and fp8: a scale for each row and column of a product, or one for each tensor.",
        choices=SCALES,
    )
    weight_gradients: bool = field(
        True, "The products that are gradients of weights, too; False: those in the compute type."
    )

    @property
    def block(self) -> int:
        """Numbers that share a scale along the dimension summed over; 1: no blocks."""
        return BLOCKS.get(self.format, 1)

    def check_length(self, length: int, path: str) -> None:
        """Raise ValueError unless rows of this length, the value of the config path, are blocks."""
        if self.weight_gradients and length % self.block:
            raise ValueError(
                f"{path} ({length}) must be divisible by the {self.block} numbers that share a "
                f"scale of config.model.quantization.format={self.format}, or "
                "config.model.quantization.weight_gradients be False"
            )


NO_QUANTIZATION = QuantizationConfig()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_product(
    config: QuantizationConfig, x: Array, weight: Array, total: Array | None = None
) -> jax.Array:
    """x: [..., D] times weight: [D, F] -> [..., F], in the type of both.

    total: the parameter that receives the gradient in weight's place, as in `linear.product`.
    """
    operands = quantize(config, x, (x.ndim - 1,)), quantize(config, weight, (0,))
    return _product(*operands, ((x.ndim - 1,), (0,)), x.dtype)


def quantize(
    config: QuantizationConfig, x: Array, summed: tuple[int, ...], is_gradient: bool = False
) -> Operand:
    """x as an operand of a product that sums over these dimensions."""
    import qwix  # imported here: only quantized runs need it

    qtype = TYPES[config.format][is_gradient]
    rows = tuple(i for i in range(x.ndim) if i not in summed)
    wide = x.astype(jnp.float32)  # so that scales are float32
    if config.block == 1:
        rows = rows if config.scales == "row" else ()
        how = CALIBRATIONS[config.format]
        return qwix.quantize(wide, qtype, channelwise_axes=rows, calibration_method=how)
    scale = jnp.float32(1)
    if config.format == "nvfp4":  # into the range of e4m3, in which the scales of blocks are
        largest = jnp.maximum(jnp.max(jnp.abs(wide)), jnp.finfo(jnp.float32).tiny * NVFP4_MAX)
        scale = jnp.ldexp(jnp.float32(1), jnp.frexp(largest / NVFP4_MAX)[1])
    blocks = {summed[-1]: config.block}
    rounded = qwix.quantize(wide / scale, qtype, channelwise_axes=rows, tiled_axes=blocks)
    return (qwix.dequantize(rounded) * scale).astype(x.dtype)


def _product(
    a: Operand, b: Operand, summed: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any
) -> jax.Array:
    import qwix

    y = qwix.dot_general(a, b, (summed, ((), ())), preferred_element_type=dtype)
    return y.astype(dtype)


Kept: TypeAlias = tuple[Operand | None, Operand | None, bool]  # x, weight, has a total


def _forward(
    config: QuantizationConfig,
    x: CustomVJPPrimal,
    weight: CustomVJPPrimal,
    total: CustomVJPPrimal | None = None,
) -> tuple[jax.Array, Kept]:
    last = x.value.ndim - 1
    a, b = quantize(config, x.value, (last,)), quantize(config, weight.value, (0,))
    y = _product(a, b, ((last,), (0,)), x.value.dtype)
    in_blocks = config.block > 1  # along the dimension that the forward pass sums over
    kept_x = a if config.weight_gradients and not in_blocks else x.value
    kept_weight = weight.value if in_blocks else b
    # what is frozen is spared the product that would be its gradient
    kept = kept_x if weight.perturbed else None, kept_weight if x.perturbed else None
    return y, (*kept, total is not None)


def _gradient(
    config: QuantizationConfig, dy: Array, other: Operand, summed: tuple[int, ...]
) -> tuple[Operand, Operand]:
    """dy: [..., F] and the other operand of a product of the backward pass. The scales of one that
    the forward pass has quantized lie along dimensions that are now summed over: they move to dy.
    """
    if config.block > 1:
        return quantize(config, dy, summed, is_gradient=True), other
    dy = dy.astype(jnp.float32) * other.scale
    return quantize(config, dy, summed, is_gradient=True), other.qvalue


def _backward(
    config: QuantizationConfig, kept: Kept, dy: Array | SymbolicZero
) -> tuple[Array | None, Array | None, Array | None]:
    x, weight, in_total = kept
    if isinstance(dy, SymbolicZero):
        return None, None, None
    dx = d_weight = None
    last, rows = dy.ndim - 1, tuple(range(dy.ndim - 1))
    if weight is not None:
        if config.block > 1:
            weight = quantize(config, weight, (1,))
        grad, weight = _gradient(config, dy, weight, (last,))
        dx = _product(grad, weight, ((last,), (1,)), dy.dtype)
    if x is not None:
        grad = dy
        if config.weight_gradients:
            if config.block > 1:
                x = quantize(config, x, rows)
            grad, x = _gradient(config, dy, x, rows)
        d_weight = _product(x, grad, (rows, rows), jnp.float32 if in_total else dy.dtype)
    return (dx, None, d_weight) if in_total else (dx, d_weight, None)


quantized_product.defvjp(_forward, _backward, symbolic_zeros=True)
