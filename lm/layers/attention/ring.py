"""Ring attention (arXiv:2310.01889): keys and values travel, queries stay.

Each of n devices sees the keys of each device once, in n steps, keeping the maximum and the sum of
its softmax (arXiv:2205.14135). The backward pass sends keys and values round once more, with their
gradients, and computes the scores again: neither [T, S] scores nor gathered keys ever exist. A
block whose keys are all hidden costs its mask and no more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.layers.attention.dot_product import NEGATIVE, Mask, capped_scores
from lm.layers.chunking import num_chunks
from lm.types import Array

BLOCK = 1024  # queries, and keys, whose scores exist at once

T = TypeVar("T")
KeyMarks: TypeAlias = tuple[Array, Array, Array | None]  # segments, positions, bidirectional
Keys: TypeAlias = tuple[Array, Array, KeyMarks]
Softmax: TypeAlias = tuple[Array, Array, Array]  # maximum, sum and weighted values so far
Pair: TypeAlias = tuple[Array, Array]  # gradients of keys and values
Residuals: TypeAlias = tuple[Array, Array, Array, Mask, Array, Array]


class Options(NamedTuple):
    axes: tuple[str, ...]
    shards: int
    scale: float
    window: int | None
    softcap: float | None


def ring_attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    *,
    axes: tuple[str, ...],
    shards: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """[B, N, T, H] of one shard inside of a `shard_map`, named "attended" with the log-sums of its
    softmax [B, N, T]. All arguments are the parts of this shard. A query that sees nothing gets 0.
    """
    options = Options(axes, shards, scale, window, softcap)
    length, missing, missing_keys = q.shape[2], -q.shape[2] % _block(q), -k.shape[2] % _block(k)
    if missing or missing_keys:  # a prime length has no equal blocks: segment 0 fills the last one
        q, k, v = (_fill(x, 2, n) for x, n in ((q, missing), (k, missing_keys), (v, missing_keys)))
        count = {"query": missing, "key": missing_keys}
        mask = jax.tree_util.tree_map_with_path(
            lambda path, x: _fill(x, 1, count[path[0].name.split("_")[0]]), mask
        )
    attended: Array = _ring(options, q, k, v, mask)  # pyright: ignore
    return attended[:, :, :length] if missing else attended


def _fill(x: Array, axis: int, count: int) -> Array:
    """`x` with `count` zeros after it along an axis."""
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(options: Options, q: Array, k: Array, v: Array, mask: Mask) -> Array:
    return _forward(options, q, k, v, mask)[0]


def _blocks(x: Array, axis: int, size: int) -> Array:
    """`x` cut along `axis` into blocks of `size`: [blocks, ...]."""
    cut = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def _join(blocks: Array, axis: int) -> Array:
    joined = jnp.moveaxis(blocks, 0, axis)
    return joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])


def _block(x: Array) -> int:
    """Tokens of x [B, N, T, H] whose scores exist at once: at most `BLOCK`."""
    return -(-x.shape[2] // num_chunks(BLOCK, 1, x.shape[2]))


def _key_blocks(mask: Mask, size: int) -> KeyMarks:
    """(segments, positions, bidirectional) of the keys, in blocks [blocks, B, size]."""
    keys = (mask.key_segments, mask.key_positions, mask.key_bidirectional)
    return jax.tree.map(lambda x: _blocks(x, 1, size), keys)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _rotate(tree: T, axes: tuple[str, ...], shards: int) -> T:
    """The arrays of the device before this one."""
    route = [(i, (i + 1) % shards) for i in range(shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, route), tree)


def _allowed(mask: Mask, query: Sequence[Array], key: KeyMarks, window: int | None) -> jax.Array:
    """bool [B, 1, t, s] of one block, from (segments, positions) and (..., marks)."""
    return Mask(query[0], query[1], *key, causal=mask.causal).allowed(window)[:, None]


def _where_seen(allowed: Array, work: Callable[[T], T], carry: T) -> T:
    """`work` of the carry, unless the block hides all of its keys."""
    return jax.lax.cond(jnp.any(allowed), work, lambda carry: carry, carry)


def _forward(options: Options, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Residuals]:
    axes, shards, scale, window, softcap = options
    # Layers share the mask. Without this, jax takes what depends on it alone out of the loop over
    # the layers, and keeps the blocks of all steps: [T, S] numbers for every head.
    q, mask = jax.lax.optimization_barrier((q, mask))
    b, n, t, h = q.shape
    rows, columns = _block(q), _block(k)
    queries = tuple(
        _blocks(x, axis, rows)
        for x, axis in ((q, 2), (mask.query_segments, 1), (mask.query_positions, 1))
    )

    def block(carry: Softmax, query: tuple[Array, ...], key: Keys) -> Softmax:
        q, *own = query
        k, v, marks = key
        allowed = _allowed(mask, own, marks, window)

        def work(carry: Softmax) -> Softmax:
            top, total, acc = carry
            scores = capped_scores(q, k, scale=scale, softcap=softcap)
            scores = jnp.where(allowed, scores, NEGATIVE)
            new = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            # zero, also where a row has seen nothing yet and `new` is as low as what it hides
            weights = jnp.where(allowed, jnp.exp(scores - new), 0.0)
            fade = jnp.exp(top - new)
            total = fade * total + jnp.sum(weights, axis=-1, keepdims=True)
            grouped = weights.astype(v.dtype).reshape(b, v.shape[1], -1, columns)
            y = _product("bkts,bksh->bkth", grouped, v)
            return new, total, fade * acc + y.reshape(b, n, -1, h)

        return _where_seen(allowed, work, carry)

    def step(carry: tuple[Softmax, Keys], _: None) -> tuple[tuple[Softmax, Keys], None]:
        state, travelling = carry
        k, v, marks = travelling
        keys = (_blocks(k, 2, columns), _blocks(v, 2, columns), marks)

        def row(each: tuple[Softmax, tuple[Array, ...]]) -> Softmax:
            state, query = each
            return jax.lax.scan(lambda c, key: (block(c, query, key), None), state, keys)[0]

        state = jax.lax.map(row, (state, queries))
        return (state, _rotate(travelling, axes, shards)), None

    def full(value: float, size: int) -> jax.Array:
        return jnp.full((t // rows, b, n, rows, size), value, jnp.float32)

    state = (full(NEGATIVE, 1), full(0.0, 1), full(0.0, h))
    travelling = (k, v, _key_blocks(mask, columns))
    ((top, total, acc), _), _ = jax.lax.scan(step, (state, travelling), None, length=shards)
    total = jnp.where(total > 0, total, 1.0)
    out = checkpoint_name(_join((acc / total).astype(q.dtype), 2), "attended")
    log_sum = checkpoint_name(_join(top + jnp.log(total), 2), "attended")  # [B, N, T, 1]
    return out, (q, k, v, mask, out, log_sum)


def _backward(
    options: Options, residuals: Residuals, d_out: Array
) -> tuple[Array, Array, Array, None]:
    axes, shards, scale, window, softcap = options
    q, k, v, mask, out, log_sum = residuals
    d_out, mask = jax.lax.optimization_barrier((d_out, mask))
    b, n, t, h = q.shape
    rows, columns = _block(q), _block(k)
    weight = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    queries = tuple(
        _blocks(x, axis, rows)
        for x, axis in (
            *((q, 2), (d_out, 2), (log_sum, 2), (weight, 2)),
            *((mask.query_segments, 1), (mask.query_positions, 1)),
        )
    )

    def grouped(x: Array, like: Array) -> Array:
        return x.reshape(b, k.shape[1], -1, x.shape[-1]).astype(like.dtype)  # [B, K, G * t, ...]

    def block(d_q: Array, d_key: Pair, query: tuple[Array, ...], key: Keys) -> tuple[Array, Pair]:
        q, d_out, log_sum, weight, *own = query
        k, v, marks = key
        allowed = _allowed(mask, own, marks, window)

        def work(carry: tuple[Array, Pair]) -> tuple[Array, Pair]:
            d_q, (d_k, d_v) = carry
            scores = capped_scores(q, k, scale=scale, softcap=softcap)
            p = jnp.where(allowed, jnp.exp(scores - log_sum), 0.0)  # [B, N, t, s]
            given = grouped(d_out, v)
            d_p = _product("bkth,bksh->bkts", given, v)
            d_s = p * (d_p.reshape(p.shape) - weight) * scale
            if softcap is not None:
                d_s = d_s * (1 - jnp.square(scores / softcap))
            d_s, p = grouped(d_s, k), grouped(p, v)
            d_q = d_q + _product("bkts,bksh->bkth", d_s, k).reshape(d_q.shape)
            d_k = d_k + _product("bkts,bkth->bksh", d_s, grouped(q, k))
            return d_q, (d_k, d_v + _product("bkts,bkth->bksh", p, given))

        return _where_seen(allowed, work, (d_q, d_key))

    def step(carry: tuple[Array, Keys, Pair], _: None) -> tuple[tuple[Array, Keys, Pair], None]:
        d_q, travelling, d_keys = carry
        k, v, marks = travelling
        keys = (_blocks(k, 2, columns), _blocks(v, 2, columns), marks)

        def row(d_keys: Pair, each: tuple[Array, tuple[Array, ...]]) -> tuple[Pair, Array]:
            d_q, query = each

            def column(d_q: Array, each: tuple[Keys, Pair]) -> tuple[Array, Pair]:
                key, d_key = each
                return block(d_q, d_key, query, key)

            d_q, d_keys = jax.lax.scan(column, d_q, (keys, d_keys))
            return d_keys, d_q

        d_keys, d_q = jax.lax.scan(row, d_keys, (d_q, queries))
        return (d_q, *_rotate((travelling, d_keys), axes, shards)), None

    d_q = jnp.zeros((t // rows, b, n, rows, h), jnp.float32)
    zeros = jnp.zeros((k.shape[2] // columns, b, k.shape[1], columns, h), jnp.float32)
    carry = (d_q, (k, v, _key_blocks(mask, columns)), (zeros, zeros))
    # after as many steps as there are devices, the gradients are back where their keys are
    (d_q, _, (d_k, d_v)), _ = jax.lax.scan(step, carry, None, length=shards)
    d_q, d_k, d_v = (_join(d, 2).astype(x.dtype) for d, x in ((d_q, q), (d_k, k), (d_v, v)))
    return d_q, d_k, d_v, None


_ring.defvjp(_forward, _backward)
