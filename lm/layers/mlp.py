"""Position-wise feed-forward layers, plain and gated (arXiv:2002.05202)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.layers.linear import Linear
from lm.layers.lora import LoraConfig
from lm.parallel.sharding import Rules
from lm.types import Array


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) (arXiv:1606.08415). Its own gradient: autodiff would save, not only read, three
    arrays of the MLP's width.
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return (dy * (_normal_cdf(x) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)
_GELU_TANH = functools.partial(jax.nn.gelu, approximate=True)

# name: (function, gated)
ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    "relu": (jax.nn.relu, False),
    "relu2": (lambda x: jnp.square(jax.nn.relu(x)), False),  # arXiv:2109.08668
    "gelu": (gelu, False),
    "gelu_tanh": (_GELU_TANH, False),
    "silu": (jax.nn.silu, False),
    "reglu": (jax.nn.relu, True),
    "geglu": (gelu, True),
    "geglu_tanh": (_GELU_TANH, True),
    "swiglu": (jax.nn.silu, True),
}


class Mlp(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)). Parameters: `up` `down`, and `gate` if
    gated.
    """

    embed_dim: int
    mlp_dim: int
    rules: Rules
    activation: str = "gelu"
    bias: bool = False
    dtype: Any = jnp.float32
    init_std: float | None = None
    init_scale: float = 1.0
    out_scale: float = 1.0
    lora: LoraConfig = LoraConfig()

    def _linear(self, name: str, out: bool = False) -> Linear:
        shapes = (
            ((self.mlp_dim,), (self.embed_dim,)) if out else ((self.embed_dim,), (self.mlp_dim,))
        )
        axes = (("mlp",), ("embed",)) if out else (("embed",), ("mlp",))
        scale = self.init_scale * (self.out_scale if out else 1.0)
        kept = (self.bias, self.dtype, self.init_std, scale, self.lora)
        return Linear(*shapes, *axes, self.rules, *kept, name=name)

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """x: [B, T, D] -> [B, T, D]."""
        act, gated = ACTIVATIONS[self.activation]
        up = checkpoint_name(self._linear("up")(x), "up")  # [B, T, F]
        gate = checkpoint_name(self._linear("gate")(x), "gate") if gated else None
        h = act(up) if gate is None else act(gate) * up
        h = self.rules.constrain(h, "batch", "length", "mlp")
        return self._linear("down", out=True)(h)
