"""Ring attention (arXiv:2310.01889): keys and values travel, queries stay.

Each of n devices sees the keys of each device once, in n steps, keeping the maximum and the sum of
its softmax (arXiv:2205.14135). The backward pass sends keys and values round once more, with their
gradients, and computes the scores again: neither [T, S] scores nor gathered keys ever exist. A
block whose keys are all hidden costs its mask and no more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.kernels.chunking import num_chunks
from lm.kernels.dot_product import NEGATIVE, Mask, capped_scores
from lm.types import Array

BLOCK = 1024  # queries, and keys, whose scores exist at once

T = TypeVar("T")
OfQuery = TypeVar("OfQuery")
OfKey = TypeVar("OfKey")
Arrays: TypeAlias = tuple[Array, ...]
KeyMarks: TypeAlias = tuple[Array, Array, Array | None]  # segments, positions, bidirectional
Softmax: TypeAlias = tuple[Array, Array, Array]  # maximum, sum and weighted values so far
Pair: TypeAlias = tuple[Array, Array]  # keys and values, their gradients, or marks of queries
Residuals: TypeAlias = tuple[Array, Array, Array, Mask, Array, Array]


class Options(NamedTuple):
    axes: tuple[str, ...]
    shards: int
    scale: float
    softcap: float | None


def ring_attend(options: Options, q: Array, k: Array, v: Array, mask: Mask) -> jax.Array:
    """[B, N, T, H] of one shard inside of a `shard_map`, named "attended" with the log-sums of its
    softmax [B, N, T]. All arrays are the parts of this shard. A query that sees nothing gets 0.
    """
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


def _blocks(tree: T, axis: int, size: int) -> T:
    """Arrays cut along `axis` into blocks of `size`: [blocks, ...]."""

    def cut(x: Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)

    return jax.tree.map(cut, tree)


def _join(blocks: Array, axis: int) -> Array:
    joined = jnp.moveaxis(blocks, 0, axis)
    return joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])


def _block(x: Array) -> int:
    """Tokens of x [B, N, T, H] whose scores exist at once: at most `BLOCK`."""
    return -(-x.shape[2] // num_chunks(BLOCK, 1, x.shape[2]))


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _visit(
    options: Options,
    pair: Callable[[Array, Arrays, Pair, OfQuery, OfKey], tuple[OfQuery, OfKey]],
    queries: Arrays,
    keys: Pair,
    mask: Mask,
    of_query: OfQuery,
    of_key: OfKey,
) -> tuple[OfQuery, OfKey]:
    """`pair(allowed, queries, (k, v), of_query, of_key) -> (of_query, of_key)` for each block of
    the queries here and each block of the keys of all devices, unless it hides all of its keys.

    queries: arrays [B, N, T, ...]. of_query, of_key: results so far, [blocks, ...]; those of the
    keys travel with them, and after as many steps as there are devices are back where these are.
    allowed: bool [B, 1, t, s].
    """
    rows, columns = _block(queries[0]), _block(keys[0])
    route = [(i, (i + 1) % options.shards) for i in range(options.shards)]
    queries = _blocks(queries, 2, rows)
    query_marks = _blocks((mask.query_segments, mask.query_positions), 1, rows)
    key_marks = (mask.key_segments, mask.key_positions, mask.key_bidirectional)

    def step(
        carry: tuple[OfQuery, Pair, KeyMarks, OfKey], _: None
    ) -> tuple[tuple[OfQuery, Pair, KeyMarks, OfKey], None]:
        of_query, keys, marks, of_key = carry
        blocks = _blocks(keys, 2, columns)

        def row(of_key: OfKey, each: tuple[OfQuery, Arrays, Pair]) -> tuple[OfKey, OfQuery]:
            of_query, queries, own = each

            def column(
                of_query: OfQuery, each: tuple[Pair, KeyMarks, OfKey]
            ) -> tuple[OfQuery, OfKey]:
                keys, marks, of_key = each
                block = Mask(*own, *marks, causal=mask.causal, window=mask.window)
                allowed = block.allowed()[:, None]
                work = functools.partial(pair, allowed, queries, keys)
                return jax.lax.cond(jnp.any(allowed), work, lambda *kept: kept, of_query, of_key)

            of_query, of_key = jax.lax.scan(column, of_query, (blocks, marks, of_key))
            return of_key, of_query

        of_key, of_query = jax.lax.scan(row, of_key, (of_query, queries, query_marks))
        sent = jax.tree.map(
            lambda x: jax.lax.ppermute(x, options.axes, route), (keys, marks, of_key)
        )
        return (of_query, *sent), None

    carry = (of_query, keys, _blocks(key_marks, 1, columns), of_key)
    (of_query, _, _, of_key), _ = jax.lax.scan(step, carry, None, length=options.shards)
    return of_query, of_key


def _forward(options: Options, q: Array, k: Array, v: Array, mask: Mask) -> tuple[Array, Residuals]:
    # Layers share the mask. Without this, jax takes what depends on it alone out of the loop over
    # the layers, and keeps the blocks of all steps: [T, S] numbers for every head.
    q, mask = jax.lax.optimization_barrier((q, mask))
    b, n, t, h = q.shape
    rows = _block(q)

    def pair(
        allowed: Array, queries: Arrays, keys: Pair, state: Softmax, _: tuple[()]
    ) -> tuple[Softmax, tuple[()]]:
        [q], (k, v), (top, total, acc) = queries, keys, state
        scores = capped_scores(q, k, scale=options.scale, softcap=options.softcap)
        scores = jnp.where(allowed, scores, NEGATIVE)
        new = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        # zero, also where a row has seen nothing yet and `new` is as low as what it hides
        weights = jnp.where(allowed, jnp.exp(scores - new), 0.0)
        fade = jnp.exp(top - new)
        total = fade * total + jnp.sum(weights, axis=-1, keepdims=True)
        grouped = weights.astype(v.dtype).reshape(b, v.shape[1], -1, v.shape[2])
        y = _product("bkts,bksh->bkth", grouped, v)
        return (new, total, fade * acc + y.reshape(b, n, -1, h)), ()

    def full(value: float, size: int) -> jax.Array:
        return jnp.full((t // rows, b, n, rows, size), value, jnp.float32)

    state = (full(NEGATIVE, 1), full(0.0, 1), full(0.0, h))
    (top, total, acc), _ = _visit(options, pair, (q,), (k, v), mask, state, ())
    total = jnp.where(total > 0, total, 1.0)
    out = checkpoint_name(_join((acc / total).astype(q.dtype), 2), "attended")
    log_sum = checkpoint_name(_join(top + jnp.log(total), 2), "attended")  # [B, N, T, 1]
    return out, (q, k, v, mask, out, log_sum)


def _backward(
    options: Options, residuals: Residuals, d_out: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, out, log_sum = residuals
    d_out, mask = jax.lax.optimization_barrier((d_out, mask))
    b, n, t, h = q.shape
    rows, columns = _block(q), _block(k)
    weight = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def grouped(x: Array, like: Array) -> Array:
        return x.reshape(b, k.shape[1], -1, x.shape[-1]).astype(like.dtype)  # [B, K, G * t, ...]

    def pair(
        allowed: Array, queries: Arrays, keys: Pair, d_q: Array, d_keys: Pair
    ) -> tuple[Array, Pair]:
        (q, d_out, log_sum, weight), (k, v), (d_k, d_v) = queries, keys, d_keys
        scores = capped_scores(q, k, scale=options.scale, softcap=options.softcap)
        p = jnp.where(allowed, jnp.exp(scores - log_sum), 0.0)  # [B, N, t, s]
        given = grouped(d_out, v)
        d_p = _product("bkth,bksh->bkts", given, v)
        d_s = p * (d_p.reshape(p.shape) - weight) * options.scale
        if options.softcap is not None:
            d_s = d_s * (1 - jnp.square(scores / options.softcap))
        d_s, p = grouped(d_s, k), grouped(p, v)
        d_q = d_q + _product("bkts,bksh->bkth", d_s, k).reshape(d_q.shape)
        d_k = d_k + _product("bkts,bkth->bksh", d_s, grouped(q, k))
        return d_q, (d_k, d_v + _product("bkts,bkth->bksh", p, given))

    d_q = jnp.zeros((t // rows, b, n, rows, h), jnp.float32)
    zeros = jnp.zeros((k.shape[2] // columns, b, k.shape[1], columns, h), jnp.float32)
    queries = (q, d_out, log_sum, weight)
    d_q, (d_k, d_v) = _visit(options, pair, queries, (k, v), mask, d_q, (zeros, zeros))
    d_q, d_k, d_v = (_join(d, 2).astype(x.dtype) for d, x in ((d_q, q), (d_k, k), (d_v, v)))
    return d_q, d_k, d_v, None


_ring.defvjp(_forward, _backward)
