"""Check of the grouped products of experts: rows beyond the groups have no effect, all else agrees
with a loop over groups; with quantization, of the quantized product of each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lm.kernels.grouped_matmul import grouped_matmul
from lm.kernels.quantization import NO_QUANTIZATION, QuantizationConfig, quantized_product
from lm.kernels.quantized_grouped_matmul import quantized_grouped_matmul
from lm.parallel.sharding import Rules
from lm.reliability.reference import compare
from lm.types import Array

# Rows of groups: less than a tile of a kernel, none, more than one tile, and a tile exactly.
SIZES = (3, 0, 300, 128, 81, 0)
ROWS, WIDTH, OUT = 640, 256, 384  # 128 rows of no group


def check_experts(
    dtype: jnp.dtype, rules: Rules, quantization: QuantizationConfig = NO_QUANTIZATION
) -> float:
    """The largest difference of a product and its gradients, as a fraction of the allowed one.

    Raises:
        SelfCheckFailed: a difference is too large.
    """
    rng = np.random.default_rng(0)
    shapes = (ROWS, WIDTH), (len(SIZES), WIDTH, OUT), (ROWS, OUT)
    x, weights, dy = (rng.standard_normal(shape, np.float32) for shape in shapes)
    count, ends = sum(SIZES), np.cumsum(SIZES)
    x[count:], dy[count:] = 1e4, 1e4
    x, weights, dy = (a.astype(dtype).astype(np.float32) for a in (x, weights, dy))
    sizes = jnp.asarray(SIZES, jnp.int32)
    quantized = quantization.format != "none"

    def product(x: Array, weights: Array) -> jax.Array:
        if quantized:
            return quantized_grouped_matmul(quantization, rules.platform, 1.0, x, weights, sizes)
        return grouped_matmul(rules.platform, 1.0, x, weights, sizes)

    y, dx, d_weights = _with_gradients(product, *(a.astype(dtype) for a in (x, weights, dy)))
    of_group = _quantized(quantization, rules.platform) if quantized else _plain
    groups = [slice(end - size, end) for size, end in zip(SIZES, ends, strict=True)]
    parts = [of_group(x[rows], w, dy[rows]) for rows, w in zip(groups, weights, strict=True)]
    outputs, row_gradients, matrix_gradients = zip(*parts, strict=True)
    pairs = {
        "output": (y[:count], np.concatenate(outputs)),
        "gradient of the rows": (dx[:count], np.concatenate(row_gradients)),
        "gradient of the matrices": (d_weights, np.stack(matrix_gradients)),
    }
    kind = (
        f"grouped products of experts in {quantization.format}"
        if quantized
        else "grouped products of experts"
    )
    return max(
        compare(f"the {name} of {kind}", found, wanted, dtype, rules.platform)
        for name, (found, wanted) in pairs.items()
    )


Arrays: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


def _with_gradients(product: Callable[[Array, Array], jax.Array], *arrays: ArrayLike) -> Arrays:
    """(y, dx, d_weights) of a product, from x, weights and dy."""

    @jax.jit
    def run(x: Array, weights: Array, dy: Array) -> tuple[Array, Array, Array]:
        y, pullback = jax.vjp(product, x, weights)
        return y, *pullback(dy)

    return jax.device_get(run(*arrays))


def _plain(x: np.ndarray, weight: np.ndarray, dy: np.ndarray) -> Arrays:
    return x @ weight, dy @ weight.T, x.T @ dy


def _quantized(config: QuantizationConfig, platform: str) -> Callable[..., Arrays]:
    """As `_plain`, of the quantized product of one expert."""
    if platform == "tpu":  # see quantized_grouped_matmul
        config = dataclasses.replace(config, weight_gradients=False)
    product = functools.partial(quantized_product, config)

    def of_group(x: np.ndarray, weight: np.ndarray, dy: np.ndarray) -> Arrays:
        return _with_gradients(product, x, weight, dy) if len(x) else _plain(x, weight, dy)

    return of_group
