"""Tables of vectors, and their use as the vocabulary projection (tied embeddings,
arXiv:1608.05859).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.layers.linear import initializer, parameter
from lm.sharding import Rules
from lm.types import Array


class Embedding(nn.Module):
    """Rows of a table. Parameters: `weight` [size, D]."""

    size: int
    embed_dim: int
    rules: Rules
    axis: str | None = "vocab"
    dtype: Any = jnp.float32
    init_std: float = 0.02

    def setup(self) -> None:
        init = initializer(self.init_std, self.size)
        shape = (self.size, self.embed_dim)
        self.weight = parameter(self, "weight", init, shape, (self.axis, "embed"))

    def _table(self) -> jax.Array:
        # Gathering from a table sharded over `embed` into rows sharded over `batch` (the same mesh
        # axis) makes the
        # compiler rematerialize the table everywhere: collect that axis first, as for every FSDP
        # weight.
        return self.rules.constrain(self.weight.astype(self.dtype), self.axis, None)

    def __call__(self, ids: Array) -> jax.Array:
        """ids: int32 [B, T] -> [B, T, D]."""
        return jnp.take(self._table(), ids, axis=0)

    def attend(self, x: Array) -> jax.Array:
        """x: [B, T, D] -> logits [B, T, size]."""
        flat = x.reshape(-1, x.shape[-1]) if self.rules.size("length") == 1 else x  # as `project`
        # not a product with the transpose, which XLA's CPU compiler writes out for a single row
        over = (((flat.ndim - 1,), (1,)), ((), ()))
        y = jax.lax.dot_general(flat, self._table(), over)
        return y.reshape(*x.shape[:-1], self.size)
