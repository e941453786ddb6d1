"""Zig-zag order of tokens, which gives every shard of the length an equal share of a causal mask.

The length is cut into 2n chunks; shard i of n holds chunks i and 2n - 1 - i, one that attends to
few keys and one that attends to many. In natural order the last shard would do (2n - 1) / n times
the mean work while the others wait.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel.sharding import Rules
from lm.types import Array


def fits(length: int, shards: int) -> bool:
    """True if there are several shards and the length can be cut into their chunks."""
    return shards > 1 and length % (2 * shards) == 0


def chunks(shards: int) -> np.ndarray:
    """The chunks in zig-zag order: int [2n], 0, 2n - 1, 1, 2n - 2, ..."""
    first = np.arange(shards)
    return np.stack([first, 2 * shards - 1 - first], axis=1).reshape(-1)


def positions(length: int, shards: int) -> np.ndarray:
    """The position in natural order of each token in zig-zag order: int32 [T]."""
    if shards == 1:
        return np.arange(length, dtype=np.int32)
    natural = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return natural[chunks(shards)].reshape(-1)


def restore(x: Array, shards: int, axis: int) -> Array:
    """`x`, which is not sharded along `axis`, in natural order."""
    if shards == 1:
        return x
    cut = x.reshape(*x.shape[:axis], 2 * shards, -1, *x.shape[axis + 1 :])
    return jnp.take(cut, np.argsort(chunks(shards)), axis=axis).reshape(x.shape)


def shuffle(x: Array, rules: Rules) -> Array:
    """x: [B, T, ...], sharded along T, in zig-zag order; every chunk moves once."""
    return _exchange(x, rules, back=False)


def unshuffle(x: Array, rules: Rules) -> Array:
    """The inverse of `shuffle`."""
    return _exchange(x, rules, back=True)


def _exchange(x: Array, rules: Rules, *, back: bool) -> Array:
    axes, n = rules.axes("length"), rules.size("length")

    def shard_of(chunk: int) -> int:
        return min(chunk, 2 * n - 1 - chunk)

    # natural shard i holds chunks 2i and 2i + 1; a shard's two chunks differ in parity in both
    # orders, so those of one parity are a permutation of the shards
    routes = [[(i, shard_of(2 * i + parity)) for i in range(n)] for parity in (0, 1)]
    if back:
        routes = [[(b, a) for a, b in route] for route in routes]

    def local(x: Array) -> Array:
        odd = jax.lax.axis_index(axes) % 2 == 1  # then its first chunk in zig-zag order is odd
        halves = jnp.split(x, 2, axis=1)

        def swap(a: Array, b: Array) -> list[Array]:
            return [jnp.where(odd, b, a), jnp.where(odd, a, b)]

        halves = swap(*halves) if back else halves
        moved = [jax.lax.ppermute(h, axes, r) for h, r in zip(halves, routes, strict=True)]
        return jnp.concatenate(moved if back else swap(*moved), axis=1)

    rows = "act_batch" if back else "batch"  # the model's outputs, and its inputs
    spec = rules.spec(rows, "length", *(None,) * (x.ndim - 2))
    return rules.shard_map(local, in_specs=(spec,), out_specs=spec)(x)
