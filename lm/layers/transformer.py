"""A stack of blocks, with masks, rotary tables, biases, cache and final norm."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.layers import cache as kv_cache
from lm.layers import positions as pe
from lm.layers.attention import kernels, splash
from lm.layers.attention.attention import EncoderStates, KeyValues, LayerInputs, PerLayer
from lm.layers.attention.dot_product import Mask, self_mask
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

    causal: a token sees only itself and those before it (and a bidirectional prefix).
    """

    config: BlockConfig
    rules: Rules
    causal: bool = True

    def setup(self) -> None:
        c = self.config
        if c.positions == "relative":
            self.relative = pe.RelativeBias(
                c.num_heads, c.relative_buckets, c.relative_max_distance, not self.causal
            )
        unroll = c.num_layers if c.scan_unroll == -1 else c.scan_unroll
        self.layers = stack(Block, c.num_layers, remat=c.remat, unroll=unroll)(c, self.rules)
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
        index = marks = layer_cache = None
        masks = self._masks(inputs, order)
        if cache is not None:
            index, layer_cache = cache["index"], cache["layers"]
            memory = cache.get("memory") if memory is None else memory
            marks, seen = kv_cache.mark(cache, inputs)
            masks = tuple(
                Mask(inputs.segments, inputs.positions, s["segments"], s["positions"]) for s in seen
            )
        biases = tuple(self._bias(mask) for mask in masks)
        encoded = None
        if memory is not None:
            if memory.key is not None and memory.value is not None:
                encoded = {"key": memory.key, "value": memory.value}
            memory = EncoderStates(memory.segments, memory.hidden)
        shared = self._shared(inputs, masks, biases, train=train, index=index, memory=memory)
        block = Block(self.config, self.rules, parent=None)
        (x, layer_cache), (reports, encoded) = run(
            self.layers, block, (x, layer_cache), self._per_layer(encoded), shared
        )
        if cache is not None:
            index = cache["index"] + inputs.ids.shape[1]
            cache = {"index": index, "layers": layer_cache, "marks": marks}
            if memory is not None:
                cache["memory"] = EncoderStates(memory.segments, **encoded)
        return self.finish(x), cache, reports

    def finish(self, x: Array) -> jax.Array:
        """The input of the vocabulary projection, from a residual stream x: [B, T, D]."""
        x = x if self.config.norm_placement == "post" else self.norm(x)
        return self.rules.constrain(x, "act_batch", "length", "act_embed")

    def _masks(self, tokens: Tokens, order: int) -> tuple[Mask, ...]:
        """The masks of a stream over itself, one for each kind of layer."""
        return (self_mask(tokens, self.causal, order),) * len(self.config.kinds)

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `length` tokens of `batch_size` streams."""
        c = self.config
        return kv_cache.init(
            c.windows,
            tuple(c.layer_kinds.count(kind) for kind in c.kinds),
            batch_size=batch_size,
            length=length,
            num_kv_heads=c.kv_heads,
            head_dim=c.head_size,
            dtype=jnp.dtype(c.dtype),
            rules=self.rules,
        )

    def _per_layer(self, encoded: KeyValues | None = None) -> PerLayer:
        c = self.config
        kinds = [c.kinds.index(kind) for kind in c.layer_kinds]
        index = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
        kind = jnp.asarray(kinds, jnp.int32) if len(c.kinds) > 1 else None
        return PerLayer(kind, jnp.asarray(index, jnp.int32), encoded)

    def _shared(
        self,
        tokens: Tokens,
        masks: tuple[Mask, ...],
        biases: tuple[Array | None, ...],
        *,
        train: bool,
        index: Array | None = None,
        memory: EncoderStates | None = None,
    ) -> LayerInputs:
        c, cos, sin = self.config, None, None
        if c.positions == "rotary":
            tables = [
                pe.rotary_tables(
                    tokens.positions,
                    *pe.rotary_frequencies(c.rotary, c.head_size, local=kind == "local"),
                )
                for kind in c.kinds
            ]
            cos, sin = (jnp.stack(table) for table in zip(*tables, strict=True))
        return LayerInputs(masks, biases, cos, sin, index, memory, train)

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
    report = reports.mean()
    return Output(hidden=hidden, cache=cache, aux=report.aux, stats=report.stats)


def check_kernels(config: BlockConfig, rules: Rules) -> None:
    """Raise ValueError unless a kernel has the features of the config, whatever the length."""
    c, shards = config, rules.size("length")
    asked = {"bias": c.positions in ("relative", "alibi"), "dropout": c.attention_dropout > 0}
    shape = (1, 1, 2 * shards * splash.LANES, c.head_size)
    none: Any = None
    kernels.choose(
        c.attention_kernel,
        rules,
        Mask(none, none, none, none, order=1),
        jax.ShapeDtypeStruct(shape, jnp.dtype(c.dtype)),
        sequence_parallel=c.sequence_parallel,
        softcap=c.attention_softcap is not None,
        **asked,
    )
    if c.sequence_parallel == "ring" and shards > 1:
        for feature, reason in (
            ("bias", "adds no bias to scores, as model.positions asks for"),
            ("dropout", "drops no weights, as model.attention_dropout asks for"),
        ):
            if asked[feature]:
                raise ValueError(f"config.model.sequence_parallel=ring {reason}: set it to gather")


def check_stages(name: str, rules: Rules) -> None:
    """Raise ValueError on a mesh with stages, for models that don't run in a pipeline."""
    if (stages := rules.size("layers")) > 1:
        raise ValueError(
            f"config.mesh.stage ({stages}) must be 1 for config.model.name={name}: the pipeline is "
            "the decoder's; spread parameters with config.mesh.fsdp and tensor"
        )
