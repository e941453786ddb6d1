"""The attention of a model's layers, as its FLOPs and the check of its kernels need it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sizes and options of attention in the layers of one kind."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    bias: bool
    kernel: str
    causal: bool = True  # a token sees itself and those before it

    def __str__(self) -> str:
        parts = {
            f"{self.num_heads} heads of {self.head_dim} over {self.num_kv_heads}": True,
            f"window {self.window}": self.window is not None,
            f"softcap {self.softcap or 0:g}": self.softcap is not None,
            "bias": self.bias,
            "both ways": not self.causal,
            self.kernel: self.kernel != "auto",
        }
        return ", ".join(part for part, is_shown in parts.items() if is_shown)


@dataclasses.dataclass(frozen=True)
class AttentionScores:
    """Scores of `num_layers` layers.

    queries and keys: the streams that they come from, `inputs`, `encoder` or `image`.
    """

    heads: Heads
    num_layers: int
    queries: str = "inputs"
    keys: str = "inputs"

    def flops_per_token(self, lengths: Mapping[str, int], full_square: bool = False) -> float:
        """Forward FLOPs of scores and weighted values, 4 S N H, for each token of `inputs`.

        lengths: of the rows of each stream. S is `mean_keys`, or with full_square all keys.
        """
        heads, keys = self.heads, float(lengths[self.keys])
        if not full_square and self.keys == self.queries and keys:
            keys = mean_keys(lengths[self.keys], window=heads.window, causal=heads.causal)
        queries = lengths[self.queries] / lengths["inputs"]
        return 4 * self.num_layers * heads.num_heads * heads.head_dim * keys * queries


def mean_keys(length: int, *, window: int | None = None, causal: bool = True) -> float:
    """Keys that a query sees, averaged over the `length` positions of a row that is one document.

    Causal: the mean of min(t + 1, window) over t = 0 .. length - 1, which is (length + 1) / 2
    without a window. Otherwise a window sees window - 1 keys on either side.
    """
    reach = length if window is None else min(window, length)
    cut = reach * (reach - 1) / 2  # keys that the first queries lack to a full window
    if causal:
        return reach - cut / length
    return (2 * reach - 1) - 2 * cut / length
