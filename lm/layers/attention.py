"""Multi-head, grouped-query and multi-query attention (arXiv:1706.03762, arXiv:2305.13245) over
packed segments.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.kernels.attention_kernels import attend
from lm.kernels.dot_product import Mask, cross_mask
from lm.layers import activation_statistics
from lm.layers import cache as kv_cache
from lm.layers.linear import hidden_linear
from lm.layers.norm import Norm
from lm.layers.positions import rotate
from lm.parallel.sharding import Rules
from lm.types import Array, Cache

if TYPE_CHECKING:
    from lm.layers.block_config import BlockConfig

KeyValues: TypeAlias = dict[str, Array]  # `key` and `value`


@flax.struct.dataclass
class EncoderStates:
    """Inputs of cross-attention: the states of an encoder, or the keys and values that every layer
    has made of them.
    """

    segments: Array  # int32 [B, S]; tokens read those of their own segment
    hidden: Array | None = None  # [B, S, D]
    encoded: KeyValues | None = None  # [L, B, K, S, H]


@flax.struct.dataclass
class LayerInputs:
    """Inputs that all layers of one forward pass share; tuples have one entry per kind of layer."""

    masks: tuple[Mask, ...]
    biases: tuple[Array | None, ...]  # float32 [B or 1, N, T, S], added to the scores
    rotary: tuple[Array, Array] | None = None  # cos and sin, float32 [kinds, B, T, H/2]
    index: Array | None = None  # int32 []: tokens that the cache held before
    memory: EncoderStates | None = None  # for layers with cross-attention
    train: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class PerLayer:
    """Inputs of one layer, or, with a leading [L], of a stack of layers.

    Layers of different kinds share one scanned body: the kind of each is data.
    """

    kind: Array | None  # int32 [], an index into `BlockConfig.kinds`; None: there is one
    index: Array  # int32 []: the layer's number among those of its kind, as in the cache
    encoded: KeyValues | None = None  # [B, K, S, H], of an encoder's states, from a cache


class MultiHead(nn.Module):
    """Projections of self- and cross-attention. Parameters: `query` `key` `value` `out`, and
    `query_norm` `key_norm` [H] with `qk_norm`.
    """

    config: BlockConfig
    rules: Rules
    out_scale: float = 1.0  # factor on the initial weights of `out`

    def _project(self, x: jax.Array, name: str) -> jax.Array:
        """x: [B, T, D] -> queries [B, T, N, H], or keys or values [B, T, K, H]."""
        c, scale = self.config, 1.0
        heads = {"heads": c.num_heads} if name == "query" else {"kv_heads": c.kv_heads}
        if name == "query" and c.init_std is None and c.query_scale is not None:
            # weights of deviation fan_in ** -0.5 give scores of deviation 1 at any scale (T5)
            scale = c.head_size**-0.5 / c.query_scale
        x = hidden_linear(
            c,
            self.rules,
            {"embed": c.embed_dim},
            {**heads, "head_dim": c.head_size},
            bias=c.qkv_bias,
            init_scale=scale,
            name=name,
        )(x)
        if name == "value" or not c.qk_norm:
            return x
        kind = "rms" if c.norm == "layer" else c.norm
        return Norm(kind, c.norm_eps, dtype=jnp.dtype(c.dtype), name=f"{name}_norm")(x)

    def _by_head(self, x: jax.Array, name: str, length: str | None = "length") -> jax.Array:
        """x: [B, T, N, H] -> [B, N, T, H]: products over [T, H] and [T, S] are then plain batched
        matrices.
        """
        axis = "heads" if name == "query" else "kv_heads"
        x = self.rules.constrain(jnp.swapaxes(x, 1, 2), "batch", axis, length, "head_dim")
        return checkpoint_name(x, name)

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        *,
        rng: Array | None,
        bias: Array | None = None,
    ) -> jax.Array:
        """[B, N, T, H] of q: [B, N, T, H], k and v: [B, K, S, H]."""
        c = self.config
        return attend(
            q,
            k,
            v,
            mask,
            rules=self.rules,
            # initialised on rows that are too short for any kernel
            kernel="xla" if self.is_initializing() else c.attention_kernel,
            sequence_parallel=c.sequence_parallel,
            scale=c.score_scale,
            softcap=c.attention_softcap,
            bias=bias,
            dropout=c.attention_dropout,
            dropout_rng=rng,
        )

    def _dropout_rng(self, train: bool) -> Array | None:
        return self.make_rng("dropout") if train and self.config.attention_dropout > 0 else None

    def _sow_scores(
        self,
        q: jax.Array,
        k: jax.Array,
        masks: Sequence[Mask],
        biases: Sequence[Array | None],
        kind: Array | None = None,
    ) -> None:
        """Sow statistics of the weights of q: [B, N, T, H] over k: [B, K, S, H], by the mask and
        the bias of this layer's kind.
        """
        if not activation_statistics.is_measured(self):
            return
        c = self.config
        options = {"scale": c.score_scale, "softcap": c.attention_softcap}
        kinds = [
            functools.partial(activation_statistics.attention, mask=mask, bias=bias, **options)
            for mask, bias in zip(masks, biases, strict=True)
        ]
        found = kinds[0](q, k) if kind is None else jax.lax.switch(kind, kinds, q, k)
        activation_statistics.sow(self, **found)

    def _out(self, y: jax.Array) -> jax.Array:
        """y: [B, N, T, H] -> [B, T, D]."""
        c = self.config
        out = hidden_linear(
            c,
            self.rules,
            {"heads": c.num_heads, "head_dim": c.head_size},
            {"embed": c.embed_dim},
            bias=c.out_bias,
            init_scale=self.out_scale,
            name="out",
        )
        return out(jnp.swapaxes(y, 1, 2))


class Attention(MultiHead):
    """Self-attention."""

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: LayerInputs, layer: PerLayer, cache: Cache = None
    ) -> tuple[jax.Array, Cache]:
        """x: [B, T, D] -> ([B, T, D], cache)."""
        q, k, v = (self._project(x, name) for name in ("query", "key", "value"))
        if inputs.rotary is not None:
            cos, sin = (table[0 if layer.kind is None else layer.kind] for table in inputs.rotary)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (self._by_head(x, n) for x, n in ((q, "query"), (k, "key"), (v, "value")))
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", k)
        self._sow_scores(q, k, inputs.masks, inputs.biases, layer.kind)
        rng = self._dropout_rng(inputs.train)

        def of_kind(
            i: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache
        ) -> tuple[jax.Array, Cache]:
            if cache is not None and inputs.index is not None:
                k, v, entry = kv_cache.append(cache[i], k, v, layer.index, inputs.index)
                cache = (*cache[:i], entry, *cache[i + 1 :])
            return self._attend(q, k, v, inputs.masks[i], rng=rng, bias=inputs.biases[i]), cache

        if layer.kind is None:
            y, cache = of_kind(0, q, k, v, cache)
        else:
            kinds = [functools.partial(of_kind, i) for i in range(len(inputs.masks))]
            y, cache = jax.lax.switch(layer.kind, kinds, q, k, v, cache)
        return self._out(y), cache


class CrossAttention(MultiHead):
    """Attention of a decoder's tokens to an encoder's: to all of the same segment number."""

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: LayerInputs, encoded: KeyValues | None
    ) -> tuple[jax.Array, KeyValues]:
        """x: [B, T, D] -> ([B, T, D], keys and values [B, K, S, H]).

        encoded: the keys and values that an earlier call returned; None: those of the encoder's
        states.
        """
        memory = inputs.memory
        assert memory is not None, "cross-attention needs an encoder"
        q = self._by_head(self._project(x, "query"), "query")
        if encoded is None:
            assert memory.hidden is not None, "no states of the encoder, and no cache of their keys"
            encoded = {  # all of them on every device of the length, whose queries may need any
                name: self._by_head(self._project(memory.hidden, name), name, length=None)
                for name in ("key", "value")
            }
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", encoded["key"])
        rng = self._dropout_rng(inputs.train)
        mask = cross_mask(inputs.masks[0].query_segments, memory.segments)
        self._sow_scores(q, encoded["key"], (mask,), (None,))
        y = self._attend(q, encoded["key"], encoded["value"], mask, rng=rng)
        # a softmax over hidden keys only is their mean: a segment without a source reads none
        some = jnp.any(mask.allowed(), axis=-1)[:, None, :, None]  # [B, 1, T, 1]
        return self._out(jnp.where(some, y, 0)), encoded
