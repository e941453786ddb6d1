"""Flash attention (arXiv:2307.08691) for GPUs, in Pallas through Triton: it keeps no scores.

Every mask of `dot_product.Mask` is computed in the kernel, from the segments and positions of a
block: packed documents, windows, prefixes, and an encoder's states. Blocks of keys that no query of
a block sees, because their documents, their order or the window lie apart, are not read: the range
of blocks from the first to the last one that is seen is computed beforehand. Query heads that share
a key head read it where it is, and its gradient is summed in the kernel.

Between scores and exponentials everything is in base 2: exp(x) = exp2(x log2(e)).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lm.kernels.dot_product import NEGATIVE, Mask
from lm.types import Array

LARGEST_HEAD = 256
FEWEST_QUERIES = 64  # below it, as in decoding, XLA's products read no less
LOG2E = math.log2(math.e)
NONE = 2**30  # a segment that is not there
# Rows that a program reads at a time, and keeps: one of queries keeps twice as many, and uses what
# it reads, from the L2 cache, for 128 FLOPs a byte, as a Hopper's tensor cores need. One of keys
# keeps two sums, for which its registers do not suffice; heads larger than `WIDE` fill the shared
# memory.
BLOCK, QUERIES, KEYS, WIDE = 64, 128, 64, 128


@dataclasses.dataclass(frozen=True)
class Options:
    """Static arguments of the kernels."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    head_dim: int
    share: float  # of all pairs, seen in a row of one document, for counts of FLOPs
    interpret: bool

    def rows_of_queries(self, length: int) -> int:
        """Rows of queries that a program keeps."""
        return _rows(length, QUERIES if self.head_dim <= WIDE else BLOCK)


class Marks(NamedTuple):
    """A mask, and the ranges of blocks to read: [first, last) of keys for each program's queries,
    [B, T / QUERIES], and of queries for each program's keys, [B, S / KEYS].
    """

    query_segments: Array  # int32 [B, T]
    query_positions: Array  # int32 [B, T]
    key_segments: Array  # int32 [B, S]
    key_positions: Array  # int32 [B, S]
    key_bidirectional: Array  # int32 [B, S]
    first_key: Array
    last_key: Array
    first_query: Array
    last_query: Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    indices: tuple[Array, Array] | None,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> jax.Array:
    """[B, N, T, H] of q: [B, N, T, H], k and v: [B, K, S, H]; 0 where a query sees no key.

    indices: of queries int32 [T] and keys [S] in their stream, whose order is that of positions in
    every segment; None: they are of two streams. The output and the log-sums of its softmax
    [B, N, T], which the gradient needs, are named "attended".
    """
    b, n, t, h = q.shape
    share = 1.0 if indices is None else _share(k.shape[2], mask.causal, mask.window)
    options = Options(scale, mask.causal, mask.window, softcap, h, share, interpret)
    q = _pad(q, 2, options.rows_of_queries(t))
    k, v = (_pad(x, 2, _rows(x.shape[2], KEYS)) for x in (k, v))
    marks = _marks(options, mask, indices)
    q = q.reshape(b, k.shape[1], -1, *q.shape[2:])  # [B, K, G, T, H]
    y: Any = _attend(options, q, k, v, marks)
    return y.reshape(b, n, -1, h)[:, :, :t]


def _share(length: int, causal: bool, window: int | None) -> float:
    """The part of the pairs of a row that order and window leave."""
    before = np.minimum(np.arange(length), length if window is None else window - 1)
    return float(before.sum() * (1 if causal else 2) + length) / length**2


def _rows(length: int, largest: int) -> int:
    """Rows of a block: `largest`, or fewer of a short row."""
    return min(largest, max(16, pl.next_power_of_2(length)))


def _pad(x: Array, axis: int, block: int) -> Array:
    """`x` with zeros to a multiple of `block`: as segments, padding, which nothing sees."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def _marks(o: Options, mask: Mask, indices: tuple[Array, Array] | None) -> Marks:
    bidirectional = mask.key_bidirectional
    if bidirectional is None:
        bidirectional = jnp.zeros_like(mask.key_segments)
    t, s = mask.query_segments.shape[1], mask.key_segments.shape[1]
    own_q, own_k = o.rows_of_queries(t), _rows(s, KEYS)
    block_q, block_k = _rows(t, BLOCK), _rows(s, BLOCK)
    queries = [_pad(x, 1, own_q) for x in (mask.query_segments, mask.query_positions)]
    keys = (mask.key_segments, mask.key_positions, bidirectional.astype(jnp.int32))
    keys = [_pad(x, 1, own_k) for x in keys]
    q_low, q_high = _bounds(queries[0], block_q)  # [B, T / block]
    k_low, k_high = _bounds(keys[0], block_k)
    seen = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    if indices is not None:
        q_first, q_last = _bounds(_pad(indices[0] + 1, 0, own_q)[None], block_q)
        k_first, k_last = _bounds(_pad(indices[1] + 1, 0, own_k)[None], block_k)
        if mask.causal and mask.key_bidirectional is None:
            seen &= q_last[:, :, None] >= k_first[:, None]
        if mask.window is not None:
            seen &= q_first[:, :, None] - k_last[:, None] < mask.window
            seen &= k_first[:, None] - q_last[:, :, None] < mask.window
    by_query = _range(seen, own_q // block_q)
    by_key = _range(jnp.swapaxes(seen, 1, 2), own_k // block_k)
    return Marks(queries[0], queries[1], keys[0], keys[1], keys[2], *by_query, *by_key)


def _bounds(numbers: Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest of the positive numbers in every block of a row."""
    blocks = numbers.reshape(numbers.shape[0], -1, block)
    return jnp.min(jnp.where(blocks > 0, blocks, NONE), -1), jnp.max(blocks, -1)


def _range(seen: Array, blocks: int) -> tuple[jax.Array, jax.Array]:
    """For each program, of so many blocks: the first block that is seen, and the one after the
    last; 0, 0 if none is. seen: bool [B, blocks of programs, blocks that are read].
    """
    seen = jnp.any(seen.reshape(seen.shape[0], -1, blocks, seen.shape[2]), axis=2)
    first = jnp.argmax(seen, -1)
    last = seen.shape[-1] - jnp.argmax(seen[..., ::-1], -1)
    first, last = (jnp.where(jnp.any(seen, -1), x, 0).astype(jnp.int32) for x in (first, last))
    return first, last


# ---- kernels ----


def _tile(ref: Any, at: tuple[Any, ...], head_dim: int) -> jax.Array:
    """[block, H] of a block, with zeros up to a power of two."""
    padded = ref.shape[-1]
    if padded == head_dim:
        return triton.load(ref.at[(*at, slice(None))])
    inside = (jnp.arange(padded) < head_dim)[None]
    return triton.load(ref.at[(*at, slice(None))], mask=inside, other=0.0)


def _put(ref: Any, value: Array, head_dim: int) -> None:
    padded = ref.shape[-1]
    inside = None if padded == head_dim else (jnp.arange(padded) < head_dim)[None]
    triton.store(ref.at[:, :], value.astype(ref.dtype), mask=inside)


def _scores(
    o: Options, q: Array, k: Array, queries: tuple[Array, Array], keys: tuple[Array, Array, Array]
) -> tuple[jax.Array, jax.Array]:
    """(scores in base 2, -inf where hidden; their derivative by the scaled products): [Q, K]."""
    x = triton.dot(q, k.T) * o.scale
    slope = jnp.ones_like(x)
    if o.softcap is not None:
        x = jnp.tanh(x / o.softcap)
        slope = 1 - x * x
        x = x * o.softcap
    seen = (queries[0][:, None] == keys[0][None]) & (keys[0] != 0)[None]
    distance = queries[1][:, None] - keys[1][None]
    if o.causal:
        seen &= (distance >= 0) | (keys[2] != 0)[None]
    if o.window is not None:
        seen &= jnp.abs(distance) < o.window
    return jnp.where(seen, x * LOG2E, -jnp.inf), slope


def _forward_kernel(  # of a block of queries
    q_ref: Any, k_ref: Any, v_ref: Any, qs: Any, qp: Any, ks: Any, kp: Any, kb: Any,
    first: Any, last: Any, y_ref: Any, sums_ref: Any, *, o: Options, block: int,
) -> None:  # fmt: skip
    q = _tile(q_ref, (slice(None),), o.head_dim)
    queries = qs[...], qp[...]

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        y, top, total = carry
        at = pl.ds(i * block, block)
        k, v = (_tile(ref, (at,), o.head_dim) for ref in (k_ref, v_ref))
        x, _ = _scores(o, q, k, queries, (ks[at], kp[at], kb[at]))
        new_top = jnp.maximum(top, jnp.max(x, axis=1))
        weights = jnp.exp2(x - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        y = y * shrink[:, None] + triton.dot(weights.astype(v.dtype), v)
        return y, new_top, total * shrink + jnp.sum(weights, axis=1)

    rows = q.shape[0]
    start = jnp.zeros(q.shape, jnp.float32), jnp.full(rows, NEGATIVE), jnp.zeros(rows)
    y, top, total = jax.lax.fori_loop(first[0], last[0], body, start)
    total = jnp.where(total == 0, 1, total)  # no key: y is 0
    _put(y_ref, y / total[:, None], o.head_dim)
    sums_ref[...] = top + jnp.log2(total)


def _query_kernel(  # the gradient of a block of queries
    q_ref: Any, k_ref: Any, v_ref: Any, qs: Any, qp: Any, ks: Any, kp: Any, kb: Any,
    first: Any, last: Any, dy_ref: Any, sums: Any, delta: Any, dq_ref: Any,
    *, o: Options, block: int,
) -> None:  # fmt: skip
    q, dy = (_tile(ref, (slice(None),), o.head_dim) for ref in (q_ref, dy_ref))
    queries, sums, delta = (qs[...], qp[...]), sums[...], delta[...]

    def body(i: Array, dq: Array) -> jax.Array:
        at = pl.ds(i * block, block)
        k, v = (_tile(ref, (at,), o.head_dim) for ref in (k_ref, v_ref))
        x, slope = _scores(o, q, k, queries, (ks[at], kp[at], kb[at]))
        weights = jnp.exp2(x - sums[:, None])
        dx = weights * (triton.dot(dy, v.T) - delta[:, None]) * slope
        return dq + triton.dot(dx.astype(k.dtype), k)

    dq = jax.lax.fori_loop(first[0], last[0], body, jnp.zeros(q.shape, jnp.float32))
    _put(dq_ref, dq * o.scale, o.head_dim)


def _key_kernel(  # the gradients of a block of keys and values, of all heads that read it
    q_ref: Any, k_ref: Any, v_ref: Any, qs: Any, qp: Any, ks: Any, kp: Any, kb: Any,
    first: Any, last: Any, dy_ref: Any, sums_ref: Any, delta_ref: Any, dk_ref: Any, dv_ref: Any,
    *, o: Options, block: int,
) -> None:  # fmt: skip
    k, v = (_tile(ref, (slice(None),), o.head_dim) for ref in (k_ref, v_ref))
    keys = ks[...], kp[...], kb[...]
    begin, end = first[0], last[0]

    def body(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = carry
        head, i = j // (end - begin), begin + j % (end - begin)
        at = pl.ds(i * block, block)
        q, dy = (_tile(ref, (head, at), o.head_dim) for ref in (q_ref, dy_ref))
        x, slope = _scores(o, q, k, (qs[at], qp[at]), keys)
        weights = jnp.exp2(x - sums_ref[head, at][:, None])
        dv = dv + triton.dot(weights.astype(dy.dtype).T, dy)
        dx = weights * (triton.dot(dy, v.T) - delta_ref[head, at][:, None]) * slope
        return dk + triton.dot(dx.astype(q.dtype).T, q), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    steps = q_ref.shape[0] * (end - begin)
    dk, dv = jax.lax.fori_loop(0, steps, body, (zeros, zeros))
    _put(dk_ref, dk * o.scale, o.head_dim)
    _put(dv_ref, dv, o.head_dim)


# ---- calls ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(o: Options, q: Array, k: Array, v: Array, marks: Marks) -> jax.Array:
    return _forward(o, q, k, v, marks)[0]


def _forward(
    o: Options, q: Array, k: Array, v: Array, marks: Marks
) -> tuple[jax.Array, tuple[Any, ...]]:
    """q: [B, K, G, T, H]; k and v: [B, K, S, H]."""
    call = _Call(o, q, k, v, marks, by_query=True)
    sums = jax.ShapeDtypeStruct(q.shape[:4], jnp.float32)
    y, sums = call(_forward_kernel, "flash_forward", (q, sums), ())
    y, sums = (checkpoint_name(x, "attended") for x in (y, sums))
    return y, (q, k, v, marks, y, sums)


def _backward(
    o: Options, residuals: tuple[Any, ...], dy: Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, marks, y, sums = residuals
    delta = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), -1)  # [B, K, G, T]
    given = (dy, sums, delta)
    by_query, by_key = (_Call(o, q, k, v, marks, by_query=way) for way in (True, False))
    [dq] = by_query(_query_kernel, "flash_backward_query", (q,), given)
    dk, dv = by_key(_key_kernel, "flash_backward_key", (k, v), given)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


class _Call:
    """A call of a kernel: one program for each block of queries and head, or of keys and key head.

    By query: arrays of queries come as a block of one head, those of keys whole. By key: those of
    queries whole, of all heads that share the key head, those of keys as a block.
    """

    def __init__(
        self, o: Options, q: Array, k: Array, v: Array, marks: Marks, *, by_query: bool
    ) -> None:
        self._options, self._by_query = o, by_query
        b, self._kv_heads, self._group, t, h = q.shape
        s, self._padded = k.shape[2], pl.next_power_of_2(h)
        self._length = {"q": t, "k": s}
        self._own, self._other = ("q", "k") if by_query else ("k", "q")
        self._rows = o.rows_of_queries(t) if by_query else _rows(s, KEYS)
        heads = self._kv_heads * (self._group if by_query else 1)
        self._grid = (self._length[self._own] // self._rows, heads, b)
        ends = ("first_key", "last_key") if by_query else ("first_query", "last_query")
        self._inputs = (q, k, v, *marks[:5], *(getattr(marks, name) for name in ends))
        self._specs = [self._array("q"), self._array("k"), self._array("k")]
        self._specs += [self._mark(which) for which in "qqkkk"]
        self._specs += [pl.BlockSpec((None, 1), lambda i, _, b: (b, i))] * 2

    def _array(self, which: str, is_sum: bool = False) -> pl.BlockSpec:
        """The blocks of [B, K, G, T, H] or [B, K, S, H], or of sums [B, K, G, T]."""
        own, group = which == self._own, self._group
        length = self._rows if own else self._length[which]
        tail = () if is_sum else (self._padded,)

        def index(i: Array, head: Array, b: Array) -> tuple[Any, ...]:
            at = (i if own else 0, *(0 for _ in tail))
            if which == "k":
                return b, head // group if self._by_query else head, *at
            return (b, head // group, head % group, *at) if own else (b, head, 0, *at)

        if which == "k":
            return pl.BlockSpec((None, None, length, *tail), index)
        return pl.BlockSpec((None, None, None if own else group, length, *tail), index)

    def _mark(self, which: str) -> pl.BlockSpec:
        own = which == self._own
        length = self._rows if own else self._length[which]
        return pl.BlockSpec((None, length), lambda i, _, b: (b, i if own else 0))

    def __call__(
        self, kernel: Any, name: str, out: tuple[Any, ...], given: tuple[Array, ...]
    ) -> list[jax.Array]:
        """out: arrays like the results, of queries by query and of keys by key; given: further
        inputs, dy and its sums.
        """
        products = {"flash_forward": 2, "flash_backward_query": 3, "flash_backward_key": 4}[name]
        pairs = math.prod(self._inputs[0].shape) * self._length["k"] * self._options.share
        sums = self._array("q", is_sum=True)
        own = self._array(self._own)
        return pl.pallas_call(
            functools.partial(
                kernel, o=self._options, block=_rows(self._length[self._other], BLOCK)
            ),
            grid=self._grid,
            in_specs=[*self._specs, *((self._array("q"), sums, sums) if given else ())],
            out_specs=[own if x.ndim > 4 or self._own == "k" else sums for x in out],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out],
            compiler_params=triton.CompilerParams(
                num_warps=8 if self._by_query or self._padded > 64 else 4,
                num_stages=2 if self._padded <= WIDE else 1,
            ),
            interpret=self._options.interpret,
            metadata={"flops": f"{2 * products * pairs:.0f}"},
            name=name,
        )(*self._inputs, *given)
