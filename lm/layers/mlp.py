"""Position-wise feed-forward layers, plain and gated (arXiv:2002.05202)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.layers.linear import hidden_linear
from lm.parallel.sharding import Rules

if TYPE_CHECKING:
    from lm.layers.block_config import BlockConfig


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) (arXiv:1606.08415). Its own gradient: autodiff would save, not only read, three
    arrays of the MLP's width.
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return (dy * (_normal_cdf(x) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
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


def hidden(activation: str, product: Callable[[str], jax.Array]) -> jax.Array:
    """act(up), or, gated, act(gate) * up, of the products with the matrices of these names."""
    act, gated = ACTIVATIONS[activation]
    up = checkpoint_name(product("up"), "up")
    return act(checkpoint_name(product("gate"), "gate")) * up if gated else act(up)


class Mlp(nn.Module):
    """down(act(up(x))), or, gated, down(act(gate(x)) * up(x)). Parameters: `up` `down`, and `gate`
    where gated.
    """

    config: BlockConfig
    rules: Rules
    mlp_dim: int
    bias: bool = False
    out_scale: float = 1.0  # factor on the initial weights of `down`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, T, D] -> [B, T, D]."""
        c, narrow, wide = self.config, {"embed": self.config.embed_dim}, {"mlp": self.mlp_dim}
        linear = functools.partial(hidden_linear, c, self.rules, bias=self.bias)
        h = hidden(c.activation, lambda name: linear(narrow, wide, name=name)(x))
        h = self.rules.constrain(h, "batch", "length", "mlp")
        return linear(wide, narrow, init_scale=self.out_scale, name="down")(h)
