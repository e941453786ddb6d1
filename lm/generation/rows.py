"""Rows for the device: lengths rounded up to buckets, so that one compilation serves many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.types import HostTokens, Tokens


def power_of_two(n: int) -> int:
    """n rounded up to a power of two."""
    return 1 << (n - 1).bit_length()


def bucket(n: int) -> int:
    """n rounded up, beyond 64 by less than a quarter: 0, 16, 32, 48, 64, 80, ... 128, 160, ..."""
    step = max(16, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def batch_size(count: int, shards: int) -> int:
    """Rows that hold `count` of them: a power of two on each shard."""
    return shards * power_of_two(-(-count // shards))


def pad(streams: Sequence[np.ndarray], rows: int, width: int) -> HostTokens:
    """[rows, width] that end with `streams`; rows beyond those are all padding."""
    ids, segments, positions = (np.zeros((rows, width), np.int32) for _ in range(3))
    for i, x in enumerate(streams):
        at = slice(width - len(x), width)
        ids[i, at], segments[i, at], positions[i, at] = x, 1, np.arange(len(x))
    return Tokens(ids, segments, positions)
