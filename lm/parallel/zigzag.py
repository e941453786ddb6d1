"""An order of the length in which every shard has the same share of a causal mask.

Cut into 2n chunks, shard i of n holds chunks i and 2n - 1 - i: one that sees little and one that
sees much. In natural order the last shard would do (2n - 1) / n times the mean work, and all wait.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel.shard_map import shard_map
from lm.parallel.sharding import Rules
from lm.types import Array


def fits(length: int, shards: int) -> bool:
    """Whether there is anything to balance, and the length can be cut."""
    return shards > 1 and length % (2 * shards) == 0


def chunks(shards: int) -> np.ndarray:
    """The chunks in the order in which they stand: int [2n], 0, 2n - 1, 1, 2n - 2, ..."""
    first = np.arange(shards)
    return np.stack([first, 2 * shards - 1 - first], axis=1).reshape(-1)


def places(length: int, shards: int) -> np.ndarray:
    """Where each token stood in natural order: int32 [T]."""
    if shards == 1:
        return np.arange(length, dtype=np.int32)
    natural = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    return natural[chunks(shards)].reshape(-1)


def restore(x: Array, shards: int, axis: int) -> Array:
    """`x`, not sharded along `axis`, back in natural order."""
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


def _exchange(x: Array, rules: Rules, *, back: bool) -> Any:
    axes, n = rules.axes("length"), rules.size("length")

    def home(chunk: int) -> int:
        return min(chunk, 2 * n - 1 - chunk)

    # natural shard i holds chunks 2i and 2i + 1; a shard's two chunks differ in parity in both
    # orders, so those of one parity are a permutation of the shards
    routes = [[(i, home(2 * i + parity)) for i in range(n)] for parity in (0, 1)]
    if back:
        routes = [[(b, a) for a, b in route] for route in routes]

    def local(x: Array) -> Array:
        odd = jax.lax.axis_index(axes) % 2 == 1  # whose first chunk in zig-zag order is odd
        halves = jnp.split(x, 2, axis=1)

        def swap(a: Array, b: Array) -> list[Array]:
            return [jnp.where(odd, b, a), jnp.where(odd, a, b)]

        halves = swap(*halves) if back else halves
        moved = [jax.lax.ppermute(h, axes, r) for h, r in zip(halves, routes, strict=True)]
        return jnp.concatenate(moved if back else swap(*moved), axis=1)

    rows = "act_batch" if back else "batch"  # what the model computes, and what it reads
    spec = rules.spec(rows, "length", *(None,) * (x.ndim - 2))
    return shard_map(local, rules, in_specs=(spec,), out_specs=spec)(x)
