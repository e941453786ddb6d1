"""Chunks of the length of arrays [B, T, ...], for computations with much memory per token."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

from lm.types import Array

T = TypeVar("T")


def num_chunks(chunk_size: int, rows: int, length: int) -> int:
    """The fewest chunks of `length` with at most `chunk_size` tokens each, of `rows` rows, or up to
    twice as many where those are equal; else the last one is padded. 0: one chunk.
    """
    if chunk_size == 0:
        return 1
    fewest = -(-length // max(1, chunk_size // rows))
    equal = (n for n in range(fewest, min(2 * fewest, length + 1)) if length % n == 0)
    return next(equal, fewest)


def split(tree: T, num_chunks: int) -> T:
    """Chunks [n, B, t, ...] of arrays [B, T, ...], the last one padded with zeros."""

    def one(x: Array) -> jax.Array:
        padding = [(0, 0), (0, -x.shape[1] % num_chunks)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, -1, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, tree)


def join(chunks: Array, length: int) -> jax.Array:
    """The array [B, length, ...] of chunks [n, B, t, ...]."""
    x = jnp.moveaxis(chunks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
