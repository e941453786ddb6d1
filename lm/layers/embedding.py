"""Tables of vectors, and their use as the vocabulary projection (tied embeddings,
arXiv:1608.05859).
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.layers.linear import initializer, parameter, product
from lm.parallel.sharding import Rules
from lm.types import Array


class Embedding(nn.Module):
    """Rows of a table. Parameters: `weight` [size, D].

    The gradient of a row is the float32 sum over all tokens that have read it: in bfloat16 a sum of
    n terms of one sign stops growing at n = 256.
    """

    size: int
    embed_dim: int
    rules: Rules
    axis: str | None = "vocab"
    dtype: DTypeLike = jnp.float32
    init_std: float = 0.02

    def setup(self) -> None:
        init = initializer(self.init_std, self.size)
        shape = (self.size, self.embed_dim)
        self.weight = parameter(self, "weight", init, shape, (self.axis, "embed"))

    def __call__(self, ids: Array) -> jax.Array:
        """ids: int32 [B, T] -> [B, T, D]."""
        return _take(self.rules, self.axis, jnp.dtype(self.dtype), self.weight, ids)

    def attend(self, x: Array) -> jax.Array:
        """x: [B, T, D] -> logits, float32 [B, T, size]."""
        flat = x.reshape(-1, x.shape[-1]) if self.rules.size("length") == 1 else x  # as `project`
        # not a product with the transpose, which XLA's CPU compiler writes out for a single row
        table = _collect(self.rules, self.axis, self.weight.astype(self.dtype))
        y: Array = product(1, jnp.float32, flat, table)  # pyright: ignore
        return y.reshape(*x.shape[:-1], self.size)


def _collect(rules: Rules, axis: str | None, table: Array) -> jax.Array:
    # Gathering from a table sharded over `embed` into rows sharded over `batch` (the same mesh
    # axis) makes the compiler rematerialize the table everywhere: collect that axis first, as for
    # every FSDP weight.
    return rules.constrain(table, axis, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _take(rules: Rules, axis: str | None, dtype: DTypeLike, weight: Array, ids: Array) -> jax.Array:
    """Rows of weight: float32 [size, D], as `dtype` [B, T, D].

    Its own gradient: the table is rounded before it is collected, which moves half the bytes of a
    sharded one in bfloat16, and yet its gradient is summed in float32.
    """
    return jnp.take(_collect(rules, axis, weight.astype(dtype)), ids, axis=0)


def _take_backward(
    rules: Rules,
    axis: str | None,
    dtype: DTypeLike,
    arrays: tuple[Array, Array],
    d_rows: jax.Array,
) -> tuple[jax.Array, None]:
    del dtype
    weight, ids = arrays
    take = jax.linear_transpose(
        lambda table: jnp.take(_collect(rules, axis, table), ids, axis=0), weight
    )
    [d_weight] = take(d_rows.astype(weight.dtype))
    return d_weight, None


_take.defvjp(
    lambda rules, axis, dtype, *arrays: (_take(rules, axis, dtype, *arrays), arrays),
    _take_backward,
)
