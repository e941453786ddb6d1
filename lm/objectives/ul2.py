"""A mixture of denoisers (UL2, arXiv:2205.05131): span corruption of several kinds, row by row."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.fields import field
from lm.objectives import ModelInterface, Objective
from lm.objectives.span_corruption import make_denoiser, make_noise, mixture, sentinel_field
from lm.tokenizers.tokenizer import Tokenizer

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
    first_sentinel: int | None = sentinel_field()


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
    denoisers = []
    for mode, density, mean_span in config.denoisers:
        noise = make_noise(density, mean_span or 1e9)  # one span: a mean that no text reaches
        mode_id = config.mode_ids[MODES.index(mode)] if config.mode_ids else None
        denoisers.append(make_denoiser(noise, interface, "ul2", mode_id))
    return mixture(
        denoisers,
        rates,
        config.first_sentinel,
        tokenizer,
        interface,
        bidirectional=config.bidirectional,
    )
