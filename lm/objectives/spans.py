"""Hidden spans of texts (T5, arXiv:1910.10683): how many tokens are hidden where, with arrays over
all groups of documents at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lm.data import streams
from lm.data.rows import Rows
from lm.data.streams import Stream, boundaries


class SpanNoise(NamedTuple):
    """The fraction of a text that is hidden, and the mean number of tokens of a hidden span."""

    density: float
    mean_span: float

    def counts(self, length: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Return T5's numbers of hidden tokens and of spans of a text of `length` tokens."""
        noise = np.clip(np.round(np.multiply(length, self.density)), 1, np.subtract(length, 1))
        return noise.astype(int), np.maximum(np.round(noise / self.mean_span), 1).astype(int)

    def lengths(self, length: int) -> tuple[int, int]:
        """Return the lengths of the corrupted text and of the spans, sentinels and eos included."""
        noise, spans = (int(n) for n in self.counts(length))
        return length - noise + spans + 1, noise + spans + 1


class Denoiser(NamedTuple):
    """A noise, and the tokens of a row: of its text, of the corrupted text, and of the spans.

    mode: the token that is put before the corrupted text of every segment; None: none is.
    """

    noise: SpanNoise
    text_length: int
    inputs: int
    targets: int
    mode: int | None = None

    @property
    def prompt(self) -> int:
        """Tokens before the text of a segment."""
        return 0 if self.mode is None else 1

    @property
    def shortest(self) -> int:
        """Tokens below which a document shares its segment with the next one.

        So no row has more segments than eos tokens fit in, each with a span: one needs a sentinel
        and an eos on both sides, and the rest of a document that was cut had no eos before.
        """
        spare = self.inputs + self.targets - self.text_length - 1
        return -(-self.text_length // max(spare // (4 + self.prompt), 1))


class GroupedText(NamedTuple):
    """The documents of rows without their eos, in G groups that are corrupted as one text each.

    stream: the n tokens. groups: int [n], the group of each token, ascending. rows, segments:
    int [G], those of each group.
    """

    stream: Stream
    groups: np.ndarray
    rows: np.ndarray
    segments: np.ndarray

    @classmethod
    def of(cls, rows: Rows, eos: int, shortest: int) -> GroupedText:
        """Return the text of `rows`; documents below `shortest` share a group with the next."""
        stream = streams.flatten(rows)
        firsts = np.flatnonzero(stream.is_segment_start())
        column = np.nonzero(rows.segments)[1]
        bucket = stream.rows[firsts] * (rows.ids.shape[1] + 1) + column[firsts] // shortest
        starts = firsts[boundaries(bucket)]
        groups = np.zeros(len(stream.ids), int)
        groups[starts] = 1
        groups = np.cumsum(groups) - 1
        is_last = np.append(groups[1:] != groups[:-1], True)[: len(groups)]
        kept = ~(is_last & (stream.ids == eos))
        return cls(stream.keep(kept), groups[kept], stream.rows[starts], stream.segments[starts])

    def with_eos(self, stream: Stream, ended: np.ndarray, eos: int) -> Stream:
        """Return the tokens of `stream`, whose segments are groups, with eos at the ends of the
        groups `ended`, in their rows and segments.
        """
        groups = np.concatenate([stream.segments, ended])
        order = np.argsort(groups, kind="stable")
        ids = np.append(stream.ids, np.full(len(ended), eos)).astype(np.int32)[order]
        groups = groups[order]
        return Stream(ids, self.rows[groups], self.segments[groups])


def corrupt(
    text: GroupedText, denoiser: Denoiser, draws: np.ndarray, sentinel: int, eos: int
) -> tuple[Stream, Stream]:
    """Return the corrupted text and the hidden spans, each group of both with eos at its end.

    draws: float [B, text_length + 2 or more] in [0, 1). A group that is too short for a span has no
    targets.
    """
    sizes = np.bincount(text.groups, minlength=len(text.rows))
    hidden, spans = _allocate(sizes, text.rows, denoiser, draws[:, -2:])
    keys = draws[text.stream.rows, streams.positions_since(boundaries(text.stream.rows))]
    mask = random_spans(hidden, spans, text.groups, keys)
    starts = mask & ~np.append(False, mask[:-1])  # a group begins with text: spans never touch
    number = np.cumsum(starts) - 1 - (np.cumsum(spans) - spans)[text.groups]
    stream = text.stream._replace(segments=text.groups)
    shown, cut = (
        streams.with_inserted(stream, starts, sentinel - number, keep=kept)
        for kept in (~mask, mask)
    )
    return (
        text.with_eos(shown, np.arange(len(sizes)), eos),
        text.with_eos(cut, np.flatnonzero(spans), eos),
    )


def random_spans(
    hidden: np.ndarray, spans: np.ndarray, groups: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """Return bool [n], True for hidden tokens: `hidden[g]` of group g in `spans[g]` spans.

    In a group text and spans alternate, text first. The lengths of the spans are a uniformly random
    composition of `hidden[g]`, and so are those of the text between them. groups: int [n],
    ascending; keys: float [n] in [0, 1).
    """
    able = spans[groups] > 0
    groups, keys = groups[able], keys[able]
    is_hidden = streams.positions_since(boundaries(groups)) < hidden[groups]
    parts = [_random_parts(groups[of], keys[of], spans) for of in (~is_hidden, is_hidden)]
    result = np.zeros(len(able), bool)
    result[able] = np.repeat(np.arange(2 * len(parts[0])) % 2 == 1, np.stack(parts, 1).ravel())
    return result


def _random_parts(groups: np.ndarray, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the lengths of the `counts[g]` parts into which the items of each group g are cut."""
    firsts = boundaries(groups)
    order = np.lexsort((np.where(firsts, -1.0, keys), groups))  # the first item begins a part
    starts = np.empty(len(groups), bool)
    starts[order] = streams.positions_since(firsts) < counts[groups]
    return np.diff(np.append(np.flatnonzero(starts), len(groups)))


def _allocate(
    sizes: np.ndarray, rows: np.ndarray, denoiser: Denoiser, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of hidden tokens and of spans of every group, int [G].

    With `d` hidden tokens and `k` spans a row of `c` tokens in `n` groups, `m` of them with spans,
    becomes `c - d + k + n` and `d + k + m` tokens (without a prompt). `d` and `k` are T5's, lowered
    where these would exceed the budget, and allocated in proportion to the length of the groups.
    """

    def per_row(values: np.ndarray) -> np.ndarray:
        return np.bincount(rows, values, minlength=len(draws)).astype(int)

    able = sizes >= 2
    text, num_able = per_row(sizes * able), per_row(able)
    excess = np.maximum(per_row(sizes + 1 + denoiser.prompt) - denoiser.inputs, 0)
    free = denoiser.targets - num_able
    hidden, spans = denoiser.noise.counts(np.maximum(text, 2))
    spans = np.minimum(np.maximum(spans, num_able), (free - excess) // 2)
    spans = np.minimum(spans, per_row(sizes // 2 * able)) * (num_able > 0)
    hidden = np.minimum(np.maximum(hidden, spans + excess), free - spans)
    hidden = np.minimum(hidden, text - spans) * (num_able > 0)
    of_group = able + _apportion(spans - num_able, (sizes // 2 - 1) * able, rows, draws[:, 0])
    rest = (sizes - 2 * of_group) * able
    return of_group + _apportion(hidden - spans, rest, rows, draws[:, 1]), of_group


def _apportion(
    total: np.ndarray, weights: np.ndarray, rows: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """Return int [G]: `total[r]` apportioned to the groups of row r, on average by weight.

    Systematic rounding: no group gets more than its weight if the total is not more than all of
    them. weights: int [G]; rows: int [G], ascending; draws: float [B] in [0, 1).
    """
    sums = np.maximum(np.bincount(rows, weights, minlength=len(total)).astype(int), 1)
    offset = (draws * sums).astype(int)
    upto = np.cumsum(weights)
    before = upto - weights
    row_start = before[streams.last_start(boundaries(rows))]
    at = [(total[rows] * (x - row_start) + offset[rows]) // sums[rows] for x in (before, upto)]
    return at[1] - at[0]
