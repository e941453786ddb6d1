"""Rows for the device: lengths rounded up to buckets, so that one compilation serves many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.types import Tokens


def power_of_two(n: int) -> int:
    """n rounded up to a power of two."""
    return 1 << (n - 1).bit_length()


def bucket(n: int) -> int:
    """n rounded up, beyond 64 by less than a quarter: 0, 16, 32, 48, 64, 80, ... 128, 160, ..."""
    step = max(16, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def pad(inputs: Sequence[np.ndarray], batch_size: int) -> Tokens:
    """Rows [B, bucket + 1] that end with `inputs`; rows beyond those are all padding."""
    width = bucket(max(map(len, inputs)) - 1) + 1
    ids, segments, positions = (np.zeros((batch_size, width), np.int32) for _ in range(3))
    for i, x in enumerate(inputs):
        ids[i, -len(x) :] = x
        segments[i, -len(x) :] = 1
        positions[i, -len(x) :] = np.arange(len(x))
    return Tokens(ids, segments, positions)
