"""Gated convolutions over the tokens before (Dauphin et al. 2017, arXiv:1612.08083), over packed
rows.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.layers.linear import (
    Matrix,
    broadcast_as,
    initializer,
    matrix,
    parameter,
    project_gates,
)
from lm.parallel.sharding import Rules
from lm.types import Array


class GatedConvolution(nn.Module):
    """y = (x * W + b) sigmoid(x * V + c), where * reads a token and the `kernel_size` - 1 before it
    in its segment.

    Parameters: `weight` [D, kernel_size, 2, D], the oldest token first, W before V, and `bias`
    [2, D].
    """

    kernel_size: int
    rules: Rules
    dtype: DTypeLike = jnp.float32
    init_std: float | None = None

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, before: Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """x: [B, T, D]; before: [B, kernel_size - 1, D], the tokens before it, or None where x
        is the start of rows -> ([B, T, D], the last kernel_size - 1 tokens or None).
        """
        width, axes = x.shape[-1], ("embed", "taps", "gates", "mlp")
        init = initializer(self.init_std, width * self.kernel_size)
        shape = (width, self.kernel_size, 2, width)
        weight = matrix(parameter(self, "weight", init, shape, axes), self.dtype, self.rules)
        weight = weight._replace(value=self.rules.collect(weight.value, *axes))
        bias = parameter(self, "bias", nn.initializers.zeros, shape[2:], axes[2:])
        # [kernel_size * D, 2, D]
        flat: Matrix = jax.tree.map(lambda w: jnp.swapaxes(w, 0, 1).reshape(-1, 2, width), weight)

        @jax.checkpoint  # else each layer would save kernel_size copies of x
        def convolve(x: Array, flat: Matrix) -> tuple[jax.Array, jax.Array | None]:
            seen, last = window(x, positions, before, self.kernel_size)
            return project_gates(seen, flat, self.rules), last

        gates, last = convolve(x, flat)
        gates = gates + broadcast_as(bias, gates)
        gates = self.rules.constrain(gates, "batch", "length", "gates", "mlp")
        y = gates[..., 0, :] * jax.nn.sigmoid(gates[..., 1, :])
        return self.rules.constrain(y, "batch", "length", "act_embed"), last


def window(
    x: Array, positions: Array, before: Array | None, size: int
) -> tuple[jax.Array, jax.Array | None]:
    """(the last `size` tokens of each token's segment, the oldest first, [B, T, size * D], zeros
    where there is none; the last size - 1 of all, where `before` has those before x).

    A token at position p of its segment has p tokens before it there: what it reads beyond them is
    another segment's, padding, or off the row.
    """
    length = x.shape[1]
    whole = x if before is None else jnp.concatenate([before.astype(x.dtype), x], axis=1)
    offset = whole.shape[1] - length

    def back(count: int) -> jax.Array:
        if before is None:
            moved = jnp.pad(x, ((0, 0), (count, 0), (0, 0)))[:, :length]
        else:
            moved = whole[:, offset - count : offset - count + length]
        return jnp.where((jnp.asarray(positions) >= count)[..., None], moved, 0)

    seen = jnp.concatenate([back(count) for count in range(size - 1, -1, -1)], axis=-1)
    return seen, None if before is None else whole[:, length:]
