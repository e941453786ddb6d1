"""Masks, and attention by its equation: scores, softmax, weighted sum, as plain XLA."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from lm.types import Array, Tokens

NEGATIVE = -1e30  # finite, so that a row that sees nothing gives no NaN


@flax.struct.dataclass
class Mask:
    """The keys that each query sees, by segments and positions: no [T, S] array is stored.

    A key is seen from its own segment (never segment 0, padding): at positions up to the query's
    when `causal`, or anywhere in a bidirectional prefix; and, with a window, only less than
    `window` away.

    order: the number of shards whose zig-zag order (`lm.parallel.zigzag`) the length has, for
    queries and keys of one stream (1: as it came). None: they are of two, as with a cache, so that
    their indices say nothing.
    """

    query_segments: Array  # int32 [B, T]
    query_positions: Array  # int32 [B, T]
    key_segments: Array  # int32 [B, S]
    key_positions: Array  # int32 [B, S]
    key_bidirectional: Array | None = None  # bool [B, S]
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    order: int | None = flax.struct.field(pytree_node=False, default=None)
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    def allowed(self) -> jax.Array:
        """bool [B, T, S]."""
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        seen = jnp.ones_like(distance, bool)
        if self.causal:
            seen = distance >= 0
            if self.key_bidirectional is not None:
                seen |= self.key_bidirectional[:, None, :]
        if self.window is not None:
            seen &= jnp.abs(distance) < self.window
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        return seen & same & (self.key_segments != 0)[:, None, :]


def self_mask(
    tokens: Tokens, causal: bool = True, order: int = 1, window: int | None = None
) -> Mask:
    """The mask of a stream of tokens over itself."""
    own = tokens.segments, tokens.positions
    return Mask(*own, *own, tokens.bidirectional, causal, order, window)


def cross_mask(query_segments: Array, key_segments: Array) -> Mask:
    """The mask of one stream over another, of which it sees all tokens of the same segment number:
    int32 [B, T] and [B, S].
    """
    query_positions, key_positions = jnp.zeros_like(query_segments), jnp.zeros_like(key_segments)
    return Mask(query_segments, query_positions, key_segments, key_positions, causal=False)


def capped_scores(q: Array, k: Array, *, scale: float, softcap: float | None) -> jax.Array:
    """Scaled products of q: [B, N, T, H] and k: [B, K, S, H], soft-capped: float32 [B, N, T, S]."""
    b, n, t, h = q.shape
    groups = (q * scale).reshape(b, k.shape[1], -1, h)  # [B, K, G * T, H]
    scores = jnp.einsum("bkth,bksh->bkts", groups, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, n, t, -1)
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def attention_scores(
    q: Array,
    k: Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Array | None = None,
) -> jax.Array:
    """Logits of the attention weights, float32 [B, N, T, S], of q: [B, N, T, H] over k: [B, K, S,
    H].

    Query head n reads kv head n // G. Keys that the mask hides get a score that is as good as -inf.
    """
    scores = capped_scores(q, k, scale=scale, softcap=softcap)
    if bias is not None:
        scores = scores + bias
    # added, not selected: the gradient then needs no mask
    return scores + jnp.where(mask.allowed(), 0.0, NEGATIVE)[:, None]


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Array | None = None,
    dropout: float = 0.0,
    dropout_rng: Array | None = None,
) -> jax.Array:
    """Softmax of the scores times values: [B, N, T, H] of q: [B, N, T, H], k and v: [B, K, S, H].

    The softmax, in float32, is normalised after the product with v: [T, H] numbers to divide
    instead of [T, S], and as many fewer to read for the row sums of its gradient.
    """
    scores = attention_scores(q, k, mask, scale=scale, softcap=softcap, bias=bias)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)  # [B, N, T, S]
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if dropout_rng is not None:
        keep = jax.random.bernoulli(dropout_rng, 1 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout), 0)
    b, n, t, h = q.shape
    weights = weights.astype(v.dtype).reshape(b, v.shape[1], -1, v.shape[2])  # [B, K, G * T, S]
    y = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=jnp.float32)
    return (y.reshape(b, n, t, h) / total).astype(v.dtype)
