"""Products of rows sorted by group with one matrix for each group, and the permutations.

A grouped product multiplies every row of a sorted array by the matrix of its group. An assignment
is one of the R = n k pairs of a token and a choice, numbered token * k + choice; the assignment of
row r is `order[r]` (n k: none), and the row of assignment a is `slots[a]` (R or more: none).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.kernels import grouped_matmul_gpu

# Tile of rows, columns in and columns out of the TPU's kernel for the gradient of the matrices: of
# the products of bfloat16 a tile of [512, 1024] columns does as many for each byte read as the
# chip's memory asks for, and fits its 16 MiB of vector memory twice.
TILES = (512, 512, 1024)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped_matmul(
    platform: str, load: float, x: jax.Array, weights: jax.Array, sizes: jax.Array
) -> jax.Array:
    """x: [R, D] in groups of `sizes` [G] successive rows, times weights: [G, D, F] -> [R, F].

    Rows beyond the groups may come back as anything, NaN among it: read none of them. `platform` is
    that of the mesh (`Rules.platform`), `load` the part of the rows that is expected in groups, for
    plans alone. Its own gradient: that of `jax.lax.ragged_dot` with respect to the weights is, on
    TPU, a product of every row with every group, masked; on GPU all its products are.
    """
    return rows_by_group(platform, load, x, weights, sizes)


def _backward(
    platform: str, load: float, arrays: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, weights, sizes = arrays
    dx = rows_by_group(platform, load, dy, weights, sizes, transposed=True)
    d_weights = matrices_by_group(platform, load, x, dy, sizes)
    return dx, d_weights.astype(weights.dtype), None


def rows_by_group(
    platform: str,
    load: float,
    x: jax.Array,
    weights: jax.Array,
    sizes: jax.Array,
    *,
    transposed: bool = False,
    scales: tuple[jax.Array, ...] = (),
    dtype: Any = None,
) -> jax.Array:
    """As `grouped_matmul`, without a gradient, or, transposed, with weights: [G, F, D].

    x and weights of 8 bits: the sums are multiplied by scales, float32 for each row, [R], and, if
    given, for each column of each group, [G, F]; the result is of type `dtype`.
    """
    if platform == "gpu":
        how = {"load": load, "transposed": transposed, "scales": scales, "dtype": dtype}
        if scales and not transposed:
            # tensor cores take 8 bits only with what is summed over in the last dimension
            weights, how["transposed"] = weights.swapaxes(1, 2), True
        return grouped_matmul_gpu.rows_by_group(x, weights, sizes, **how)
    over = (((1,), (2 if transposed else 1,)), ((), ()))
    dimensions = jax.lax.RaggedDotDimensionNumbers(over, (0,), (0,))
    if not scales:
        return jax.lax.ragged_dot_general(x, weights, sizes, dimensions)
    y: Any = jax.lax.ragged_dot_general(
        x, weights, sizes, dimensions, preferred_element_type=sum_type(x.dtype)
    )
    y = y * scales[0][:, None]
    y = y * of_rows(scales[1], sizes, x.shape[0]) if len(scales) > 1 else y
    return y.astype(dtype)


def of_rows(a: jax.Array, sizes: jax.Array, rows: int) -> jax.Array:
    """a: [G, ...] of the group of each row, [rows, ...]; beyond the groups, that of the last."""
    if a.shape[0] == 1:
        return a
    return jnp.take(a, group_of_rows(sizes, rows), axis=0, mode="clip")


def group_of_rows(sizes: jax.Array, rows: int) -> jax.Array:
    """int32 [rows]; G beyond the groups."""
    return jnp.sum(jnp.cumsum(sizes) <= jnp.arange(rows)[:, None], axis=1, dtype=jnp.int32)


def sum_type(dtype: Any) -> Any:
    """The type in which products of 8 bits are summed."""
    return jnp.int32 if dtype == jnp.int8 else jnp.float32


def largest_by_group(
    platform: str, x: jax.Array, factors: jax.Array, sizes: jax.Array
) -> jax.Array:
    """The largest |x factors| of each column of x: [R, F] within each group, with factors: float32
    [R] -> float32 [G, F]; 0 for a group without rows.
    """
    if platform == "gpu":
        return grouped_matmul_gpu.largest_by_group(x, factors, sizes)
    sizes_of = jnp.abs(x.astype(jnp.float32) * factors[:, None])
    groups = group_of_rows(sizes, x.shape[0])
    of_groups = jax.ops.segment_max(
        sizes_of, groups, sizes.shape[0], indices_are_sorted=True, mode="drop"
    )
    return jnp.maximum(of_groups, 0)


def matrices_by_group(
    platform: str, load: float, x: jax.Array, dy: jax.Array, sizes: jax.Array
) -> jax.Array:
    """x: [R, D] transposed times dy: [R, F] within each group: [G, D, F], of 8 bits as sums."""
    if platform == "gpu":
        return grouped_matmul_gpu.matrices_by_group(x, dy, sizes, load=load)
    if platform == "tpu":
        # imported here: other platforms need no Pallas for TPU
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        rows, width, out = TILES
        pad = -x.shape[0] % rows
        x, dy = (jnp.pad(a, ((0, pad), (0, 0))) for a in (x, dy))
        tiling = (rows, min(width, x.shape[1]), min(out, dy.shape[1]))
        return tgmm(x.T, dy, sizes, preferred_element_type=x.dtype, tiling=tiling)
    rows_contracted = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    sums = sum_type(x.dtype) if x.dtype.itemsize == 1 else None
    return jax.lax.ragged_dot_general(x, dy, sizes, rows_contracted, preferred_element_type=sums)


grouped_matmul.defvjp(
    lambda platform, load, *arrays: (grouped_matmul(platform, load, *arrays), arrays), _backward
)


def sort_by_group(groups: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(order [A], slots [A], sizes [num_groups]) of the groups: int32 [A] of assignments.

    Assignments of group `num_groups` belong to none. Those of one group keep their order.
    """
    order = jnp.argsort(groups, stable=True)
    rows = jnp.argsort(order)  # the inverse; a sort, as scatters are slow on TPU
    sizes = jnp.sum(groups[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    count = groups.shape[0]
    order = jnp.where(jnp.arange(count) < jnp.sum(sizes), order, count)
    return order, jnp.where(groups < num_groups, rows, count), sizes


@jax.custom_vjp
def spread(x: jax.Array, order: jax.Array, slots: jax.Array) -> jax.Array:
    """x: [n, D] -> the rows [R, D] of assignments; zeros where a row has none.

    The transpose of `collect`; with both directions of the permutation at hand, neither needs a
    scatter, which is slow on TPU and adds in no fixed order on GPU.
    """
    return jnp.take(x, order // (slots.size // x.shape[0]), axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def collect(rows: jax.Array, order: jax.Array, slots: jax.Array) -> jax.Array:
    """rows: [R, D] -> [n, D], each token's sum over its `slots` [n, k], in float32."""
    picked = jnp.take(rows, slots, axis=0, mode="fill", fill_value=0)  # [n, k, D]
    return jnp.sum(picked, axis=1, dtype=jnp.float32).astype(rows.dtype)


spread.defvjp(
    lambda x, *plan: (spread(x, *plan), plan),
    lambda plan, d_rows: (collect(d_rows, *plan), None, None),
)
collect.defvjp(
    lambda rows, *plan: (collect(rows, *plan), plan),
    lambda plan, d_x: (spread(d_x, *plan), None, None),
)
