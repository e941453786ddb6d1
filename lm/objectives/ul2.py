"""A mixture of denoisers (UL2, arXiv:2205.05131): span corruption of several kinds, row by row."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.schema import field
from lm.data import streams
from lm.data.sources import RowLayout, Rows
from lm.data.streams import Stream, boundaries
from lm.data.tokenizer import Tokenizer
from lm.objectives import ModelInterface, Objective, RowGenerator
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


def build(config: Config, tokenizer: Tokenizer, form: ModelInterface) -> Objective:
    """Returns the mixture: every row is corrupted by one denoiser, chosen at random.

    What a denoiser makes of a row is what `span_corruption` does with its density and mean span; S
    hides the end of each segment, as prefix language modelling does. A segment begins with the
    token of the row's mode where `mode_ids` names three.

    Each denoiser takes as many tokens of text as fill its row when they are corrupted. Rows are
    read at the longest of these lengths; a denoiser that takes fewer has a random window of them,
    so that about 7% of a decoder's text, and a quarter or more of an encoder's, is left out in an
    epoch, another part in each. With an encoder, the text fills its rows; denoisers that hide less
    leave room in the decoder's.
    """
    if not form.is_causal:
        raise ValueError("config.objective.name=ul2 needs a decoder, or an encoder with one")
    noises, rates = _denoisers(config)
    prompt = 1 if config.mode_ids else 0  # a token of each segment
    rooms = [_find_room(noise, prompt, form) for noise in noises]
    raw = max(room.raw for room in rooms)
    most = max(int(n.counts(room.raw)[1]) for n, room in zip(noises, rooms, strict=True))
    sentinel = first_sentinel(config.first_sentinel, most, tokenizer, form)
    modes = [config.mode_ids[MODES.index(d[0])] if prompt else None for d in config.denoisers]

    def ul2(rows: Rows, rng: RowGenerator) -> Batch:
        draws = np.stack([rng(i).random(raw + 4) for i in range(len(rows.ids))])
        chosen = np.minimum(np.searchsorted(np.cumsum(rates), draws[:, -1]), len(rates) - 1)
        parts = []
        for number in np.unique(chosen):
            index = np.flatnonzero(chosen == number)
            room, own = rooms[number], draws[index]
            text = Text.of(
                _windows(rows, index, room.raw, own[:, -2]), tokenizer.eos_id, room.shortest
            )
            sources, targets = corrupt(
                text, noises[number], room, own[:, :-2], sentinel, tokenizer.eos_id
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

    return Objective(ul2, RowLayout((raw,)))


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


def _find_room(noise: Noise, prompt: int, form: ModelInterface) -> Room:
    """Returns the longest text that fits when it is corrupted, and the lengths that it then has."""
    encoder, decoder = form.encoder_length, form.length

    def fits(raw: int) -> bool:
        inputs, targets = noise.lengths(raw)
        if encoder is None:
            return inputs + targets + prompt <= decoder
        return inputs + prompt <= encoder and targets <= decoder

    found = [raw for raw in range(8, 2 * (decoder + (encoder or 0))) if fits(raw)]
    if not found:
        raise ValueError(
            f"config.data.length ({decoder}) and encoder_length ({encoder}) are too short for ul2"
        )
    raw = found[-1]
    inputs = noise.lengths(raw)[0] + prompt if encoder is None else encoder
    return Room(raw, inputs, decoder - inputs if encoder is None else decoder, prompt)


def _windows(rows: Rows, index: np.ndarray, length: int, draws: np.ndarray) -> Rows:
    """Returns `length` tokens of each of the rows `index`, those from a random place on.

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


def _prepend(stream: Stream, token: int) -> Stream:
    """Returns the stream with `token` before each of its segments."""
    firsts = stream.is_segment_start()
    twice = np.repeat(np.arange(len(firsts)), 1 + firsts)
    is_new = boundaries(twice) & firsts[twice]
    ids = np.where(is_new, np.int32(token), stream.ids[twice])
    return Stream(ids, stream.rows[twice], stream.segments[twice])


def _by_row(parts: list[Stream]) -> Stream:
    joined = Stream(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    order = np.argsort(joined.rows, kind="stable")
    return Stream(*(part[order] for part in joined))
