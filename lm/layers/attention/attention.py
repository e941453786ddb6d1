"""Multi-head, grouped-query and multi-query attention (arXiv:1706.03762, arXiv:2305.13245) over
packed segments.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.layers import cache as kv_cache
from lm.layers.attention.dot_product import Mask, cross_mask
from lm.layers.attention.kernels import attend
from lm.layers.linear import Linear
from lm.layers.lora import LoraConfig
from lm.layers.norm import Norm
from lm.layers.positions import rotate
from lm.parallel.sharding import Rules
from lm.types import Array


@flax.struct.dataclass
class EncoderStates:
    """What cross-attention reads: the states of an encoder, or the keys and values that every layer
    has made of them.
    """

    segments: Array  # int32 [B, S]; tokens read those of their own segment
    hidden: Array | None = None  # [B, S, D]
    key: Array | None = None  # [L, B, K, S, H]
    value: Array | None = None  # [L, B, K, S, H]


@flax.struct.dataclass
class LayerInputs:
    """What every layer of one forward pass shares. Lists have one entry per kind of layer (see
    `windows`).
    """

    masks: tuple[Mask, ...]
    biases: tuple[Array | None, ...]  # float32 [B or 1, N, T, S], added to the scores
    cos: Array | None  # float32 [kinds, B, T, H/2]
    sin: Array | None
    index: Array | None  # int32 []: tokens that the cache held before
    memory: EncoderStates | None = None  # for layers with cross-attention
    train: bool = flax.struct.field(pytree_node=False, default=False)


class MultiHead(nn.Module):
    """What self- and cross-attention share. Parameters: `query` `key` `value` `out`, and
    `query_norm` `key_norm` [H] with `qk_norm`.

    `kernel` and `sequence_parallel`: see `lm.layers.attention.kernels`. Scores are multiplied by
    `scale` (None: head_dim ** -0.5) and by `score_factor`, which initial weights don't make up for.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rules: Rules
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    norm: str = "rms"
    norm_eps: float = 1e-6
    scale: float | None = None
    score_factor: float = 1.0
    softcap: float | None = None
    dropout: float = 0.0
    kernel: str = "auto"
    sequence_parallel: str = "gather"
    dtype: Any = jnp.float32
    init_std: float | None = None
    init_scale: float = 1.0
    out_scale: float = 1.0
    lora: LoraConfig = LoraConfig()

    @property
    def _usual_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by."""
        return self._usual_scale * self.score_factor

    def _linear(self, name: str, num: int, axis: str, init_scale: float = 1.0) -> Linear:
        return Linear(
            (self.embed_dim,),
            (num, self.head_dim),
            ("embed",),
            (axis, "head_dim"),
            self.rules,
            self.qkv_bias,
            self.dtype,
            self.init_std,
            self.init_scale * init_scale,
            self.lora,
            name=name,
        )

    def _norm(self, x: Array, name: str) -> Array:
        return Norm(self.norm, self.norm_eps, dtype=self.dtype, name=name)(x) if self.qk_norm else x

    def _query(self, x: Array) -> jax.Array:
        """x: [B, T, D] -> [B, T, N, H]."""
        # weights of deviation fan_in ** -0.5 give scores of deviation 1, whatever their scale (T5)
        fit = self.head_dim**-0.5 / self._usual_scale if self.init_std is None else 1.0
        return self._norm(self._linear("query", self.num_heads, "heads", fit)(x), "query_norm")

    def _key_value(self, x: Array) -> tuple[jax.Array, jax.Array]:
        """x: [B, S, D] -> keys and values [B, S, K, H]."""
        k = self._linear("key", self.num_kv_heads, "kv_heads")(x)
        v = self._linear("value", self.num_kv_heads, "kv_heads")(x)
        return self._norm(k, "key_norm"), v

    def _attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Mask,
        *,
        rng: Array | None,
        window: int | None = None,
        bias: Array | None = None,
    ) -> jax.Array:
        """[B, N, T, H] of q: [B, N, T, H], k and v: [B, K, S, H]."""
        return attend(
            q,
            k,
            v,
            mask,
            rules=self.rules,
            # initialised on rows that are too short for any kernel
            kernel="xla" if self.is_initializing() else self.kernel,
            sequence_parallel=self.sequence_parallel,
            scale=self.score_scale,
            window=window,
            softcap=self.softcap,
            bias=bias,
            dropout=self.dropout,
            dropout_rng=rng,
        )

    def _dropout_rng(self, train: bool) -> Array | None:
        return self.make_rng("dropout") if train and self.dropout > 0 else None

    def _out(self, y: Array) -> jax.Array:
        """y: [B, N, T, H] -> [B, T, D]."""
        out = Linear(
            (self.num_heads, self.head_dim),
            (self.embed_dim,),
            ("heads", "head_dim"),
            ("embed",),
            self.rules,
            self.out_bias,
            self.dtype,
            self.init_std,
            self.init_scale * self.out_scale,
            self.lora,
            name="out",
        )
        return out(jnp.swapaxes(y, 1, 2))


class Attention(MultiHead):
    """Self-attention.

    `windows` lists the kinds of layer of the model (None sees everything); which kind this layer
    is, is data, so that layers of different kinds share one scanned body.
    """

    windows: tuple[int | None, ...] = (None,)

    @nn.compact
    def __call__(
        self, x: Array, context: LayerInputs, *, kind: Array | None, layer: Array, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        """x: [B, T, D] -> ([B, T, D], cache).

        kind: int32 [], an index into `windows`, or None with a single one; layer: int32 [], the
        place of this layer among those of its kind, which is its place in the cache.
        """
        q = self._query(x)  # [B, T, N, H]
        k, v = self._key_value(x)  # [B, T, K, H]
        if context.cos is not None and context.sin is not None:
            cos, sin = (table[0 if kind is None else kind] for table in (context.cos, context.sin))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # heads before length: products over [T, H] and [T, S] are then plain batched matrices
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        q = self.rules.constrain(q, "batch", "heads", "length", "head_dim")
        k = self.rules.constrain(k, "batch", "kv_heads", "length", "head_dim")
        v = self.rules.constrain(v, "batch", "kv_heads", "length", "head_dim")
        q, k, v = (checkpoint_name(a, n) for a, n in ((q, "query"), (k, "key"), (v, "value")))
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", k)

        rng = self._dropout_rng(context.train)

        def branch(i: int) -> Any:
            def run(q: Array, k: Array, v: Array, cache: Any) -> tuple[jax.Array, Any]:
                if cache is not None and context.index is not None:
                    k, v, entry = kv_cache.append(cache[i], k, v, layer, context.index)
                    cache = (*cache[:i], entry, *cache[i + 1 :])
                window, bias = self.windows[i], context.biases[i]
                y = self._attend(q, k, v, context.masks[i], rng=rng, window=window, bias=bias)
                return y, cache

            return run

        if kind is None:
            y, cache = branch(0)(q, k, v, cache)
        else:
            branches = [branch(i) for i in range(len(self.windows))]
            y, cache = jax.lax.switch(kind, branches, q, k, v, cache)
        return self._out(y), cache


class CrossAttention(MultiHead):
    """Attention of a decoder's tokens to an encoder's: to all of the same segment number."""

    @nn.compact
    def __call__(
        self, x: Array, context: LayerInputs, kept: dict[str, Array] | None
    ) -> tuple[jax.Array, dict[str, Array]]:
        """x: [B, T, D] -> ([B, T, D], key and value [B, K, S, H]).

        kept: the keys and values that an earlier call returned; None: those of the memory's states.
        """
        memory = context.memory
        assert memory is not None, "a layer without memory has no cross-attention"
        q = jnp.swapaxes(self._query(x), 1, 2)
        q = self.rules.constrain(q, "batch", "heads", "length", "head_dim")
        if kept is None:
            assert memory.hidden is not None, "a cache that keeps no keys keeps the states"
            k, v = (jnp.swapaxes(a, 1, 2) for a in self._key_value(memory.hidden))
            # all of them on every device of the length, whose queries may need any
            k = self.rules.constrain(k, "batch", "kv_heads", None, "head_dim")
            v = self.rules.constrain(v, "batch", "kv_heads", None, "head_dim")
            k, v = checkpoint_name(k, "key"), checkpoint_name(v, "value")
            kept = {"key": k, "value": v}
        q = checkpoint_name(q, "query")
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", kept["key"])
        rng = self._dropout_rng(context.train)
        mask = cross_mask(context.masks[0].query_segments, memory.segments)
        y = self._attend(q, kept["key"], kept["value"], mask, rng=rng)
        # a softmax over hidden keys alone is their mean: a segment without a source reads none
        some = jnp.any(mask.allowed(), axis=-1)[:, None, :, None]  # [B, 1, T, 1]
        return self._out(jnp.where(some, y, 0)), kept
