"""Layer normalisation (arXiv:1607.06450) and root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.layers.linear import parameter

KINDS = ("layer", "rms", "rms_plus_one")


class Norm(nn.Module):
    """Normalises the last dimension of x: [..., D]; statistics in float32, result in `dtype`.

    Parameters: `scale` [D], and `bias` [D] where asked for. `rms_plus_one` multiplies by
    `1 + scale` (Gemma): a scale near 0 keeps the bits that it would lose near 1.
    """

    kind: str = "rms"
    eps: float = 1e-6
    bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)  # statistics in float32
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        plus_one = self.kind == "rms_plus_one"
        init = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = parameter(self, "scale", init, x.shape[-1:], (None,))
        x = x * (1 + scale if plus_one else scale)
        if self.bias:
            x = x + parameter(self, "bias", nn.initializers.zeros, x.shape[-1:], (None,))
        return x.astype(self.dtype)
