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
from lm.layers.dot_product import Mask
from lm.layers.kernels import attend
from lm.layers.linear import Linear
from lm.layers.lora import LoraConfig
from lm.layers.norm import Norm
from lm.layers.positions import rotate
from lm.sharding import Rules
from lm.types import Array


@flax.struct.dataclass
class Context:
    """What every layer of one forward pass shares. Lists have one entry per kind of layer (see
    `windows`).
    """

    masks: tuple[Mask, ...]
    biases: tuple[Array | None, ...]  # float32 [B or 1, N, T, S], added to the scores
    cos: Array | None  # float32 [kinds, B, T, H/2]
    sin: Array | None
    index: Array | None  # int32 []: tokens that the cache held before
    train: bool = flax.struct.field(pytree_node=False, default=False)


class Attention(nn.Module):
    """Self-attention. Parameters: `query` `key` `value` `out`, and `query_norm` `key_norm` [H] with
    `qk_norm`.

    `windows` lists the kinds of layer of the model (None sees everything); which kind this layer
    is, is data, so that layers of different kinds share one scanned body. `kernel` and
    `sequence_parallel` are those of `lm.layers.kernels`.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rules: Rules
    windows: tuple[int | None, ...] = (None,)
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    norm: str = "rms"
    norm_eps: float = 1e-6
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    kernel: str = "auto"
    sequence_parallel: str = "gather"
    dtype: Any = jnp.float32
    init_std: float | None = None
    out_scale: float = 1.0
    lora: LoraConfig = LoraConfig()

    def _heads(self, name: str, num: int, axis: str) -> Linear:
        return Linear(
            (self.embed_dim,),
            (num, self.head_dim),
            ("embed",),
            (axis, "head_dim"),
            self.rules,
            self.qkv_bias,
            self.dtype,
            self.init_std,
            lora=self.lora,
            name=name,
        )

    @nn.compact
    def __call__(
        self, x: Array, context: Context, *, kind: Array | None, layer: Array, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        """x: [B, T, D] -> ([B, T, D], cache).

        kind: int32 [], an index into `windows`, or None with a single one; layer: int32 [], the
        place of this layer among those of its kind, which is its place in the cache.
        """
        q = self._heads("query", self.num_heads, "heads")(x)  # [B, T, N, H]
        k = self._heads("key", self.num_kv_heads, "kv_heads")(x)  # [B, T, K, H]
        v = self._heads("value", self.num_kv_heads, "kv_heads")(x)
        if self.qk_norm:
            q = Norm(self.norm, self.norm_eps, dtype=self.dtype, name="query_norm")(q)
            k = Norm(self.norm, self.norm_eps, dtype=self.dtype, name="key_norm")(k)
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

        use_dropout = context.train and self.dropout > 0
        rng = self.make_rng("dropout") if use_dropout else None

        def branch(i: int) -> Any:
            def run(q: Array, k: Array, v: Array, cache: Any) -> tuple[jax.Array, Any]:
                if cache is not None:
                    k, v, entry = kv_cache.append(cache[i], k, v, layer, context.index)
                    cache = (*cache[:i], entry, *cache[i + 1 :])
                y = attend(
                    q,
                    k,
                    v,
                    context.masks[i],
                    rules=self.rules,
                    # initialised on rows that are too short for any kernel
                    kernel="xla" if self.is_initializing() else self.kernel,
                    sequence_parallel=self.sequence_parallel,
                    scale=self.head_dim**-0.5 if self.scale is None else self.scale,
                    window=self.windows[i],
                    softcap=self.softcap,
                    bias=context.biases[i],
                    dropout=self.dropout,
                    dropout_rng=rng,
                )
                return y, cache

            return run

        if kind is None:
            y, cache = branch(0)(q, k, v, cache)
        else:
            branches = [branch(i) for i in range(len(self.windows))]
            y, cache = jax.lax.switch(kind, branches, q, k, v, cache)
        y = jnp.swapaxes(y, 1, 2)  # [B, T, N, H]
        out = Linear(
            (self.num_heads, self.head_dim),
            (self.embed_dim,),
            ("heads", "head_dim"),
            ("embed",),
            self.rules,
            self.out_bias,
            self.dtype,
            self.init_std,
            self.out_scale,
            self.lora,
            name="out",
        )
        return out(y), cache
