"""Splash attention, the Pallas kernel for TPUs that ships with jax: it keeps no scores.

The kernel gets a schedule of blocks from here, computed from the indices of queries and keys, and
not by jax's own mask classes: these evaluate every block of [T, S] in Python (minutes at 131,072
tokens), and don't know an order of the queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.sharding import PartitionSpec

from lm.kernels.dot_product import Mask
from lm.parallel import zigzag
from lm.parallel.sharding import Rules
from lm.types import Array

LANES = 128  # lengths are cut into multiples of it
FORWARD, BACKWARD = 1024, 512  # largest blocks; those of the backward pass hold more at once
MaskInfos: TypeAlias = tuple[MaskInfo, MaskInfo, MaskInfo]  # for the output, dq, and dk and dv


def block_size(length: int, limit: int) -> int:
    """The largest multiple of `LANES` up to `limit` that divides `length`."""
    return next(b for b in range(limit, 0, -LANES) if length % b == 0)


def block_sizes(chunk: int, length: int) -> kernel.BlockSizes:
    """Block sizes for queries in chunks of consecutive tokens, and `length` keys."""
    q, kv = block_size(chunk, FORWARD), block_size(length, FORWARD)
    q_back, kv_back = block_size(chunk, BACKWARD), block_size(length, BACKWARD)
    return kernel.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=block_size(kv, BACKWARD),
        block_q_dkv=q_back,
        block_kv_dkv=kv_back,
        block_q_dq=q_back,
        block_kv_dq=kv_back,
    )


@functools.cache
def _visible(causal: bool, window: int | None) -> Callable[[Array, Array], Array] | None:
    """(indices of queries, indices of keys) -> bool; None: all of them. Cached, since the kernel's
    own cache compares functions by identity.
    """
    if not causal and window is None:
        return None

    def visible(q: Array, k: Array) -> Array:
        seen = q >= k if causal else q - k > -(window or 0)
        return seen if window is None else seen & (q - k < window)

    return visible


def visible_blocks(
    indices: np.ndarray, length: int, block_q: int, block_kv: int, causal: bool, window: int | None
) -> np.ndarray:
    """The blocks with at least one visible pair: bool [n, blocks of queries, blocks of keys].

    indices: [n, T / n], of the queries of each shard, consecutive in every block.
    """
    first = indices[:, ::block_q, None]  # [n, blocks of queries, 1]
    start = np.arange(0, length, block_kv)
    nearest, farthest = first - (start + block_kv - 1), first + block_q - 1 - start
    seen = farthest >= 0 if causal else np.ones_like(farthest, bool)
    if window is not None:
        seen = seen & (nearest < window) & (farthest > -window)
    return seen


def schedule(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(block to load, whether to work on it) at every step of every row: [n, rows, steps].

    seen: bool [n, rows, columns]. Rows with fewer blocks than others wait at their last one.
    """
    count = seen.sum(axis=-1, keepdims=True)
    steps = np.arange(max(int(count.max()), 1))
    order = np.argsort(~seen, axis=-1, kind="stable")
    load = np.take_along_axis(order, np.minimum(steps, np.maximum(count - 1, 0)), axis=-1)
    small = np.int8 if load.max() < 128 else np.int16  # it lives in scalar memory
    return load.astype(small), (steps < count).astype(np.int8)


def mask_infos(
    indices: np.ndarray, length: int, sizes: kernel.BlockSizes, causal: bool, window: int | None
) -> MaskInfos:
    """Schedules of the kernels. Arrays lead with [n], one per shard, except
    for the indices of the queries, [T].
    """
    computed = _visible(causal, window) is not None
    q_sequence = indices.reshape(-1).astype(np.int32) if computed else None

    def info(block_q: int | None, block_kv: int | None, by_key: bool) -> MaskInfo:
        assert block_q is not None and block_kv is not None, "`block_sizes` gives all"
        seen = visible_blocks(indices, length, block_q, block_kv, causal, window)
        load, work = schedule(np.swapaxes(seen, 1, 2) if by_key else seen)
        if by_key:
            load, work = (np.swapaxes(x, 1, 2) for x in (load, work))
        return MaskInfo(load, None, work, None, q_sequence)

    return (
        info(sizes.block_q, sizes.block_kv, False),
        info(sizes.block_q_dq, sizes.block_kv_dq, False),
        info(sizes.block_q_dkv, sizes.block_kv_dkv, True),
    )


def gather_length(x: Array, rules: Rules, axis: int) -> Array:
    """The whole length of `x`, along `axis`, of which each device of a `shard_map` has a part."""
    if rules.size("length") == 1:
        return x
    return jax.lax.all_gather(x, rules.axes("length"), axis=axis, tiled=True)


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    rules: Rules,
    *,
    specs: tuple[PartitionSpec, PartitionSpec],
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """[B, N, T, H], named "attended" with the log-sums of its softmax [B, N, T].

    q: [B, N, T, H]; k and v: [B, K, T, H]; specs: of q, and of k and v. Padding sees padding:
    finite, and no gradient from or to anything else.
    """
    shards, order, length = rules.size("length"), mask.order or 1, k.shape[2]
    indices = zigzag.positions(length, order).reshape(shards, -1)
    sizes = block_sizes(indices.shape[1] // (2 if order > 1 else 1), length)
    infos = mask_infos(indices, length, sizes, mask.causal, mask.window)

    def local(q: Array, k: Array, v: Array, segments: Array, infos: MaskInfos) -> jax.Array:
        k, v, key_segments = (
            zigzag.restore(gather_length(x, rules, axis), order, axis)
            for x, axis in ((k, 2), (v, 2), (segments, 1))
        )
        run: Any = kernel.SplashAttentionKernel(
            *infos,
            block_sizes=sizes,
            is_mqa=False,  # the other kernel groups heads as well, and takes one key head
            save_residuals=False,
            mask_value=kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name="attended",
            mask_function=_visible(mask.causal, mask.window),
            interpret=rules.platform == "cpu",
        )
        return jax.vmap(run)(q * scale, k, v, kernel.SegmentIds(segments, key_segments))

    by_shard = jax.tree.map(lambda x: rules.spec("length", *(None,) * (x.ndim - 1)), infos)
    in_specs = (specs[0], specs[1], specs[1], rules.spec("batch", "length"), by_shard)
    run = rules.shard_map(local, in_specs=in_specs, out_specs=specs[0])
    return run(q, k, v, mask.query_segments, infos)
