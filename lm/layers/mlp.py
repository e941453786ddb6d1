"""Position-wise feed-forward layers, plain and gated (arXiv:2002.05202)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.layers.activation_statistics import sow_units
from lm.layers.linear import hidden_linear
from lm.parallel.sharding import Rules

if TYPE_CHECKING:
    from lm.layers.block_config import BlockConfig


def recomputed(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """f, an elementwise function of arrays, that saves nothing but these arrays for its gradient.

    Autodiff would save its intermediate values: five arrays of the MLP's width for gelu_tanh. To
    read them takes longer than to compute them again.
    """
    function: Any = jax.custom_vjp(f)
    function.defvjp(lambda *xs: (f(*xs), xs), lambda xs, dy: jax.vjp(f, *xs)[1](dy))
    return function


def _gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) (arXiv:1606.08415)."""
    return x * (0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5))))


_GELU = recomputed(_gelu)
_GELU_TANH = recomputed(functools.partial(jax.nn.gelu, approximate=True))
_QUICK_GELU = recomputed(lambda x: x * jax.nn.sigmoid(1.702 * x))  # of CLIP
_SILU = recomputed(jax.nn.silu)

# name: (function, gated)
ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    "relu": (jax.nn.relu, False),
    "relu2": (recomputed(lambda x: jnp.square(jax.nn.relu(x))), False),  # arXiv:2109.08668
    "gelu": (_GELU, False),
    "gelu_tanh": (_GELU_TANH, False),
    "quick_gelu": (_QUICK_GELU, False),
    "silu": (_SILU, False),
    "reglu": (jax.nn.relu, True),
    "geglu": (_GELU, True),
    "geglu_tanh": (_GELU_TANH, True),
    "swiglu": (_SILU, True),
}


def hidden(activation: str, product: Callable[[str], jax.Array]) -> jax.Array:
    """act(up), or, gated, act(gate) * up, of the products with the matrices of these names."""
    act, gated = ACTIVATIONS[activation]
    up = checkpoint_name(product("up"), "up")
    if not gated:
        return act(up)
    gate = checkpoint_name(product("gate"), "gate")
    return recomputed(lambda gate, up: act(gate) * up)(gate, up)


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
        sow_units(self, h)
        return linear(wide, narrow, init_scale=self.out_scale, name="down")(h)
