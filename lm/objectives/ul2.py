"""A mixture of denoisers (UL2, arXiv:2205.05131): span corruption of several kinds, row by row."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.fields import field
from lm.data import streams
from lm.data.sources import RowLayout, Rows
from lm.data.tokenizer import Tokenizer
from lm.objectives import ModelInterface, Objective, RowGenerator, conditional_batch
from lm.objectives.span_corruption import (
    GroupedText,
    RowBudget,
    SpanNoise,
    corrupt,
    first_sentinel,
    make_noise,
)
from lm.types import HostBatch

MODES = ("R", "S", "X")


@dataclasses.dataclass(frozen=True)
class Config:
    denoisers: tuple[tuple[str, float, float], ...] = field(
        (
            ("R", 0.15, 3.0),
            ("R", 0.15, 8.0),
            ("S", 0.25, 0.0),
            ("X", 0.5, 3.0),
            ("X", 0.5, 8.0),
            ("X", 0.15, 64.0),
            ("X", 0.5, 64.0),
        ),
        "(mode, noise density, mean span) of each; a mean span of 0 is one span, at the end.",
        ge=0,
    )
    rates: tuple[float, ...] = field((), "Probability of each denoiser; empty: all the same.", gt=0)
    mode_ids: tuple[int, ...] = field(
        (), "Ids of the mode tokens R, S and X, put before the text; empty: none is.", ge=0
    )
    bidirectional: bool = field(
        True, "Without an encoder: the corrupted text is a prefix that its segment sees whole."
    )
    first_sentinel: int | None = field(
        None,
        "Id of the first sentinel, the next ones descending; unset: the tokenizer's <extra_id_0>, "
        "else the last id of the model.",
        ge=0,
    )


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the mixture: every row is corrupted by one denoiser, chosen at random.

    A denoiser is `span_corruption` of its density and mean span; S hides the end of each segment,
    as prefix language modelling does. A segment begins with the token of the row's mode where
    `mode_ids` names three.

    Each denoiser takes as many tokens of text as fill its row when they are corrupted. Rows are
    read at the longest of these lengths; a denoiser that takes fewer has a random window of them,
    so that about 7% of a decoder's text, and a quarter or more of an encoder's, is dropped in an
    epoch, another part in each. With an encoder, the text fills its rows; denoisers that hide less
    leave padding in the decoder's.
    """
    interface.require_decoder("ul2")
    noises, rates = _denoisers(config)
    prompt = 1 if config.mode_ids else 0  # a token of each segment
    budgets = [_fit_budget(noise, prompt, interface) for noise in noises]
    length = max(budget.text_length for budget in budgets)
    num_spans = [int(n.counts(b.text_length)[1]) for n, b in zip(noises, budgets, strict=True)]
    sentinel = first_sentinel(config.first_sentinel, max(num_spans), tokenizer, interface)
    modes = [config.mode_ids[MODES.index(d[0])] if prompt else None for d in config.denoisers]

    def ul2(rows: Rows, rng: RowGenerator) -> HostBatch:
        draws = np.stack([rng(i).random(length + 4) for i in range(len(rows.ids))])
        chosen = np.minimum(np.searchsorted(np.cumsum(rates), draws[:, -1]), len(rates) - 1)
        sources, targets = [], []
        for number in np.unique(chosen):
            index = np.flatnonzero(chosen == number)
            budget, mode = budgets[number], modes[number]
            window = _windows(rows, index, budget.text_length, draws[index, -2])
            text = GroupedText.of(window, tokenizer.eos_id, budget.shortest)
            source, target = corrupt(
                text, noises[number], budget, draws[index, :-2], sentinel, tokenizer.eos_id
            )
            if mode is not None:
                source = streams.with_inserted(source, source.is_segment_start(), mode)
            sources.append(source._replace(rows=index[source.rows]))
            targets.append(target._replace(rows=index[target.rows]))
        return conditional_batch(
            streams.concatenate(sources),
            streams.concatenate(targets),
            len(rows.ids),
            interface,
            tokenizer,
            bidirectional=config.bidirectional,
        )

    return Objective(ul2, RowLayout((length,)))


def _denoisers(config: Config) -> tuple[list[SpanNoise], np.ndarray]:
    """Return the noise of each denoiser and its probability; ValueError where they are wrong."""
    count = len(config.denoisers)
    if not count or any(mode not in MODES for mode, _, _ in config.denoisers):
        raise ValueError(
            f"config.objective.denoisers must name modes of {', '.join(MODES)}: {config.denoisers}"
        )
    rates = np.array(config.rates or [1.0] * count)
    if len(rates) != count or rates.min() <= 0:
        raise ValueError(
            f"config.objective.rates ({len(rates)}) must be {count} positive numbers, one for each "
            "denoiser"
        )
    if len(config.mode_ids) not in (0, len(MODES)):
        raise ValueError(
            f"config.objective.mode_ids ({len(config.mode_ids)}) must be {len(MODES)} ids, of "
            f"{', '.join(MODES)}, or none"
        )
    # one span: a mean that no text reaches
    noises = [make_noise(density, mean or 1e9) for _, density, mean in config.denoisers]
    return noises, rates / rates.sum()


def _fit_budget(noise: SpanNoise, prompt: int, interface: ModelInterface) -> RowBudget:
    """Return the longest text that fits when it is corrupted, and the lengths that it then has."""
    encoder, decoder = interface.encoder_length, interface.length

    def fits(length: int) -> bool:
        inputs, targets = noise.lengths(length)
        if encoder is None:
            return inputs + targets + prompt <= decoder
        return inputs + prompt <= encoder and targets <= decoder

    found = [n for n in range(8, 2 * (decoder + (encoder or 0))) if fits(n)]
    if not found:
        raise ValueError(
            f"config.data.length ({decoder}) and encoder_length ({encoder}) are too short for ul2"
        )
    if encoder is not None:
        return RowBudget(found[-1], encoder, decoder, prompt)
    inputs = noise.lengths(found[-1])[0] + prompt
    return RowBudget(found[-1], inputs, decoder - inputs, prompt)


def _windows(rows: Rows, index: np.ndarray, length: int, draws: np.ndarray) -> Rows:
    """Return a random window of `length` tokens of each of the rows `index`: int [n].

    draws: float [n] in [0, 1). A row that holds no more than that is kept whole.
    """
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
