"""Layer normalisation (arXiv:1607.06450) and root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.layers.linear import parameter

KINDS = ("layer", "rms")


class Norm(nn.Module):
    """Normalises the last dimension of x: [..., D]; statistics in float32, result in `dtype`.

    Parameters: `scale` [D], and `bias` [D] where asked for.
    """

    kind: str = "rms"
    eps: float = 1e-6
    bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)  # statistics in float32
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        x = x * parameter(self, "scale", nn.initializers.ones, x.shape[-1:], (None,))
        if self.bias:
            x = x + parameter(self, "bias", nn.initializers.zeros, x.shape[-1:], (None,))
        return x.astype(self.dtype)
