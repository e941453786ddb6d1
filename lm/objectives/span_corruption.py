"""Span corruption (T5, arXiv:1910.10683): spans are replaced by sentinels, and predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.config.fields import field
from lm.data import streams
from lm.data.sources import RowLayout, Rows
from lm.data.streams import Stream, boundaries
from lm.objectives import ModelInterface, Objective, RowGenerator, conditional_batch
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import HostBatch


def sentinel_field() -> int | None:
    """Return the field `first_sentinel` of a config."""
    return field(
        None,
        "Id of the first sentinel, the next ones descending; unset: the tokenizer's <extra_id_0>, "
        "else the last id of the model.",
        ge=0,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    noise_density: float = field(0.15, "Fraction of the tokens that are hidden.", gt=0, lt=1)
    mean_span: float = field(3.0, "Mean number of tokens in a hidden span.", ge=1)
    bidirectional: bool = field(
        True, "Without an encoder: the corrupted text is a prefix that its segment sees whole."
    )
    first_sentinel: int | None = sentinel_field()


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


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return T5's span corruption.

    In a row of one document the numbers of hidden tokens and of spans, and the lengths of the
    random spans, are those of T5's `random_spans_noise_mask`. `x y z` are sentinels, numbered in
    every segment, and `.` is eos:

        text      a b c d e f g h .
        encoder   a b x e f g y .       targets  x c d y h .

    Documents of a row are corrupted separately. Each has an eos of its own in the targets, for
    which the row has fewer hidden tokens and spans, just enough to fill it. A document of fewer
    tokens than `Denoiser.shortest` shares its segment with the next one.

    The encoder's input and the targets fill their rows: the text for them is longer than both
    (568 tokens give 512 and 114). In a decoder they share a row, the text as a prefix.
    """
    interface.require_decoder("span_corruption")
    noise = make_noise(config.noise_density, config.mean_span)
    if interface.encoder_length is not None:
        _check_lengths(noise, interface.encoder_length, interface.length)
    return mixture(
        [make_denoiser(noise, interface, "span corruption")],
        np.ones(1),
        config.first_sentinel,
        tokenizer,
        interface,
        bidirectional=config.bidirectional,
    )


def mixture(
    denoisers: Sequence[Denoiser],
    rates: np.ndarray,
    sentinel: int | None,
    tokenizer: Tokenizer,
    interface: ModelInterface,
    *,
    bidirectional: bool,
) -> Objective:
    """Return the objective that corrupts each row by one of `denoisers`, drawn by their `rates`."""
    length = max(d.text_length for d in denoisers)
    num_spans = max(int(d.noise.counts(d.text_length)[1]) for d in denoisers)
    first = first_sentinel(sentinel, num_spans, tokenizer, interface)
    limits = np.cumsum(rates / rates.sum())

    def corrupted(rows: Rows, rng: RowGenerator) -> HostBatch:
        draws = np.stack([rng(i).random(length + 4) for i in range(len(rows.ids))])
        chosen = np.minimum(np.searchsorted(limits, draws[:, -1]), len(limits) - 1)
        sources, targets = [], []
        for number in np.unique(chosen):
            index, denoiser = np.flatnonzero(chosen == number), denoisers[number]
            window = _windows(rows, index, denoiser.text_length, draws[index, -2])
            text = GroupedText.of(window, tokenizer.eos_id, denoiser.shortest)
            source, target = corrupt(text, denoiser, draws[index, :-2], first, tokenizer.eos_id)
            if denoiser.mode is not None:
                source = streams.with_inserted(source, source.is_segment_start(), denoiser.mode)
            sources.append(source._replace(rows=index[source.rows]))
            targets.append(target._replace(rows=index[target.rows]))
        return conditional_batch(
            streams.concatenate(sources),
            streams.concatenate(targets),
            len(rows.ids),
            interface,
            tokenizer,
            bidirectional=bidirectional,
        )

    return Objective(corrupted, RowLayout((length,)))


def make_noise(density: float, mean_span: float) -> SpanNoise:
    """Return the noise; ValueError where there would be too little text between spans."""
    if not 0 < density < 1 or mean_span < 1 or density * (1 + 1 / mean_span) > 0.9:
        raise ValueError(
            f"config.objective.noise_density ({density}) and mean_span ({mean_span}) leave no text "
            "between the spans: density * (1 + 1 / mean_span) must be at most 0.9, mean_span at "
            "least 1"
        )
    return SpanNoise(density, mean_span)


def make_denoiser(
    noise: SpanNoise, interface: ModelInterface, name: str, mode: int | None = None
) -> Denoiser:
    """Return the denoiser of the longest text that fits when it is corrupted."""
    prompt = 0 if mode is None else 1
    encoder, decoder = interface.encoder_length, interface.length

    def fits(length: int) -> bool:
        inputs, targets = noise.lengths(length)
        if encoder is None:
            return inputs + targets + prompt <= decoder
        return inputs + prompt <= encoder and targets <= decoder

    found = [n for n in range(8, 2 * (decoder + (encoder or 0))) if fits(n)]
    if not found:
        beside = "" if encoder is None else f" beside encoder_length ({encoder})"
        raise ValueError(f"config.data.length ({decoder}) is too short for {name}{beside}")
    if encoder is not None:
        return Denoiser(noise, found[-1], encoder, decoder, mode)
    inputs = noise.lengths(found[-1])[0] + prompt
    return Denoiser(noise, found[-1], inputs, decoder - inputs, mode)


def _check_lengths(noise: SpanNoise, encoder: int, decoder: int) -> None:
    """Raise ValueError where the text that fills the encoder has other targets than the decoder."""
    length = max((n for n in range(2, 2 * encoder) if noise.lengths(n)[0] <= encoder), default=2)
    needed = noise.lengths(length)[1]
    if not needed <= decoder < needed + 16:
        raise ValueError(
            f"with config.data.encoder_length ({encoder}), noise_density ({noise.density}) and "
            f"mean_span ({noise.mean_span}), {length} tokens of text give {needed} of targets: set "
            f"config.data.length ({decoder}) to {needed}, or to at most {needed + 15}"
        )


def _windows(rows: Rows, index: np.ndarray, length: int, draws: np.ndarray) -> Rows:
    """Return a random window of `length` tokens of each of the rows `index`: int [n].

    draws: float [n] in [0, 1). A row that holds no more than that is kept whole.
    """
    if rows.ids.shape == (len(index), length):
        return rows
    held = np.count_nonzero(rows.segments[index], axis=1)
    first = (draws * (np.maximum(held - length, 0) + 1)).astype(int)
    at = first[:, None] + np.arange(length)
    ids, segments, positions, previous = (
        np.take_along_axis(x[index], at, axis=1)
        for x in (rows.ids, rows.segments, rows.positions, rows.previous)
    )
    is_cut = segments == segments[:, :1]
    continues = positions[:, 0] > 0
    positions = np.where(is_cut, positions - positions[:, :1], positions)
    segments = np.where(segments, segments - segments[:, :1] + 1, 0)
    before = np.take_along_axis(rows.ids[index], np.maximum(at[:, :1] - 1, 0), axis=1)[:, 0]
    previous[:, 0] = np.where(continues, before, previous[:, 0])
    return Rows(ids, segments, positions, previous)


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
