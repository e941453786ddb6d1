"""A stack of blocks, with masks, rotary tables, biases, cache and final norm."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels import attention_kernels, splash
from lm.kernels.dot_product import Mask, self_mask
from lm.layers import cache as kv_cache
from lm.layers import positions as pe
from lm.layers.attention import EncoderStates, KeyValues, LayerInputs, PerLayer
from lm.layers.block import Block
from lm.layers.block_config import BlockConfig
from lm.layers.moe.moe import RouterReport
from lm.layers.norm import Norm
from lm.layers.stack import run, stack
from lm.parallel import zigzag
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens


class Transformer(nn.Module):
    """A map from embedded tokens to hidden states. Parameters: `layers` (stacked), and `norm` and
    `relative` where used.
    """

    config: BlockConfig
    rules: Rules

    def setup(self) -> None:
        c = self.config
        if c.positions == "relative":
            self.relative = pe.RelativeBias(
                c.num_heads, c.relative_buckets, c.relative_max_distance, not c.is_causal
            )
        self.layers = stack(Block, c.num_layers, remat=c.remat, unroll=c.unroll)(c, self.rules)
        if c.norm_placement != "post":
            self.norm = Norm(c.norm, c.norm_eps, c.norm_bias, jnp.dtype(c.dtype))

    def run(
        self,
        x: Array,
        inputs: Tokens,
        *,
        memory: EncoderStates | None = None,
        cache: Cache | None = None,
        order: int = 1,
        train: bool = False,
    ) -> tuple[jax.Array, Cache | None, RouterReport | None]:
        """(hidden states [B, T, D], cache, reports of routers [L, ...]) of embeddings x: [B, T, D].

        memory: states for cross-attention; a cache keeps them for the calls that follow.
        order: that of the length, as in `Mask`.
        """
        if cache is not None and inputs.bidirectional is not None:
            raise ValueError(
                "a cache keeps no bidirectional marks: encode such a prefix without one"
            )
        index = marks = layer_cache = encoded = None
        masks = self._masks(inputs, order)
        if cache is not None:
            index, layer_cache = cache["index"], cache["layers"]
            memory = cache.get("memory") if memory is None else memory
            marks, seen = kv_cache.mark(cache["marks"], inputs, cache["index"])
            masks = tuple(
                dataclasses.replace(
                    mask, key_segments=s["segments"], key_positions=s["positions"], order=None
                )
                for mask, s in zip(masks, seen, strict=True)
            )
        if memory is not None:
            memory, encoded = dataclasses.replace(memory, encoded=None), memory.encoded
        biases = tuple(self._bias(mask) for mask in masks)
        rotary = self._rotary(inputs.positions)
        shared = LayerInputs(masks, biases, rotary, index, memory, train)
        block = Block(self.config, self.rules, parent=None)
        (x, layer_cache), (reports, encoded) = run(
            self.layers, block, (x, layer_cache), self._per_layer(encoded), shared
        )
        if cache is not None:
            index = cache["index"] + inputs.ids.shape[1]
            cache = {"index": index, "layers": layer_cache, "marks": marks}
            if memory is not None:
                cache["memory"] = EncoderStates(memory.segments, encoded=encoded)
        return self.finish(x), cache, reports

    def finish(self, x: Array) -> jax.Array:
        """The input of the vocabulary projection, from a residual stream x: [B, T, D]."""
        x = x if self.config.norm_placement == "post" else self.norm(x)
        return self.rules.constrain(x, "act_batch", "length", "act_embed")

    def _masks(self, tokens: Tokens, order: int) -> tuple[Mask, ...]:
        """The masks of a stream over itself, one for each kind of layer."""
        c = self.config
        return tuple(self_mask(tokens, c.is_causal, order, window) for window in c.windows)

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `length` tokens of `batch_size` streams."""
        return kv_cache.init(self.config, self.rules, batch_size, length)

    def _per_layer(self, encoded: KeyValues | None = None) -> PerLayer:
        c = self.config
        kinds = [c.kinds.index(kind) for kind in c.layer_kinds]
        index = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
        kind = jnp.asarray(kinds, jnp.int32) if len(c.kinds) > 1 else None
        return PerLayer(kind, jnp.asarray(index, jnp.int32), encoded)

    def _rotary(self, positions: Array) -> tuple[Array, Array] | None:
        """cos and sin, float32 [kinds, B, T, H/2], of positions: int32 [B, T]."""
        c = self.config
        if c.positions != "rotary":
            return None
        is_local = [kind == "local" for kind in c.kinds]
        frequencies = [pe.rotary_frequencies(c.rotary, c.head_size, local) for local in is_local]
        tables = [pe.rotary_tables(positions, *each) for each in frequencies]
        return jax.tree.map(lambda *kinds: jnp.stack(kinds), *tables)

    def _bias(self, mask: Mask) -> jax.Array | None:
        kind = self.config.positions
        if kind not in ("relative", "alibi"):
            return None
        if mask.order:  # inside a segment, positions differ as indices do
            index = zigzag.positions(mask.key_positions.shape[1], mask.order)
            distance = jnp.asarray(index[None, :] - index[:, None])[None]
        else:
            distance = mask.key_positions[:, None, :] - mask.query_positions[:, :, None]
        if kind == "relative":
            return self.relative(distance)
        slopes = pe.alibi_slopes(self.config.num_heads)
        return jnp.abs(distance)[:, None].astype(jnp.float32) * -slopes[:, None, None]


def make_output(hidden: jax.Array, cache: Cache | None, reports: RouterReport | None) -> Output:
    """reports: of routers, stacked over layers; None without any."""
    if reports is None:
        return Output(hidden=hidden, cache=cache)
    report = jax.tree.map(lambda x: jnp.mean(x, axis=0), reports)
    return Output(hidden=hidden, cache=cache, aux=report.aux, stats=report.stats)


def check_kernels(config: BlockConfig, rules: Rules) -> None:
    """Raise ValueError unless a kernel has the features of the config, whatever the length."""
    c, none = config, cast(Any, None)
    shape = (1, 1, 2 * rules.size("length") * splash.LANES, c.head_size)
    attention_kernels.choose(
        c.attention_kernel,
        rules,
        Mask(none, none, none, none, order=1),
        jax.ShapeDtypeStruct(shape, jnp.dtype(c.dtype)),
        sequence_parallel=c.sequence_parallel,
        softcap=c.attention_softcap is not None,
        bias=c.positions in ("relative", "alibi"),
        dropout=c.attention_dropout > 0,
    )
