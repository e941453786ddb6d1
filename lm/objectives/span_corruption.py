"""Span corruption (T5, arXiv:1910.10683): spans are replaced by sentinels, and predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lm.config.fields import field
from lm.data import streams
from lm.data.rows import RowLayout, Rows
from lm.objectives import ModelInterface, Objective, RowGenerator, conditional_batch
from lm.objectives.spans import Denoiser, GroupedText, SpanNoise, corrupt
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
