"""Pieces of the length of arrays [B, T, ...], for what needs much memory per token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.types import Array


def num_chunks(chunk_size: int, rows: int, length: int) -> int:
    """The fewest pieces of `length` with at most `chunk_size` tokens each, of `rows` rows, or up to
    twice as many where those are equal; else the last one is padded. 0: one piece.
    """
    if chunk_size == 0:
        return 1
    fewest = -(-length // max(1, chunk_size // rows))
    equal = (n for n in range(fewest, min(2 * fewest, length + 1)) if length % n == 0)
    return next(equal, fewest)


def split(tree: Any, num_chunks: int) -> Any:
    """Pieces [n, B, t, ...] of arrays [B, T, ...], the last one filled up with zeros."""

    def one(x: Array) -> jax.Array:
        padding = [(0, 0), (0, -x.shape[1] % num_chunks)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, -1, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, tree)


def join(pieces: Array, length: int) -> jax.Array:
    """The array [B, length, ...] of pieces [n, B, t, ...]."""
    x = jnp.moveaxis(pieces, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
