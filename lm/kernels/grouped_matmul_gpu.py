"""Grouped products on GPUs: two Pallas kernels, compiled by Triton.

XLA's GPU compiler has none: it makes `jax.lax.ragged_dot` a dense product of all rows, masked, with
every group, which takes the number of groups times the FLOPs. What these kernels compute and read
grows with the rows that groups have, and not with the rows that the arrays have room for.

Operands of 8 bits: int8 is summed as int32. Triton through Pallas (jax 0.10) multiplies no two
types of float8, and two of one type in float16 by `mma.sync`, as it wants their sums exact: blocks
of them are read as they are, and multiplied in bfloat16, which holds both exactly, by `wgmma`.

`interpret` runs a kernel on any platform, to test its numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lm.types import Array

# Rows, columns and contracted elements of a tile, warps and stages of its pipeline: for most shapes
# of mixtures the fastest of those measured on an H100 for a like kernel by the library tokamax
# (0.0.12, data/autotuning): 300 to 490 TFLOP/s, and 480 to 670 for gradients of matrices.
ROWS, COLUMNS, WARPS = 128, 128, 4
# by the bytes of an element: 64 KiB of shared memory
CONTRACTED, STAGES = {1: 64, 2: 32, 4: 32}, {1: 4, 2: 4, 4: 2}
# Tiles of rows that follow each other before the next columns: they share matrices in the L2 cache.
BAND = 8


def rows_by_group(
    x: Array,
    weights: Array,
    sizes: Array,
    *,
    load: float = 1.0,
    transposed: bool = False,
    scales: tuple[Array, ...] = (),
    dtype: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """x: [R, D] in groups of `sizes` [G] successive rows, times weights: [G, D, F], or, transposed,
    [G, F, D] -> [R, F] in `dtype`, by default that of x. Rows beyond the groups are not written.

    load: the part of the rows that is expected in groups, for plans alone. scales: float32 factors
    on the rows of the sums, [R], and, if given, on the columns of each group, [G, F].
    """
    (rows, depth), out = x.shape, weights.shape[1 if transposed else 2]
    tiles, columns = rows // ROWS + sizes.shape[0], pl.cdiv(out, COLUMNS)
    kernel = functools.partial(_rows_kernel, tiles=tiles, columns=columns, transposed=transposed)
    call = _call(
        kernel,
        jax.ShapeDtypeStruct((rows, out), dtype or x.dtype),
        (tiles * columns,),
        name="grouped_rows",
        operands=(x, weights),
        flops=load * 2 * rows * depth * out,
        interpret=interpret,
    )
    return call(x, weights, *_tiles(sizes, tiles), *scales)


def matrices_by_group(
    x: Array, dy: Array, sizes: Array, *, load: float = 1.0, interpret: bool = False
) -> jax.Array:
    """x: [R, D] transposed times dy: [R, F] within each group -> float32 [G, D, F], or int32."""
    (rows, depth), out, groups = x.shape, dy.shape[1], sizes.shape[0]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    call = _call(
        _matrices_kernel,
        jax.ShapeDtypeStruct((groups, depth, out), _sum_type(x.dtype)),
        (pl.cdiv(depth, ROWS), pl.cdiv(out, COLUMNS), groups),
        name="grouped_matrices",
        operands=(x, dy),
        flops=load * 2 * rows * depth * out,
        interpret=interpret,
    )
    return call(x, dy, ends - sizes, ends)


def largest_by_group(
    x: Array, factors: Array, sizes: Array, *, interpret: bool = False
) -> jax.Array:
    """The largest |x factors| of each column of x: [R, F] within each group, with factors: float32
    [R] -> float32 [G, F]; 0 for a group without rows.
    """
    width, groups = x.shape[1], sizes.shape[0]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    call = _call(
        _largest_kernel,
        jax.ShapeDtypeStruct((groups, width), jnp.float32),
        (pl.cdiv(width, COLUMNS), groups),
        name="grouped_largest",
        operands=(x, factors),
        flops=0,
        interpret=interpret,
    )
    return call(x, factors, ends - sizes, ends)


def _call(
    kernel: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    grid: tuple[int, ...],
    *,
    name: str,
    operands: tuple[Array, Array],
    flops: float,
    interpret: bool,
) -> Callable[..., jax.Array]:
    stages = STAGES[operands[0].dtype.itemsize]
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        name=name,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=stages),
        metadata={"flops": f"{flops:.0f}", "dtype": str(_product_type(operands[0]))},
        interpret=interpret,
    )


def _tiles(sizes: Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(group, first row, end of its group's rows), each [count], of tiles of up to ROWS rows of one
    group; tiles that are not needed have no row.
    """
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    last = jnp.cumsum(pl.cdiv(sizes, ROWS), dtype=jnp.int32)  # the end of each group's tiles
    tile = jnp.arange(count, dtype=jnp.int32)
    group = jnp.sum(last <= tile[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, sizes.shape[0] - 1)
    before = jnp.take(last - pl.cdiv(sizes, ROWS), group)
    start = jnp.take(ends - sizes, group) + (tile - before) * ROWS
    return group, start, jnp.take(ends, group)


def _rows_kernel(
    x: Any,
    weights: Any,
    group: Any,
    start: Any,
    end: Any,
    *rest: Any,
    tiles: int,
    columns: int,
    transposed: bool,
) -> None:
    """One tile of the rows of a group, and of columns."""
    *scales, out = rest
    (_, depth), width, step = x.shape, out.shape[1], CONTRACTED[x.dtype.itemsize]
    index = pl.program_id(0)
    band = jax.lax.div(index, BAND * columns)
    height = jnp.minimum(tiles - band * BAND, BAND)
    within = jax.lax.rem(index, BAND * columns)
    tile = band * BAND + jax.lax.rem(within, height)
    first = jax.lax.div(within, height) * COLUMNS
    row, stop, matrix = start[tile], end[tile], group[tile]

    @pl.when(row < stop)
    def _() -> None:
        inside = row + jnp.arange(ROWS) < stop
        across = _inside(first, COLUMNS, width)

        def body(i: Array, total: Array) -> Array:
            k = i * step
            along = _inside(k, step, depth)
            a = _load(x.at[pl.ds(row, ROWS), pl.ds(k, step)], inside, along)
            if transposed:
                at = weights.at[matrix, pl.ds(first, COLUMNS), pl.ds(k, step)]
                return total + _dot(a, 1, _load(at, across, along), 1)
            at = weights.at[matrix, pl.ds(k, step), pl.ds(first, COLUMNS)]
            return total + _dot(a, 1, _load(at, along, across), 0)

        total = jnp.zeros((ROWS, COLUMNS), _sum_type(x.dtype))
        total = jax.lax.fori_loop(0, pl.cdiv(depth, step), body, total)
        if scales:
            total = total * _load(scales[0].at[pl.ds(row, ROWS)], inside)[:, None]
        if len(scales) > 1:
            total = total * _load(scales[1].at[matrix, pl.ds(first, COLUMNS)], across)[None, :]
        to = out.at[pl.ds(row, ROWS), pl.ds(first, COLUMNS)]
        triton.store(to, total.astype(out.dtype), mask=_mask(inside, across))


def _matrices_kernel(x: Any, dy: Any, start: Any, end: Any, out: Any) -> None:
    """One tile of the matrix of a group."""
    (_, depth, width), step = out.shape, CONTRACTED[x.dtype.itemsize]
    top, left, group = pl.program_id(0) * ROWS, pl.program_id(1) * COLUMNS, pl.program_id(2)
    row, stop = start[group], end[group]
    down, across = _inside(top, ROWS, depth), _inside(left, COLUMNS, width)

    def body(i: Array, total: Array) -> Array:
        k = row + i * step
        inside = k + jnp.arange(step) < stop
        a = _load(x.at[pl.ds(k, step), pl.ds(top, ROWS)], inside, down)
        b = _load(dy.at[pl.ds(k, step), pl.ds(left, COLUMNS)], inside, across)
        return total + _dot(a, 0, b, 0)

    total = jnp.zeros((ROWS, COLUMNS), out.dtype)
    total = jax.lax.fori_loop(0, pl.cdiv(stop - row, step), body, total)
    to = out.at[group, pl.ds(top, ROWS), pl.ds(left, COLUMNS)]
    triton.store(to, total, mask=_mask(down, across))


def _largest_kernel(x: Any, factors: Any, start: Any, end: Any, out: Any) -> None:
    """The largest magnitudes of a few columns of a group."""
    left, group = pl.program_id(0) * COLUMNS, pl.program_id(1)
    row, stop, step = start[group], end[group], CONTRACTED[x.dtype.itemsize]
    across = _inside(left, COLUMNS, out.shape[1])

    def body(i: Array, largest: Array) -> Array:
        k = row + i * step
        inside = k + jnp.arange(step) < stop
        a = _load(x.at[pl.ds(k, step), pl.ds(left, COLUMNS)], inside, across)
        a = a.astype(jnp.float32) * _load(factors.at[pl.ds(k, step)], inside)[:, None]
        return jnp.maximum(largest, jnp.max(jnp.abs(a), axis=0))

    largest = jnp.zeros((COLUMNS,), jnp.float32)
    largest = jax.lax.fori_loop(0, pl.cdiv(stop - row, step), body, largest)
    triton.store(out.at[group, pl.ds(left, COLUMNS)], largest, mask=across)


def _inside(first: Array, count: int, size: int) -> Array | None:
    """bool [count], True at positions below `size`; None where all are."""
    return None if size % count == 0 else first + jnp.arange(count) < size


def _mask(rows: Array | None, columns: Array | None) -> Array | None:
    if rows is None:
        return None if columns is None else columns[None, :]
    return rows[:, None] if columns is None else rows[:, None] & columns[None, :]


def _dot(a: Array, over: int, b: Array, of_b: int) -> jax.Array:
    """The product of two blocks over a dimension of each, in float32 or, of integers, in int32."""
    dimensions, dtype = (((over,), (of_b,)), ((), ())), _product_type(a)
    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=_sum_type(dtype))


def _product_type(a: Array) -> Any:
    """The type in which blocks of such an array are multiplied."""
    is_float8 = a.dtype.itemsize == 1 and jnp.issubdtype(a.dtype, jnp.floating)
    return jnp.dtype(jnp.bfloat16) if is_float8 else a.dtype


def _sum_type(dtype: Any) -> Any:
    return jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32


def _load(ref: Any, rows: Array | None, columns: Array | None = None) -> jax.Array:
    """A block, or a vector of its rows, zeros where it is masked."""
    mask = _mask(rows, columns) if len(ref.shape) == 2 else rows
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return triton.load(ref, mask=mask, other=other)
