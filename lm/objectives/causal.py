"""Causal language modelling: every token is predicted from those before it in its document."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.fields import field
from lm.data import streams
from lm.data.rows import RowLayout, Rows
from lm.objectives import ModelInterface, Objective, RowGenerator
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Batch, HostBatch, Tokens


@dataclasses.dataclass(frozen=True)
class Config:
    begins_with_bos: bool = field(
        True,
        "Documents begin with bos; else their first tokens are inputs alone, and not scored: for "
        "weights that were trained so.",
    )


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the causal objective: targets are the tokens, inputs are the tokens before them.

    The input of a document's first token is bos; in the rest of a document that was cut, the first
    input is the token before the cut. So every token of the data is predicted once, the eos of
    every document included:

        ids       a b . c d      (`.` is eos)
        segments  1 1 1 2 2
        inputs    ^ a b ^ c      (`^` is bos)

    Without bos there is padding in its place, and a document's first token has position 0 where it
    is an input.
    """
    if not interface.is_causal or interface.encoder_length is not None:
        raise ValueError(
            "config.objective.name=causal needs a model in which a token sees only those before "
            "it, without an encoder: config.model.name=decoder, say"
        )

    def causal(rows: Rows, rng: RowGenerator) -> HostBatch:
        inputs = streams.shift_right(rows.ids, rows.segments, rows.positions, tokenizer.bos_id)
        np.copyto(inputs, rows.previous, where=rows.previous >= 0)
        scored, positions = rows.segments != 0, rows.positions
        if not config.begins_with_bos:
            is_bos = scored & (positions == 0) & (rows.previous < 0)
            start = np.arange(scored.shape[1]) - positions  # of a token's segment
            positions = positions - np.take_along_axis(is_bos, start, axis=1)
            positions, scored = np.where(is_bos, 0, positions), scored & ~is_bos
        return Batch(
            inputs=Tokens(inputs * scored, np.where(scored, rows.segments, 0), positions),
            targets=rows.ids,
            weights=scored.astype(np.float32),
        )

    layout = RowLayout((interface.length,))
    return Objective(causal, layout, scores_every_token=config.begins_with_bos)
