"""Checksums of arrays: equal on devices and hosts, whatever the mesh and the shards.

The checksum of an array is a pair of sums over its elements, each element mixed with its position
in the whole array. Integer sums don't depend on their order, hence not on the mesh, the shards or
who adds them up. One changed element always changes both sums. Elements that change places leave
both as they were with a probability of 2^-64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel.sharding import mesh_axes
from lm.types import Device, PyTree, Tree

U = np.uint32
FACTORS = (U(0x85EBCA6B), U(0xC2B2AE35))
SEEDS = (U(0x9E3779B9), U(0x7F4A7C15))  # of the two sums: 64 bits of the golden ratio
COLUMNS = (U(0x85EBCA77), U(0xC2B2AE3D))  # odd, so that columns below 2^32 stay distinct
PAIRS = tuple(zip(SEEDS, COLUMNS, strict=True))
TILES = (1 << 12, 1 << 18)  # elements that a host mixes at a time, of a small and a large block
WIDTHS = (1, 8, 64, 512)  # of a line of a tile
ALIGNMENT = 64  # bytes
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _fmix(h: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer: a bijection of 32 bits, each input bit flips half of the output."""
    h = (h ^ (h >> U(16))) * FACTORS[0]
    h = (h ^ (h >> U(13))) * FACTORS[1]
    return h ^ (h >> U(16))


def _check_dtype(dtype: np.dtype, caller: str) -> None:
    if jnp.issubdtype(dtype, jax.dtypes.extended) or np.dtype(dtype).itemsize not in WORDS:
        raise ValueError(
            f"{caller}: no checksum for {dtype}; store it as elements of 1, 2 or 4 byte"
        )


def _checksum(x: jax.Array) -> jax.Array:
    _check_dtype(x.dtype, "checksums")
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        word = WORDS[np.dtype(x.dtype).itemsize]
        bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    bits = bits.reshape(bits.shape or (1,))
    *leading, columns = bits.shape
    # Separate indices of row and column: one for both overflows 32 bits in a large array.
    row = jnp.zeros((*leading, 1), jnp.uint32)
    for dim in range(len(leading)):
        stride = U(math.prod(leading[dim + 1 :]) % 2**32)
        row += jax.lax.broadcasted_iota(jnp.uint32, row.shape, dim) * stride
    column = jax.lax.iota(jnp.uint32, columns)
    return _sum([_mix(bits, _fmix(row + seed), column * odd) for seed, odd in PAIRS])


def _mix(bits: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    return _fmix(bits + (row ^ column))


def _sum(mixed: list[jax.Array]) -> jax.Array:
    """Both sums in one reduction: XLA's CPU compiler makes a vectorized pass of it, six times as
    fast as two plain sums.
    """
    sums = jax.lax.reduce(
        mixed,
        [U(0), U(0)],
        lambda a, b: [a[0] + b[0], a[1] + b[1]],
        dimensions=tuple(range(mixed[0].ndim)),
    )
    return jnp.stack(sums)


def checksums(tree: PyTree) -> PyTree:
    """The checksum of every leaf, a tree of uint32 [2]; inside jit, for arrays in any sharding.
    Raises ValueError where a leaf's elements don't have 1, 2 or 4 byte.
    """
    return jax.tree.map(_checksum, tree)


def host_checksums(
    block: np.ndarray, start: Sequence[int] = (), shape: Sequence[int] | None = None
) -> np.ndarray:
    """The contribution of `block` to the checksum of its array, uint32 [2].

    Computed by XLA on the host, beside whatever devices there are, in tiles of one shape: a few
    small programs serve all arrays, and temporary memory is bounded.

    start: the block's first index in an array of `shape`; without them the block is the whole
    array. Contributions of blocks that cover an array add up (as uint32) to its `checksums`.
    """
    _check_dtype(block.dtype, "host_checksums")
    shape = tuple(shape or block.shape) or (1,)
    start = tuple(start) or (0,) * len(shape)
    block = np.ascontiguousarray(block).reshape(block.shape or (1,))
    sums = np.zeros(2, U)
    if not block.size:
        return sums
    bits = block.view(WORDS[block.dtype.itemsize]).reshape(-1)
    columns = block.shape[-1]
    row = np.zeros(block.shape[:-1], U)
    for dim in range(len(shape) - 1):
        stride = math.prod(shape[dim + 1 : -1])
        at = (np.arange(block.shape[dim], dtype=np.uint64) + start[dim]) * stride % 2**32
        row += at.astype(U).reshape((-1,) + (1,) * (len(shape) - 2 - dim))
    row = row.reshape(-1)

    width = max(w for w in WIDTHS if w <= columns)
    size = max(n for n in TILES if n == TILES[0] or n * 4 <= bits.size)
    first_of_line = np.arange(0, size, width)
    spare = _aligned(size, bits.dtype)
    # XLA copies what isn't aligned, to new memory: all but the first and the last tile are
    head = -bits.ctypes.data % ALIGNMENT // bits.itemsize
    bounds = sorted({0, *range(head if bits.size > size else 0, bits.size, size), bits.size})
    for offset, end in itertools.pairwise(bounds):
        tile, count = bits[offset:end], end - offset
        if count < size:
            spare[:count] = tile
            tile = spare
        at, column = np.divmod(np.minimum(first_of_line + offset, bits.size - 1), columns)
        lines = row[at], row[np.minimum(at + 1, row.size - 1)], column.astype(U)
        scalars = U(start[-1]), U(columns), U(count)
        with jax.default_device(_host_device()):
            sums += np.asarray(_sum_of_tile(tile.reshape(-1, width), *lines, *scalars))
    return sums


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """Memory of a tile that XLA's CPU client reads in place."""
    memory = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + size * dtype.itemsize].view(dtype)


@jax.jit
def _sum_of_tile(
    bits: jax.Array,
    row: jax.Array,
    next_row: jax.Array,
    column: jax.Array,
    first_column: jax.Array,
    columns: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """The sums of `count` consecutive elements of a block of `columns` columns.

    bits: [lines, width], where width <= columns. row, column: [lines], the indices of a line's
    first element in the block's rows and columns; next_row: of the row after it, where it goes on.
    """
    lines, width = bits.shape
    place = jax.lax.iota(U, width)
    at = column[:, None] + place
    wraps = at >= columns
    at = first_column + jnp.where(wraps, at - columns, at)
    is_element = jax.lax.iota(U, lines)[:, None] * U(width) + place < count
    mixed = []
    for seed, odd in PAIRS:
        rows = jnp.where(wraps, _fmix(next_row + seed)[:, None], _fmix(row + seed)[:, None])
        mixed.append(jnp.where(is_element, _mix(bits.astype(U), rows, at * odd), U(0)))
    return _sum(mixed)


@functools.cache
def _host_device() -> Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        platforms = jax.config.values["jax_platforms"]
        raise ValueError(
            f"JAX_PLATFORMS={platforms} leaves out the host, which computes checksums: write "
            f"{platforms},cpu"
        ) from error


def replica_mismatches(tree: Tree, shardings: Tree) -> Tree:
    """A tree of bool [], True where replicas of a leaf hold different bits; for use inside jit.

    Every device computes the checksum of its own shard and compares it with its replicas': those of
    the devices along the mesh axes that don't shard the leaf.

    shardings: the NamedSharding of every leaf, all on one mesh.
    """
    leaves, structure = jax.tree.flatten(tree)
    named = structure.flatten_up_to(shardings)
    mesh = named[0].mesh
    used = [{a for entry in s.spec for a in mesh_axes(entry)} for s in named]
    free = [tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in u) for u in used]

    def compare(*local: jax.Array) -> tuple[jax.Array, ...]:
        found = [jnp.bool_(False)] * len(local)
        for axes in sorted({axes for axes in free if axes}):  # in one order in all processes
            members = [i for i in range(len(local)) if free[i] == axes]
            own = jnp.stack([_checksum(local[i]) for i in members])
            # Odd weights make one wrong replica visible. They differ by device: a compiler that
            # takes the operand for replicated would remove a plain maximum and find no mismatch.
            size = math.prod(mesh.shape[a] for a in axes)
            weights = 2 * np.arange(size, dtype=U) + U(1)
            weight = jnp.asarray(weights)[jax.lax.axis_index(axes)]
            total = jax.lax.psum(own * weight, axes)
            differs = jnp.any(total != own * weights.sum(dtype=U), axis=1)
            anywhere = jax.lax.psum(differs.astype(jnp.int32), mesh.axis_names) > 0
            for i, flag in zip(members, anywhere, strict=True):
                found[i] = flag
        return tuple(found)

    replicated = jax.sharding.PartitionSpec()
    flags = jax.shard_map(
        compare,
        mesh=mesh,
        in_specs=tuple(s.spec for s in named),
        out_specs=(replicated,) * len(leaves),
        check_vma=False,
    )(*leaves)
    return structure.unflatten(flags)


def hexadecimal(sums: np.ndarray) -> str:
    """16 hex digits of a checksum, uint32 [2]."""
    return "".join(f"{int(s):08x}" for s in sums)


def from_hexadecimal(digits: str) -> np.ndarray:
    """The checksum of which `hexadecimal` made these digits."""
    return np.array([int(digits[:8], 16), int(digits[8:], 16)], U)
