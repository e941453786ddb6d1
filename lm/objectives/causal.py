"""Predict every token from those before it in its document."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.data.sources import Layout, Rows
from lm.data.tokenizer import Tokenizer
from lm.objectives import Form, Objective, RowGenerator
from lm.types import Batch, Tokens


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing to choose."""


def build(config: Config, tokenizer: Tokenizer, form: Form) -> Objective:
    """Returns the causal objective: targets are the tokens, inputs are the tokens before them.

    The input of a document's first token is bos; where a segment is the rest of a document that was
    cut, that of its first token is the token before it in the document. So every token of the data
    is predicted once, the eos of every document included:

        ids       a b . c d      (`.` is eos)
        segments  1 1 1 2 2
        inputs    ^ a b ^ c      (`^` is bos)
    """
    del config
    if not form.is_causal or form.encoder_length is not None:
        raise ValueError(
            "config.objective.name=causal needs a model in which a token sees only those before "
            "it, without an encoder: config.model.name=decoder, say"
        )
    bos = np.int32(tokenizer.bos_id)

    def causal(rows: Rows, rng: RowGenerator) -> Batch:
        del rng  # nothing is random
        inputs = np.empty_like(rows.ids)
        inputs[:, 1:] = rows.ids[:, :-1]
        inputs[rows.positions == 0] = bos
        np.copyto(inputs, rows.previous, where=rows.previous >= 0)
        scored = rows.segments != 0
        inputs *= scored
        return Batch(
            inputs=Tokens(ids=inputs, segments=rows.segments, positions=rows.positions),
            targets=rows.ids,
            weights=scored.astype(np.float32),
        )

    return Objective(causal, Layout((form.length,)), scores_every_token=True)
