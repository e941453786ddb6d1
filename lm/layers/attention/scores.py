"""The scores of a model's attention, as its FLOPs and the size of its cache need them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class AttentionScores:
    """Scores of `num_layers` layers; causal: a token sees itself and those before it.

    queries and keys: the streams that they come from, `inputs` or `encoder`.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    causal: bool = True
    queries: str = "inputs"
    keys: str = "inputs"

    def flops_per_token(self, lengths: Mapping[str, int], full_square: bool = False) -> float:
        """Forward FLOPs of scores and weighted values, 4 S N H, for each token of `inputs`.

        lengths: of the rows of each stream. S is `mean_keys`, or with full_square all keys.
        """
        keys: float = lengths[self.keys]
        if not full_square and self.keys == self.queries and keys:
            keys = mean_keys(lengths[self.keys], window=self.window, causal=self.causal)
        queries = lengths[self.queries] / lengths["inputs"]
        return 4 * self.num_layers * self.num_heads * self.head_dim * keys * queries

    def cache_size(self, lengths: Mapping[str, int]) -> int:
        """Numbers in the cached keys and values of one stream; a window keeps no more than it
        sees.
        """
        length = lengths[self.keys]
        slots = min(self.window or length, length)
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * slots


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
