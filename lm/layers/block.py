"""One layer of a transformer."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.layers.activation_statistics import sow_hidden
from lm.layers.attention import Attention, CrossAttention, LayerInputs, PerLayer
from lm.layers.block_config import BlockConfig
from lm.layers.linear import times
from lm.layers.mlp import Mlp
from lm.layers.moe.moe import Moe, RouterReport
from lm.layers.norm import Norm
from lm.parallel.sharding import Rules
from lm.types import Array, Cache


class Block(nn.Module):
    """Attention and MLP around a residual stream. Parameters: `attention`, `mlp` or `moe`, beside
    an encoder `cross_attention`, and their norms.
    """

    config: BlockConfig
    rules: Rules

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        c = self.config
        return Norm(c.norm, c.norm_eps, c.norm_bias, jnp.dtype(c.dtype), name=f"{name}_norm")(x)

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache], layer: PerLayer, inputs: LayerInputs
    ) -> tuple[tuple[jax.Array, Cache], tuple[RouterReport | None, dict[str, Array] | None]]:
        """((x: [B, T, D], cache), inputs of this layer, inputs of all layers) -> ((x, cache),
        (router's report, keys and values of cross-attention for the cache)).
        """
        c, rules = self.config, self.rules
        x, cache = carry
        x = checkpoint_name(x, "input")
        # GPT-2: the residual stream keeps its size with depth
        branches = 2 if inputs.memory is None else 3
        out_scale = (branches * c.scaling.init_layers(c.num_layers)) ** -0.5
        dropout = nn.Dropout(c.dropout, deterministic=not inputs.train)
        # with a cache there may be one token, which the residual stream can't be sharded over
        length = "act_length" if inputs.index is None else "length"

        def gather(x: jax.Array) -> jax.Array:
            return rules.constrain(x, "batch", "length", "act_embed")

        def scatter(x: jax.Array) -> jax.Array:
            return rules.constrain(x, "batch", length, "act_embed")

        def before(name: str, x: jax.Array) -> jax.Array:
            return x if c.norm_placement == "post" else self._norm(name, x)

        def branch(name: str, y: jax.Array) -> jax.Array:
            y = scatter(y)
            y = self._norm(f"{name}_post", y) if c.norm_placement == "both" else y
            return times(dropout(y), c.scaling.branch)

        def after(name: str, x: jax.Array) -> jax.Array:
            return self._norm(name, x) if c.norm_placement == "post" else x

        def feed_forward(x: jax.Array) -> tuple[jax.Array, RouterReport | None]:
            if c.moe.num_experts:
                non_padding = inputs.masks[0].query_segments != 0
                return Moe(c, rules, out_scale, name="moe")(x, non_padding)
            return Mlp(c, rules, c.mlp_size, c.mlp_bias, out_scale, name="mlp")(gather(x)), None

        h = gather(before("attention", x))
        y, cache = Attention(c, rules, out_scale, name="attention")(h, inputs, layer, cache)
        x = x + branch("attention", y)
        encoded = layer.encoded
        if c.parallel_block:
            y, report = feed_forward(h)
            x = after("attention", x + branch("mlp", y))
        else:
            x = after("attention", x)
            if inputs.memory is not None:
                h = gather(before("cross_attention", x))
                cross = CrossAttention(c, rules, out_scale, name="cross_attention")
                y, encoded = cross(h, inputs, encoded)
                x = after("cross_attention", x + branch("cross_attention", y))
            y, report = feed_forward(before("mlp", x))
            x = after("mlp", x + branch("mlp", y))
        x = scatter(x)
        self.sow("intermediates", "hidden", x)
        sow_hidden(self, x, inputs.masks[0].query_segments != 0)
        return (x, cache), (report, None if cache is None else encoded)
