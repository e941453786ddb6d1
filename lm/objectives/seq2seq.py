"""Predict one field of a document from another: translation, summaries, prompt and response."""

from __future__ import annotations

import dataclasses

from lm.config.fields import field
from lm.data import streams
from lm.data.rows import RowLayout, Rows
from lm.objectives import ModelInterface, Objective, RowGenerator, conditional_batch
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import HostBatch


@dataclasses.dataclass(frozen=True)
class Config:
    fields: tuple[str, str] = field(
        ("source", "target"), "Fields of the stores: what is given, and what is predicted from it."
    )
    bidirectional: bool = field(
        False,
        "Without an encoder: tokens of the source see the whole source, not only those before.",
    )


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the objective that scores every token of the target, its eos included, and no other.

    With an encoder its input is the source, and the decoder's the target; in a decoder the target
    follows the source, separated by the source's eos: `conditional_batch` shows the rows.
    """
    interface.require_decoder("seq2seq")
    if interface.encoder_length is not None and config.bidirectional:
        raise ValueError(
            "config.objective.bidirectional is for a decoder alone: an encoder always is"
        )

    def seq2seq(rows: Rows, rng: RowGenerator) -> HostBatch:
        source, target = streams.flatten(rows, 0), streams.flatten(rows, 1)
        return conditional_batch(
            source, target, len(rows.ids), interface, tokenizer, bidirectional=config.bidirectional
        )

    return Objective(seq2seq, pair_layout(config.fields, interface))


def pair_layout(fields: tuple[str, str], interface: ModelInterface) -> RowLayout:
    """Return the layout of two fields: a stream each with an encoder, else both in one stream."""
    if interface.encoder_length is None:
        return RowLayout((interface.length,), fields)
    return RowLayout((interface.encoder_length, interface.length), fields)
