"""Check of the grouped products of experts: rows beyond the groups have no effect, all else agrees
with a loop over groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.grouped_matmul import grouped_matmul
from lm.parallel.sharding import Rules
from lm.reliability.reference import compare
from lm.types import Array

# Rows of groups: less than a tile of a kernel, none, more than one tile, and a tile exactly.
SIZES = (3, 0, 300, 128, 81, 0)
ROWS, WIDTH, OUT = 640, 256, 384  # 128 rows of no group


def check_experts(dtype: jnp.dtype, rules: Rules) -> float:
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

    @jax.jit
    def run(x: Array, weights: Array, dy: Array) -> tuple[Array, Array, Array]:
        def product(x: Array, weights: Array) -> jax.Array:
            return grouped_matmul(rules.platform, 1.0, x, weights, jnp.asarray(SIZES, jnp.int32))

        y, pullback = jax.vjp(product, x.astype(dtype), weights.astype(dtype))
        dx, d_weights = pullback(dy.astype(dtype))
        return y[:count], dx[:count], d_weights

    groups = [slice(end - size, end) for size, end in zip(SIZES, ends, strict=True)]
    expected = {
        "output": np.concatenate([x[rows] @ w for rows, w in zip(groups, weights, strict=True)]),
        "gradient of the rows": np.concatenate(
            [dy[rows] @ w.T for rows, w in zip(groups, weights, strict=True)]
        ),
        "gradient of the matrices": np.stack([x[rows].T @ dy[rows] for rows in groups]),
    }
    actual = jax.device_get(run(x, weights, dy))
    return max(
        compare(f"the {name} of grouped products of experts", found, value, dtype, rules.platform)
        for found, (name, value) in zip(actual, expected.items(), strict=True)
    )
