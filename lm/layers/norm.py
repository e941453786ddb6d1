"""Layer normalisation (arXiv:1607.06450) and root-mean-square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.layers.linear import parameter
from lm.types import Array

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
        plus_one = self.kind == "rms_plus_one"
        init = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = parameter(self, "scale", init, x.shape[-1:], (None,))
        scale, bias = 1 + scale if plus_one else scale, None
        if self.bias:
            bias = parameter(self, "bias", nn.initializers.zeros, x.shape[-1:], (None,))
        y: Any = _normalize(self.kind == "layer", self.eps, jnp.dtype(self.dtype), x, scale, bias)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normalize(
    centered: bool, eps: float, dtype: DTypeLike, x: Array, scale: Array, bias: Array | None
) -> jax.Array:
    """Its own gradient: x, in its type, and two numbers a token are saved, in place of up to four
    float32 arrays of the size of x.
    """
    return _forward(centered, eps, dtype, x, scale, bias)[0]


Saved: TypeAlias = tuple[Array, Array | None, Array, Array, Array | None]


def _forward(
    centered: bool, eps: float, dtype: DTypeLike, x: Array, scale: Array, bias: Array | None
) -> tuple[jax.Array, Saved]:
    mean = jnp.mean(x, axis=-1, keepdims=True, dtype=jnp.float32) if centered else None
    normal = _less(x, mean)
    factor = jax.lax.rsqrt(jnp.mean(normal * normal, axis=-1, keepdims=True) + eps)
    y = normal * factor * scale
    return (y if bias is None else y + bias).astype(dtype), (x, mean, factor, scale, bias)


def _less(x: Array, mean: Array | None) -> jax.Array:
    return x.astype(jnp.float32) if mean is None else x.astype(jnp.float32) - mean


def _backward(
    centered: bool, eps: float, dtype: DTypeLike, saved: Saved, dy: Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    del eps, dtype
    x, mean, factor, scale, bias = saved
    normal, dy = _less(x, mean) * factor, dy.astype(jnp.float32)
    d_normal = dy * scale
    dx = d_normal - normal * jnp.mean(d_normal * normal, axis=-1, keepdims=True)
    if centered:
        dx = dx - jnp.mean(d_normal, axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    d_bias = None if bias is None else jnp.sum(dy, axis=rows)
    return (dx * factor).astype(x.dtype), jnp.sum(dy * normal, axis=rows), d_bias


_normalize.defvjp(_forward, _backward)
