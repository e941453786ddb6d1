"""Index algebra from example number `i` to a row of a source; no state.

permutation  A Feistel network over the grid `[0, a) x [0, b)` with `a * b` just above the length,
             and cycle walking for the few values that fall outside (Black and Rogaway, "Ciphers
             with arbitrary finite domains", 2002). Any length, nothing stored, every epoch its own
             permutation.
epochs       Example `j` of a source of `n` rows belongs to epoch `j // n` and is row
             `permute(j % n)`.
mixtures     A binary tree with the sources as leaves. Of the first `x` examples of a node,
             `round(x * left / (left + right))` go to its left child and the others to its right.
             Neither count decreases as `x` grows, so they also give the child of example `x` and
             its number there. After any number of examples the count of every source is within
             `(log2(sources) + 1) / 2` of its share, for ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

_ROUNDS = 12  # even; with 8, pairs of positions of lengths below 10 fail a chi-square test
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MAX_DENOMINATOR = 2**31  # products of two remainders below it fit in int64


def hash_words(*words: np.ndarray | int) -> np.ndarray:
    """Return uint64 hashes of the broadcast integer words (splitmix64, once per word)."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = state ^ np.asarray(word).astype(np.uint64)
        state = state + _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def scale_hash(hashes: np.ndarray, limit: np.ndarray | np.uint64) -> np.ndarray:
    """Return uint64 hashes mapped to `[0, limit)` by multiply and shift; limit <= 2**32."""
    return ((hashes >> np.uint64(32)) * limit) >> np.uint64(32)


def permute(
    index: np.ndarray,
    length: np.ndarray | int,
    *,
    seed: np.ndarray | int,
    epoch: np.ndarray | int = 0,
) -> np.ndarray:
    """Return int64 `[n]`: each index under a pseudo-random permutation of `[0, length)`.

    index: int64 [n], each in `[0, length)`. `length` (1 to 2**62), `seed` and `epoch` broadcast
    against it, so that one call serves rows of several sources and epochs; every (length, seed,
    epoch) is its own permutation.
    """
    index, length, seed, epoch = np.broadcast_arrays(np.atleast_1d(index), length, seed, epoch)
    high = np.sqrt(length).astype(np.int64)
    high += high * high < length  # floor or ceiling of the root: any grid >= length will do
    low = (length - 1) // high + 1
    keys = hash_words(seed, epoch)
    result = _feistel(index, high, low, keys)
    outside = np.flatnonzero(result >= length)
    while outside.size:
        walked = _feistel(result[outside], high[outside], low[outside], keys[outside])
        result[outside] = walked
        outside = outside[walked >= length[outside]]
    return result


def _feistel(index: np.ndarray, high: np.ndarray, low: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return int64 `[n]`: a keyed bijection of `[0, high * low)` applied to each index."""
    left, right = (part.astype(np.uint64) for part in np.divmod(index, low))
    left_size, right_size = high.astype(np.uint64), low.astype(np.uint64)
    for round_keys in keys + np.arange(_ROUNDS, dtype=np.uint64)[:, None] * _GOLDEN:
        mixed = (right + round_keys) * np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(33)
        mixed *= np.uint64(0xC4CEB9FE1A85EC53)
        left += scale_hash(mixed, left_size)
        left = np.minimum(left, left - left_size)  # modulo left_size: below 0 wraps to the top
        left, right, left_size, right_size = right, left, right_size, left_size
    return (left * right_size + right).astype(np.int64)


class Location(NamedTuple):
    """Source, epoch and row of n examples: int64 `[n]` each."""

    source: np.ndarray
    epoch: np.ndarray
    row: np.ndarray


class Sampler:
    """The order of a weighted mixture of sources: `locate(i)` is the row of example `i`."""

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        shuffle: bool = True,
    ):
        """Make the order of sources of `lengths` rows, mixed by `weights` (None: by their rows).

        Weights are taken as the decimals they are written as, and hold exactly if their common
        denominator is at most 2**31; finer ones are rounded to multiples of 2**-31. Without
        `shuffle` the rows of each source come in stored order.
        """
        self.lengths = np.asarray(lengths, np.int64)
        if not len(lengths) or self.lengths.min() < 1:
            raise ValueError(f"every source needs at least one row, got {list(lengths)} rows")
        if weights is None:
            weights = [int(length) for length in lengths]
        if len(weights) != len(lengths):
            raise ValueError(
                f"{len(weights)} weights for {len(lengths)} sources: give one for each"
            )
        self.shuffle = shuffle
        self._seeds = hash_words(seed, np.arange(len(lengths)))
        # The tree as a heap: node k has the children 2k and 2k + 1, padded with weight 0.
        num_leaves = 1 << (len(lengths) - 1).bit_length()
        self._tree = np.zeros(2 * num_leaves, np.int64)
        self._tree[num_leaves : num_leaves + len(lengths)] = _integer_weights(weights)
        for node in range(num_leaves - 1, 0, -1):
            self._tree[node] = self._tree[2 * node] + self._tree[2 * node + 1]

    def locate(self, index: np.ndarray) -> Location:
        """Return source, epoch within it and row of every example; index: int64 [n], >= 0."""
        rank = np.asarray(index, np.int64)
        node = np.ones_like(rank)
        num_leaves = len(self._tree) // 2
        while len(rank) and node[0] < num_leaves:
            left, goes_left = self._split(rank, node)
            rank = np.where(goes_left, left, rank - left)
            node = 2 * node + ~goes_left
        source = node - num_leaves
        lengths = self.lengths[source]
        epoch, row = np.divmod(rank, lengths)
        if self.shuffle:
            row = permute(row, lengths, seed=self._seeds[source], epoch=epoch)
        return Location(source, epoch, row)

    def rows_before(self, index: int) -> np.ndarray:
        """Return int64 `[S]`: the number of examples below `index` from each source."""
        counts, nodes = np.array([index], np.int64), np.array([1])
        while len(counts) < len(self._tree) // 2:
            left, _ = self._split(counts, nodes)
            counts = np.stack([left, counts - left], 1).ravel()
            nodes = np.stack([2 * nodes, 2 * nodes + 1], 1).ravel()
        return counts[: len(self.lengths)]

    def num_examples(self, num_epochs: float) -> int:
        """Return the first index that would take any source beyond `num_epochs` times its rows.

        For one source, and for sources mixed by their rows, this is `num_epochs` times all rows;
        any other mixture ends with the source that runs out first.
        """
        epochs = Fraction(str(num_epochs))
        limits = np.array([int(epochs * length) for length in self.lengths.tolist()])
        enough, too_many = 0, int(limits.sum()) + 1
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            within = bool((self.rows_before(middle) <= limits).all())
            enough, too_many = (middle, too_many) if within else (enough, middle)
        return enough

    def _split(self, count: np.ndarray, node: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many of a node's first `count` examples go left, and whether the next does."""
        weight = np.maximum(self._tree[node], 1)  # 0: padding, never reached
        left = self._tree[2 * node]
        # whole, rest: no product passes max(count, weight**2) < 2**63, and nothing is a float
        whole, rest = np.divmod(count, weight)
        before = (rest * left + weight // 2) // weight
        after = ((rest + 1) * left + weight // 2) // weight
        return whole * left + before, after > before


def _integer_weights(weights: Sequence[float]) -> list[int]:
    """Return positive integers in the ratio of `weights`, with a sum of at most 2**31."""
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"mixture weights must be positive, got {list(weights)}: leave a source out instead"
        )
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is meant as 7/10
    shares = [share / sum(exact) for share in exact]
    total = math.lcm(*(share.denominator for share in shares))
    if total <= _MAX_DENOMINATOR:
        return [int(share * total) for share in shares]
    rounded = [max(1, round(share * _MAX_DENOMINATOR)) for share in shares]
    rounded[rounded.index(max(rounded))] += _MAX_DENOMINATOR - sum(rounded)
    return rounded
