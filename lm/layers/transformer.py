"""A stack of blocks with what its layers share: masks, rotary tables, biases, cache, final norm."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.layers import cache as kv_cache
from lm.layers import positions as pe
from lm.layers.attention import kernels
from lm.layers.attention.attention import EncoderStates, LayerInputs
from lm.layers.attention.dot_product import Mask, self_mask
from lm.layers.block import Block, BlockConfig
from lm.layers.norm import Norm
from lm.layers.stack import run, stack
from lm.parallel import zigzag
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens


class Transformer(nn.Module):
    """From embedded tokens to hidden states. Parameters: `layers` (stacked), and `norm` and
    `relative` where used.

    causal: whether a token sees only itself and those before it (and a bidirectional prefix).
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
    ) -> tuple[jax.Array, Cache | None, Any]:
        """(hidden states [B, T, D], cache, reports of experts [L, ...]) of embeddings x: [B, T, D].

        memory: what layers with cross-attention read; a cache keeps it for the calls that follow.
        order: that of the length, as in `Mask`.
        """
        if memory is None and cache is not None:
            memory = cache.get("memory")
        if cache is None:
            marks, masks = None, self._masks(inputs, order)
        else:
            marks, seen = kv_cache.mark(cache, inputs)
            masks = tuple(
                Mask(inputs.segments, inputs.positions, s["segments"], s["positions"]) for s in seen
            )
        biases = tuple(self._bias(mask) for mask in masks)
        context = self._context(inputs, masks, biases, train)
        if cache is not None:
            context = context.replace(index=cache["index"])  # pyright: ignore
        per_layer = self._per_layer()
        if memory is not None:
            context = context.replace(memory=EncoderStates(memory.segments, memory.hidden))  # pyright: ignore
            if memory.hidden is None:
                per_layer["kept"] = {"key": memory.key, "value": memory.value}
        layer_cache = None if cache is None else cache["layers"]
        block = Block(self.config, self.rules, parent=None)
        (x, layer_cache), (reports, kept) = run(
            self.layers, block, (x, layer_cache), per_layer, context
        )
        if cache is not None:
            index = cache["index"] + inputs.ids.shape[1]
            cache = {"index": index, "layers": layer_cache, "marks": marks}
            if memory is not None:
                cache["memory"] = EncoderStates(memory.segments, **kept)
        return self.finish(x), cache, reports

    def finish(self, x: Array) -> jax.Array:
        """What the vocabulary projection reads of a residual stream x: [B, T, D]."""
        x = x if self.config.norm_placement == "post" else self.norm(x)
        return self.rules.constrain(x, "act_batch", "length", "act_embed")

    def _masks(self, tokens: Tokens, order: int) -> tuple[Mask, ...]:
        """Of a stream over itself, one for each kind of layer."""
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

    def _per_layer(self) -> dict[str, Any]:
        c = self.config
        kinds = [c.kinds.index(kind) for kind in c.layer_kinds]
        places = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
        several = len(c.kinds) > 1
        return {
            "kind": jnp.asarray(kinds, jnp.int32) if several else None,
            "layer": jnp.asarray(places, jnp.int32),
        }

    def _context(self, tokens: Tokens, masks: Any, biases: Any, train: bool) -> LayerInputs:
        """What the layers share on tokens that continue nothing."""
        cos, sin = self._rotary(tokens.positions)
        return LayerInputs(masks, biases, cos, sin, index=None, train=train)

    def _rotary(self, where: Array) -> tuple[Array | None, Array | None]:
        c = self.config
        if c.positions != "rotary":
            return None, None
        tables = [
            pe.rotary_tables(
                where,
                *pe.rotary_frequencies(c.rotary, c.head_size, local=kind == "local"),
            )
            for kind in c.kinds
        ]
        cos, sin = zip(*tables, strict=True)
        return jnp.stack(cos), jnp.stack(sin)

    def _bias(self, mask: Mask) -> jax.Array | None:
        kind = self.config.positions
        if kind not in ("relative", "alibi"):
            return None
        if mask.order:  # inside a segment, distance in positions is distance in places
            places = zigzag.positions(mask.key_positions.shape[1], mask.order)
            distance = jnp.asarray(places[None, :] - places[:, None])[None]
        else:
            distance = mask.key_positions[:, None, :] - mask.query_positions[:, :, None]
        if kind == "relative":
            return self.relative(distance)
        slopes = pe.alibi_slopes(self.config.num_heads)
        return jnp.abs(distance)[:, None].astype(jnp.float32) * -slopes[:, None, None]


def make_output(hidden: jax.Array, cache: Cache | None, reports: Any) -> Output:
    """reports: of experts, stacked over layers; None without any."""
    if reports is None:
        return Output(hidden=hidden, cache=cache)
    report = reports.mean()
    return Output(hidden=hidden, cache=cache, aux=report.aux, stats=report.stats)


def check_kernels(config: BlockConfig, rules: Rules) -> None:
    """Raises ValueError where the mesh can't do the attention that the config asks for."""
    kernels.check(
        config.attention_kernel,
        config.sequence_parallel,
        rules,
        head_dim=config.head_size,
        dtype=jnp.dtype(config.dtype),
        softcap=config.attention_softcap is not None,
        bias=config.positions in ("relative", "alibi"),
        dropout=config.attention_dropout > 0,
    )


def check_stages(name: str, rules: Rules) -> None:
    """Raises ValueError on a mesh with stages, for models that don't run in a pipeline."""
    if (stages := rules.size("layers")) > 1:
        raise ValueError(
            f"config.mesh.stage ({stages}) must be 1 for config.model.name={name}: the pipeline is "
            "the decoder's; spread parameters with config.mesh.fsdp and tensor"
        )
