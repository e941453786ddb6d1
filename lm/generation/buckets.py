"""Batches of prompts: ids, padded to lengths rounded up to buckets, so that one compilation serves
many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from lm.tokenizers.tokenizer import Tokenizer
from lm.types import HostTokens, Tokens

Prompt: TypeAlias = str | Sequence[int] | np.ndarray  # text, or ids without bos


def encode(tokenizer: Tokenizer, prompt: Prompt, vocab_size: int, name: str = "") -> np.ndarray:
    """The ids of a prompt, int32 [n].

    Raises:
        ValueError: an id outside of the vocabulary; `name` is that of the prompt.
    """
    ids = np.asarray(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, np.int64)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"{name}id {wrong[0]} is not in the vocabulary (size {vocab_size})")
    return ids.astype(np.int32)


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
