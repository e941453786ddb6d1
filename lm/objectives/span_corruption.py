"""Span corruption (T5, arXiv:1910.10683): spans are replaced by sentinels, and predicted."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from lm.config.schema import field
from lm.data import streams
from lm.data.sources import RowLayout, Rows
from lm.data.streams import Stream, boundaries
from lm.data.tokenizer import Tokenizer
from lm.objectives import ModelInterface, Objective, RowGenerator
from lm.types import Batch


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


class Noise(NamedTuple):
    """How a text is corrupted: the fraction that is hidden, and the mean tokens of a span."""

    density: float
    mean_span: float

    def counts(self, length: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the hidden tokens and the spans of a text of `length` tokens, as T5 has them."""
        noise = np.clip(np.round(np.multiply(length, self.density)), 1, np.subtract(length, 1))
        return noise.astype(int), np.maximum(np.round(noise / self.mean_span), 1).astype(int)

    def lengths(self, length: int) -> tuple[int, int]:
        """Returns the tokens of the corrupted text and of the spans, sentinels and eos included."""
        noise, spans = (int(n) for n in self.counts(length))
        return length - noise + spans + 1, noise + spans + 1


class Room(NamedTuple):
    """What a row holds before (`raw`) and after: the corrupted text, and the spans.

    prompt: tokens that are put before the corrupted text of every segment, beside its eos.
    """

    raw: int
    inputs: int
    targets: int
    prompt: int = 0

    @property
    def shortest(self) -> int:
        """Tokens below which a document shares its segment with the next one.

        So no row has more segments than its room for eos tokens allows, each with a span: one needs
        a sentinel and an eos on both sides, and what is cut out of a document had no eos before.
        """
        spare = self.inputs + self.targets - self.raw - 1
        return -(-self.raw // max(spare // (4 + self.prompt), 1))


def build(config: Config, tokenizer: Tokenizer, form: ModelInterface) -> Objective:
    """Returns T5's span corruption.

    In a row of one document the number of hidden tokens and of spans, and the lengths of the
    random spans, are those of T5's `random_spans_noise_mask`. `x y z` are sentinels, numbered in
    every segment, and `.` is eos:

        text      a b c d e f g h .
        encoder   a b x e f g y .       targets  x c d y h .

    Rows of several documents keep them apart. Each has an eos of its own in the targets, for
    which the row has fewer hidden tokens and spans, just enough to fill it. A document of fewer
    tokens than `Room.shortest` shares its segment with the next one.

    The encoder's input and the targets fill their rows: the text for them is longer than both
    (568 tokens give 512 and 114). In a decoder they share a row, the text as a prefix.
    """
    if not form.is_causal:
        raise ValueError(
            "config.objective.name=span_corruption needs a decoder, or an encoder with one: "
            "config.model.name=encoder_decoder, say; for an encoder there is mlm"
        )
    noise = checked(config.noise_density, config.mean_span)
    room = find_room(noise, form)
    sentinel = first_sentinel(
        config.first_sentinel, int(noise.counts(room.raw)[1]), tokenizer, form
    )

    def span_corruption(rows: Rows, rng: RowGenerator) -> Batch:
        text = Text.of(rows, tokenizer.eos_id, room.shortest)
        draws = [rng(i).random(room.raw + 2) for i in range(len(rows.ids))]
        corrupted = corrupt(text, noise, room, np.stack(draws), sentinel, tokenizer.eos_id)
        return streams.conditional(
            *corrupted,
            batch_size=len(rows.ids),
            length=form.length,
            encoder_length=form.encoder_length,
            bos=tokenizer.bos_id,
            bidirectional=config.bidirectional and form.encoder_length is None,
        )

    return Objective(span_corruption, RowLayout((room.raw,)))


def checked(density: float, mean_span: float) -> Noise:
    """Returns the noise. Raises ValueError where there would be too little text between spans."""
    if not 0 < density < 1 or mean_span < 1 or density * (1 + 1 / mean_span) > 0.9:
        raise ValueError(
            f"config.objective.noise_density ({density}) and mean_span ({mean_span}) leave no text "
            "between the spans: density * (1 + 1 / mean_span) must be at most 0.9, mean_span at "
            "least 1"
        )
    return Noise(density, mean_span)


def find_room(noise: Noise, form: ModelInterface) -> Room:
    """Returns the longest text that fits when it is corrupted, and the lengths that it then has.

    Raises ValueError where the lengths of encoder and decoder don't fit together.
    """
    if form.encoder_length is None:
        raw = _longest(lambda n: sum(noise.lengths(n)), form.length, "data.length")
        inputs, _ = noise.lengths(raw)
        return Room(raw, inputs, form.length - inputs)
    raw = _longest(lambda n: noise.lengths(n)[0], form.encoder_length, "data.encoder_length")
    needed = noise.lengths(raw)[1]
    if not needed <= form.length < needed + 16:
        raise ValueError(
            f"with config.data.encoder_length ({form.encoder_length}), noise_density "
            f"({noise.density}) and mean_span ({noise.mean_span}), {raw} tokens of text give "
            f"{needed} of targets: set config.data.length ({form.length}) to {needed}, or to at "
            f"most {needed + 15}"
        )
    return Room(raw, form.encoder_length, form.length)


def _longest(length_of, limit: int, name: str) -> int:
    """Returns the most tokens of text whose corrupted length is at most `limit`."""
    found = [n for n in range(2, 2 * limit + 2) if length_of(n) <= limit]
    if not found or found[-1] < 8:
        raise ValueError(f"config.{name} ({limit}) is too short for span corruption")
    return found[-1]


def first_sentinel(
    given: int | None, spans: int, tokenizer: Tokenizer, form: ModelInterface
) -> int:
    """Returns the id of the first of `spans` descending sentinels.

    Raises ValueError where one of them would be a token of the text.
    """
    spare = form.spare_ids(tokenizer)
    named = tokenizer.special_ids.get("<extra_id_0>")
    first = given if given is not None else named if named is not None else spare.stop - 1
    ids = range(first, first - spans, -1)
    special = {i for i in tokenizer.special_ids.values() if i < form.num_rows(tokenizer)}
    if not all(i in spare or i in special for i in ids):
        raise ValueError(
            f"{spans} sentinels from id {first} down are not free: tokenizer {tokenizer.name} uses "
            f"{tokenizer.vocab_size} of the {spare.stop} ids of config.model.vocab_size; set it to "
            f"at least {tokenizer.vocab_size + spans + 1}, or config.objective.first_sentinel"
        )
    return first


class Text(NamedTuple):
    """The documents of rows without the eos at their ends, and where they lie: G groups.

    stream: the tokens; groups: int [n], of which group each is, ascending. rows, segments: int [G].
    """

    stream: Stream
    groups: np.ndarray
    rows: np.ndarray
    segments: np.ndarray

    @classmethod
    def of(cls, rows: Rows, eos: int, shortest: int) -> Text:
        """Returns the text of `rows`; documents below `shortest` share a group with the next."""
        stream = streams.flatten(rows)
        firsts = np.flatnonzero(stream.is_segment_start())
        column = np.nonzero(rows.segments)[1]
        bucket = stream.rows[firsts] * (rows.ids.shape[1] + 1) + column[firsts] // shortest
        begins = firsts[np.append(True, bucket[1:] != bucket[:-1])[: len(firsts)]]
        group = np.zeros(len(stream.ids), int)
        group[begins] = 1
        group = np.cumsum(group) - 1
        is_last = np.append(group[1:] != group[:-1], True)[: len(group)]
        inside = ~(is_last & (stream.ids == eos))
        return cls(stream.keep(inside), group[inside], stream.rows[begins], stream.segments[begins])


def corrupt(
    text: Text, noise: Noise, room: Room, draws: np.ndarray, sentinel: int, eos: int
) -> tuple[Stream, Stream]:
    """Returns the corrupted text and the hidden spans, each group of both with eos at its end.

    draws: float [B, room.raw + 2] in [0, 1). A group that is too short for a span has no targets.
    """
    sizes = np.bincount(text.groups, minlength=len(text.rows))
    hidden, spans = _share_out(sizes, text.rows, noise, room, draws[:, -2:])
    keys = draws[text.stream.rows, streams.positions_since(boundaries(text.stream.rows))]
    mask = random_spans(hidden, spans, text.groups, keys)
    begins = mask & ~np.append(False, mask[:-1])  # a group begins with text: spans never touch
    number = np.cumsum(begins) - 1 - (np.cumsum(spans) - spans)[text.groups]
    ids, sentinels = text.stream.ids, (sentinel - number).astype(np.int32)
    kept = ~mask | begins
    twice = np.repeat(np.arange(len(ids)), mask + begins.astype(int))  # sentinel and first token
    values = np.where(boundaries(twice) & begins[twice], sentinels[twice], ids[twice])
    shown = np.where(begins, sentinels, ids)[kept]
    return (
        _with_ends(text.groups[kept], shown, np.arange(len(sizes)), text, eos),
        _with_ends(text.groups[twice], values, np.flatnonzero(spans), text, eos),
    )


def random_spans(
    hidden: np.ndarray, spans: np.ndarray, groups: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """Returns bool [n]: which tokens are hidden, `hidden[g]` of group g in `spans[g]` spans.

    In a group text and spans alternate, text first. The lengths of the spans are a random
    composition of `hidden[g]`, each as likely as any other, and so are those of the text between.
    groups: int [n], ascending; keys: float [n] in [0, 1).
    """
    able = spans[groups] > 0
    groups, keys = groups[able], keys[able]
    is_hidden = streams.positions_since(boundaries(groups)) < hidden[groups]
    parts = [_random_parts(groups[of], keys[of], spans) for of in (~is_hidden, is_hidden)]
    result = np.zeros(len(able), bool)
    result[able] = np.repeat(np.arange(2 * len(parts[0])) % 2 == 1, np.stack(parts, 1).ravel())
    return result


def _random_parts(groups: np.ndarray, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the lengths of `counts[g]` parts into which the items of each group g are cut."""
    firsts = boundaries(groups)
    order = np.lexsort((np.where(firsts, -1.0, keys), groups))  # the first item begins a part
    begins = np.empty(len(groups), bool)
    begins[order] = streams.positions_since(firsts) < counts[groups]
    return np.diff(np.append(np.flatnonzero(begins), len(groups)))


def _share_out(
    sizes: np.ndarray, rows: np.ndarray, noise: Noise, room: Room, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hidden tokens and the spans of every group, int [G].

    With `d` hidden tokens and `k` spans a row of `c` tokens in `n` groups, `m` of them with spans,
    becomes `c - d + k + n` and `d + k + m` tokens (without a prompt). `d` and `k` are T5's, lowered
    where these would be more than there is room for, and shared out by the length of the groups.
    """

    def per_row(values: np.ndarray) -> np.ndarray:
        return np.bincount(rows, values, minlength=len(draws)).astype(int)

    able = sizes >= 2
    text, num_able = per_row(sizes * able), per_row(able)
    excess = per_row(sizes + 1 + room.prompt) - room.inputs
    free = room.targets - num_able
    hidden, spans = noise.counts(np.maximum(text, 2))
    spans = np.minimum(np.maximum(spans, num_able), (free - np.maximum(excess, 0)) // 2)
    spans = np.minimum(spans, per_row(sizes // 2 * able)) * (num_able > 0)
    hidden = np.minimum(np.maximum(hidden, spans + np.maximum(excess, 0)), free - spans)
    hidden = np.minimum(hidden, text - spans) * (num_able > 0)
    of_group = able + _apportion(spans - num_able, (sizes // 2 - 1) * able, rows, draws[:, 0])
    rest = (sizes - 2 * of_group) * able
    return of_group + _apportion(hidden - spans, rest, rows, draws[:, 1]), of_group


def _apportion(
    total: np.ndarray, weights: np.ndarray, rows: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """Returns int [G]: `total[r]` shared out over the groups of row r, on average by weight.

    Systematic rounding: no group gets more than its weight if the total is not more than all of
    them. weights: int [G]; rows: int [G], ascending; draws: float [B] in [0, 1).
    """
    sums = np.maximum(np.bincount(rows, weights, minlength=len(total)).astype(int), 1)
    offset = (draws * sums).astype(int)
    upto = np.cumsum(weights)
    before = upto - weights
    row_begin = before[np.maximum.accumulate(np.where(boundaries(rows), np.arange(len(rows)), 0))]
    at = [(total[rows] * (x - row_begin) + offset[rows]) // sums[rows] for x in (before, upto)]
    return at[1] - at[0]


def _with_ends(
    groups: np.ndarray, ids: np.ndarray, ended: np.ndarray, text: Text, eos: int
) -> Stream:
    """Returns the tokens, with eos at the ends of the groups `ended`."""
    order = np.argsort(np.concatenate([groups, ended]), kind="stable")
    ids = np.append(ids, np.full(len(ended), eos)).astype(np.int32)[order]
    groups = np.concatenate([groups, ended])[order]
    return Stream(ids, text.rows[groups], text.segments[groups])
