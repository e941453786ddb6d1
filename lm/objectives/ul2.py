"""A mixture of denoisers (UL2, arXiv:2205.05131): span corruption of several kinds, row by row."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config import field
from lm.data import streams
from lm.data.sources import Layout, Rows
from lm.data.streams import Stream, changes
from lm.data.tokenizer import Tokenizer
from lm.objectives import Form, Objective, RowGenerator
from lm.objectives.span_corruption import Noise, Room, Text, checked, corrupt, first_sentinel
from lm.types import Batch

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
    )
    rates: tuple[float, ...] = field((), "Probability of each denoiser; empty: all the same.")
    mode_ids: tuple[int, ...] = field(
        (), "Ids of the mode tokens R, S and X, put before the text; empty: none is."
    )
    bidirectional: bool = field(
        True, "Without an encoder: the corrupted text is a prefix that its segment sees whole."
    )
    first_sentinel: int | None = field(
        None,
        "Id of the first sentinel, the next ones descending; unset: the tokenizer's <extra_id_0>, "
        "else the last id of the model.",
    )


def build(config: Config, tokenizer: Tokenizer, form: Form) -> Objective:
    """Returns the mixture: every row is corrupted by one denoiser, chosen at random.

    What a denoiser makes of a row is what `span_corruption` does with its density and mean span; S
    hides the end of each segment, as prefix language modelling does. A segment begins with the
    token of the row's mode where `mode_ids` names three.

    All denoisers take rows of the same length, the longest that fits for each of them. In a decoder
    the corrupted text and its targets together are about as long for all of them, and rows are
    full; with an encoder, denoisers that hide less leave room in the decoder's rows.
    """
    if not form.is_causal:
        raise ValueError("config.objective.name=ul2 needs a decoder, or an encoder with one")
    noises, rates = _denoisers(config)
    prompt = 1 if config.mode_ids else 0  # a token of each segment
    rooms = _rooms(noises, prompt, form)
    raw = rooms[0].raw
    most = max(int(noise.counts(raw)[1]) for noise in noises)
    sentinel = first_sentinel(config.first_sentinel, most, tokenizer, form)
    modes = [config.mode_ids[MODES.index(d[0])] if prompt else None for d in config.denoisers]

    def ul2(rows: Rows, rng: RowGenerator) -> Batch:
        draws = np.stack([rng(i).random(raw + 3) for i in range(len(rows.ids))])
        chosen = np.minimum(np.searchsorted(np.cumsum(rates), draws[:, -1]), len(rates) - 1)
        parts = []
        for number in np.unique(chosen):
            index = np.flatnonzero(chosen == number)
            text = Text.of(_take(rows, index), tokenizer.eos_id, rooms[number].shortest)
            sources, targets = corrupt(
                text, noises[number], rooms[number], draws[index, :-1], sentinel, tokenizer.eos_id
            )
            if modes[number] is not None:
                sources = _prepend(sources, modes[number])
            parts.append([s._replace(rows=index[s.rows]) for s in (sources, targets)])
        sources, targets = (_by_row(list(streams_)) for streams_ in zip(*parts, strict=True))
        return streams.conditional(
            sources,
            targets,
            batch_size=len(rows.ids),
            length=form.length,
            encoder_length=form.encoder_length,
            bos=tokenizer.bos_id,
            bidirectional=config.bidirectional and form.encoder_length is None,
        )

    return Objective(ul2, Layout((raw,)))


def _denoisers(config: Config) -> tuple[list[Noise], np.ndarray]:
    """Returns the noise of each denoiser, and its probability. Raises ValueError where wrong."""
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
    noises = [checked(density, mean or 1e9) for _, density, mean in config.denoisers]
    return noises, rates / rates.sum()


def _rooms(noises: list[Noise], prompt: int, form: Form) -> list[Room]:
    """Returns the room of each denoiser for rows of the same length, the longest that fits."""
    encoder, decoder = form.encoder_length, form.length

    def fits(raw: int) -> bool:
        lengths = [noise.lengths(raw) for noise in noises]
        if encoder is None:
            return all(sum(pair) + prompt <= decoder for pair in lengths)
        return all(a + prompt <= encoder and b <= decoder for a, b in lengths)

    found = [raw for raw in range(8, 2 * (decoder + (encoder or 0))) if fits(raw)]
    if not found:
        raise ValueError(
            f"config.data.length ({decoder}) and encoder_length ({encoder}) are too short for ul2"
        )
    raw = found[-1]
    if encoder is not None:
        return [Room(raw, encoder, decoder, prompt) for _ in noises]
    inputs = [noise.lengths(raw)[0] + prompt for noise in noises]
    return [Room(raw, n, decoder - n, prompt) for n in inputs]


def _take(rows: Rows, index: np.ndarray) -> Rows:
    return Rows(rows.ids[index], rows.segments[index], rows.positions[index], rows.previous[index])


def _prepend(stream: Stream, token: int) -> Stream:
    """Returns the stream with `token` before each of its segments."""
    firsts = stream.firsts()
    twice = np.repeat(np.arange(len(firsts)), 1 + firsts)
    is_new = changes(twice) & firsts[twice]
    ids = np.where(is_new, np.int32(token), stream.ids[twice])
    return Stream(ids, stream.rows[twice], stream.segments[twice])


def _by_row(parts: list[Stream]) -> Stream:
    joined = Stream(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    order = np.argsort(joined.rows, kind="stable")
    return Stream(*(part[order] for part in joined))
