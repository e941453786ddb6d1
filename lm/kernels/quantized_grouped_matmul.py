"""Products of experts in 8 or 4 bits: those of `lm.kernels.quantization`, for each expert alone.

Rows have a scale each, matrices one for each expert and column, and so have gradients where rows
are summed over; with scales=tensor the rows of an expert share one, and its matrix has one. Rows
beyond the groups, and padding, are in no scale.

The scales are those of the rows that a device multiplies at once: with experts on several devices,
or in several parts or passes, gradients of matrices are sums of products that are rounded each by
its own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels.grouped_matmul import (
    group_of_rows,
    largest_by_group,
    matrices_by_group,
    of_rows,
    rows_by_group,
)
from lm.kernels.quantization import (
    CALIBRATIONS,
    TYPES,
    Operand,
    QuantizationConfig,
    quantize,
    quantized_product,
)
from lm.types import Array


def quantized_by_expert(config: QuantizationConfig, rows: Array, weight: Array) -> jax.Array:
    """rows: [B, E, C, D] times the matrix of their expert, [E, D, F] -> [B, E, C, F]."""
    product = functools.partial(quantized_product, config)
    return jax.vmap(product, in_axes=(1, 0), out_axes=1)(rows, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def quantized_grouped_matmul(
    config: QuantizationConfig, platform: str, load: float, x: Array, weights: Array, sizes: Array
) -> jax.Array:
    """As `grouped_matmul`: x: [R, D] in groups of `sizes` [G], times weights: [G, D, F] -> [R, F].

    On TPUs the gradient of the weights is a product in the compute type: neither the kernel for it
    nor XLA multiplies 8 bits there, but for a dense product of all rows with every group.
    """
    return _forward(config, platform, load, x, weights, sizes)[0]


def _forward(
    config: QuantizationConfig, platform: str, load: float, x: Array, weights: Array, sizes: Array
) -> tuple[jax.Array, tuple[Operand, Operand, Array]]:
    a, b = _rows(config, x, sizes), _matrices(config, weights, 0)
    if config.block > 1:  # which lie along other dimensions in the backward pass
        return rows_by_group(platform, load, a, b, sizes), (x, weights, sizes)
    scales = a.scale[:, 0], jnp.broadcast_to(b.scale[:, 0], (b.shape[0], b.shape[2]))
    how = {"scales": scales, "dtype": x.dtype}
    y = rows_by_group(platform, load, a.qvalue, b.qvalue, sizes, **how)
    rounds = config.weight_gradients and platform != "tpu"
    return y, (a if rounds else x, b, sizes)


def _backward(
    config: QuantizationConfig,
    platform: str,
    load: float,
    kept: tuple[Operand, Operand, Array],
    dy: jax.Array,
) -> tuple[Array, Array, None]:
    x, weights, sizes = kept
    if config.block > 1:
        grad = _rows(config, dy, sizes, is_gradient=True)
        weights = _matrices(config, weights, 1)
        dx = rows_by_group(platform, load, grad, weights, sizes, transposed=True)
    else:  # the scales of what the forward pass has quantized move to dy
        wide = dy.astype(jnp.float32) * of_rows(weights.scale[:, 0], sizes, dy.shape[0])
        grad = _rows(config, wide, sizes, is_gradient=True)
        how = {"transposed": True, "scales": (grad.scale[:, 0],), "dtype": dy.dtype}
        dx = rows_by_group(platform, load, grad.qvalue, weights.qvalue, sizes, **how)
    if isinstance(x, jax.Array):
        d_weights = matrices_by_group(platform, load, x, dy, sizes)
        return dx, d_weights.astype(dy.dtype), None
    largest = largest_by_group(platform, dy, x.scale[:, 0], sizes)
    if config.scales == "tensor":
        largest = jnp.max(largest, axis=1, keepdims=True)
    wide = dy.astype(jnp.float32) * x.scale
    value, scale = _by_group(config, wide, largest, sizes, is_gradient=True)
    d_weights = matrices_by_group(platform, load, x.qvalue, value, sizes) * scale[:, None]
    return dx, d_weights.astype(dy.dtype), None


quantized_grouped_matmul.defvjp(_forward, _backward)


def _matrices(config: QuantizationConfig, weights: Array, summed: int) -> Operand:
    return jax.vmap(lambda matrix: quantize(config, matrix, (summed,)))(weights)


def _rows(config: QuantizationConfig, x: Array, sizes: Array, is_gradient: bool = False) -> Operand:
    """x: [R, D] as an operand of a product that sums over its columns."""
    if config.block == 1 and config.scales == "row":
        return quantize(config, x, (1,), is_gradient)
    groups = group_of_rows(sizes, x.shape[0])[:, None]
    if config.block > 1:  # nvfp4 has a scale of the tensor, too
        return quantize(config, jnp.where(groups < sizes.shape[0], x, 0), (1,), is_gradient)
    import qwix  # imported here: only quantized runs need it

    of_row = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1, keepdims=True)
    mine = groups == jnp.arange(sizes.shape[0])
    largest = jnp.max(jnp.where(mine, of_row, 0), axis=0)[:, None]
    value, scale = _by_group(config, x, largest, sizes, is_gradient)
    return qwix.QArray(value, jnp.broadcast_to(of_rows(scale, sizes, len(x)), (len(x), 1)))


def _by_group(
    config: QuantizationConfig, x: Array, largest: Array, sizes: Array, is_gradient: bool
) -> tuple[jax.Array, jax.Array]:
    """x: [R, F] divided by scales that the rows of a group share, and rounded, and these scales: of
    the shape of the largest magnitudes, [G, F] or [G, 1].
    """
    import qwix  # imported here: only quantized runs need it

    qtype: Any = TYPES[config.format][is_gradient]
    how = {"channelwise_axes": (0, 1), "calibration_method": CALIBRATIONS[config.format]}
    scale = qwix.quantize(largest, qtype, **how).scale
    value = x.astype(jnp.float32) / of_rows(scale, sizes, x.shape[0])
    if config.format == "int8":
        return jnp.round(value).astype(qtype), scale
    limit = float(jnp.finfo(qtype).max)
    return jnp.clip(value, -limit, limit).astype(qtype), scale
