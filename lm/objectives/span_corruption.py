"""Span corruption (T5, arXiv:1910.10683): spans are replaced by sentinels, and predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lm.config.fields import field
from lm.data import streams
from lm.data.sources import RowLayout, Rows
from lm.data.streams import Stream, boundaries
from lm.data.tokenizer import Tokenizer
from lm.objectives import ModelInterface, Objective, RowGenerator, conditional_batch
from lm.types import HostBatch


@dataclasses.dataclass(frozen=True)
class Config:
    noise_density: float = field(0.15, "Fraction of the tokens that are hidden.", gt=0, lt=1)
    mean_span: float = field(3.0, "Mean number of tokens in a hidden span.", ge=1)
    bidirectional: bool = field(
        True, "Without an encoder: the corrupted text is a prefix that its segment sees whole."
    )
    first_sentinel: int | None = field(
        None,
        "Id of the first sentinel, the next ones descending; unset: the tokenizer's <extra_id_0>, "
        "else the last id of the model.",
        ge=0,
    )


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


class RowBudget(NamedTuple):
    """Tokens of a row: of its text, of the corrupted text, and of the spans.

    prompt: tokens that are put before the corrupted text of every segment, beside its eos.
    """

    text_length: int
    inputs: int
    targets: int
    prompt: int = 0

    @property
    def shortest(self) -> int:
        """Tokens below which a document shares its segment with the next one.

        So no row has more segments than eos tokens fit in, each with a span: one needs a sentinel
        and an eos on both sides, and the rest of a document that was cut had no eos before.
        """
        spare = self.inputs + self.targets - self.text_length - 1
        return -(-self.text_length // max(spare // (4 + self.prompt), 1))


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return T5's span corruption.

    In a row of one document the numbers of hidden tokens and of spans, and the lengths of the
    random spans, are those of T5's `random_spans_noise_mask`. `x y z` are sentinels, numbered in
    every segment, and `.` is eos:

        text      a b c d e f g h .
        encoder   a b x e f g y .       targets  x c d y h .

    Documents of a row are corrupted separately. Each has an eos of its own in the targets, for
    which the row has fewer hidden tokens and spans, just enough to fill it. A document of fewer
    tokens than `RowBudget.shortest` shares its segment with the next one.

    The encoder's input and the targets fill their rows: the text for them is longer than both
    (568 tokens give 512 and 114). In a decoder they share a row, the text as a prefix.
    """
    interface.require_decoder("span_corruption")
    noise = make_noise(config.noise_density, config.mean_span)
    budget = fit_budget(noise, interface)
    num_sentinels = int(noise.counts(budget.text_length)[1])
    sentinel = first_sentinel(config.first_sentinel, num_sentinels, tokenizer, interface)

    def span_corruption(rows: Rows, rng: RowGenerator) -> HostBatch:
        text = GroupedText.of(rows, tokenizer.eos_id, budget.shortest)
        draws = [rng(i).random(budget.text_length + 2) for i in range(len(rows.ids))]
        source, target = corrupt(text, noise, budget, np.stack(draws), sentinel, tokenizer.eos_id)
        return conditional_batch(
            source,
            target,
            len(rows.ids),
            interface,
            tokenizer,
            bidirectional=config.bidirectional,
        )

    return Objective(span_corruption, RowLayout((budget.text_length,)))


def make_noise(density: float, mean_span: float) -> SpanNoise:
    """Return the noise; ValueError where there would be too little text between spans."""
    if not 0 < density < 1 or mean_span < 1 or density * (1 + 1 / mean_span) > 0.9:
        raise ValueError(
            f"config.objective.noise_density ({density}) and mean_span ({mean_span}) leave no text "
            "between the spans: density * (1 + 1 / mean_span) must be at most 0.9, mean_span at "
            "least 1"
        )
    return SpanNoise(density, mean_span)


def fit_budget(noise: SpanNoise, interface: ModelInterface) -> RowBudget:
    """Return the longest text that fits when it is corrupted, and the lengths that it then has.

    Raises ValueError where the lengths of encoder and decoder don't fit together.
    """
    if interface.encoder_length is None:
        limit = interface.length
        length = _longest(lambda n: sum(noise.lengths(n)), limit, "data.length")
        inputs, _ = noise.lengths(length)
        return RowBudget(length, inputs, limit - inputs)
    limit = interface.encoder_length
    length = _longest(lambda n: noise.lengths(n)[0], limit, "data.encoder_length")
    needed = noise.lengths(length)[1]
    if not needed <= interface.length < needed + 16:
        raise ValueError(
            f"with config.data.encoder_length ({limit}), noise_density ({noise.density}) and "
            f"mean_span ({noise.mean_span}), {length} tokens of text give {needed} of targets: set "
            f"config.data.length ({interface.length}) to {needed}, or to at most {needed + 15}"
        )
    return RowBudget(length, limit, interface.length)


def _longest(length_of: Callable[[int], int], limit: int, name: str) -> int:
    """Return the largest length of text whose corrupted length is at most `limit`."""
    found = [n for n in range(2, 2 * limit + 2) if length_of(n) <= limit]
    if not found or found[-1] < 8:
        raise ValueError(f"config.{name} ({limit}) is too short for span corruption")
    return found[-1]


def first_sentinel(
    given: int | None, count: int, tokenizer: Tokenizer, interface: ModelInterface
) -> int:
    """Return the id of the first of `count` descending sentinels; ValueError where one of them
    would be a token of the text.
    """
    spare = interface.spare_ids(tokenizer)
    first = tokenizer.special_ids.get("<extra_id_0>", spare.stop - 1) if given is None else given
    free = {*spare, *(i for i in tokenizer.special_ids.values() if i < spare.stop)}
    if not free.issuperset(range(first - count + 1, first + 1)):
        raise ValueError(
            f"{count} sentinels from id {first} down are not free: tokenizer {tokenizer.name} uses "
            f"{tokenizer.vocab_size} of the {spare.stop} ids of config.model.vocab_size; set it to "
            f"at least {tokenizer.vocab_size + count + 1}, or config.objective.first_sentinel"
        )
    return first


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
    text: GroupedText,
    noise: SpanNoise,
    budget: RowBudget,
    draws: np.ndarray,
    sentinel: int,
    eos: int,
) -> tuple[Stream, Stream]:
    """Return the corrupted text and the hidden spans, each group of both with eos at its end.

    draws: float [B, budget.text_length + 2] in [0, 1). A group that is too short for a span has no
    targets.
    """
    sizes = np.bincount(text.groups, minlength=len(text.rows))
    hidden, spans = _allocate(sizes, text.rows, noise, budget, draws[:, -2:])
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
    sizes: np.ndarray, rows: np.ndarray, noise: SpanNoise, budget: RowBudget, draws: np.ndarray
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
    excess = np.maximum(per_row(sizes + 1 + budget.prompt) - budget.inputs, 0)
    free = budget.targets - num_able
    hidden, spans = noise.counts(np.maximum(text, 2))
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
