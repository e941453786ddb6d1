"""Predict one field of a document from another: translation, summaries, prompt and response."""

from __future__ import annotations

import dataclasses

from lm.config.schema import field
from lm.data import streams
from lm.data.sources import RowLayout, Rows
from lm.data.tokenizer import Tokenizer
from lm.objectives import ModelInterface, Objective, RowGenerator
from lm.types import Batch


@dataclasses.dataclass(frozen=True)
class Config:
    fields: tuple[str, str] = field(
        ("source", "target"), "Fields of the stores: what is given, and what is predicted from it."
    )
    bidirectional: bool = field(
        False,
        "Without an encoder: tokens of the source see the whole source, not only those before.",
    )


def build(config: Config, tokenizer: Tokenizer, form: ModelInterface) -> Objective:
    """Returns the objective that scores every token of the target, its eos included, and no other.

    With an encoder its input is the source, and the decoder's the target; in a decoder the target
    follows the source, whose eos parts them: `streams.conditional` has the rows.
    """
    if not form.is_causal:
        raise ValueError(
            "config.objective.name=seq2seq predicts token after token: it needs a decoder, or an "
            "encoder with one (config.model.name=decoder or encoder_decoder)"
        )
    if form.encoder_length is not None and config.bidirectional:
        raise ValueError(
            "config.objective.bidirectional is for a decoder alone: an encoder always is"
        )

    def seq2seq(rows: Rows, rng: RowGenerator) -> Batch:
        del rng  # nothing is random
        return streams.conditional(
            streams.flatten(rows, 0),
            streams.flatten(rows, 1),
            batch_size=len(rows.ids),
            length=form.length,
            encoder_length=form.encoder_length,
            bos=tokenizer.bos_id,
            bidirectional=config.bidirectional,
        )

    return Objective(seq2seq, pair_layout(config.fields, form))


def pair_layout(fields: tuple[str, str], form: ModelInterface) -> RowLayout:
    """Returns the rows of two fields: apart for an encoder and a decoder, else in one stream."""
    if form.encoder_length is None:
        return RowLayout((form.length,), fields)
    return RowLayout((form.encoder_length, form.length), fields)
