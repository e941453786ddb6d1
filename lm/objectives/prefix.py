"""Prefix language modelling (T5, arXiv:1910.10683): a text is predicted from its beginning."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.schema import field
from lm.data.sources import RowLayout, Rows
from lm.data.tokenizer import Tokenizer
from lm.objectives import ModelInterface, Objective, RowGenerator, causal
from lm.types import Batch


@dataclasses.dataclass(frozen=True)
class Config:
    bidirectional: bool = field(True, "The prefix sees the whole of itself, not only backwards.")


def build(config: Config, tokenizer: Tokenizer, form: ModelInterface) -> Objective:
    """Returns the prefix objective, for a decoder: the rows of `causal`, with a prefix in each.

    Every segment is split at a random place, each as likely as any other: of its `n` tokens, the
    first 0 to n - 1 are the prefix and are not scored, the others are:

        ids            a b c d .      with a prefix of two tokens
        inputs         ^ a b c d
        bidirectional  1 1 1 0 0
        weights        0 0 1 1 1
    """
    plain = causal.build(causal.Config(), tokenizer, form)

    def prefix(rows: Rows, rng: RowGenerator) -> Batch:
        batch = plain(rows, rng)
        count = max(int(rows.segments.max(initial=0)), 1)
        shape = (len(rows.ids), count + 1)
        sizes = np.zeros(shape, int)  # of segment s of each row; 0 is padding
        np.add.at(sizes, (np.arange(shape[0])[:, None], rows.segments), 1)
        # drawn to the row's own number of segments: the batch it comes in changes nothing
        draws = np.zeros(shape)
        for i, last in enumerate(rows.segments.max(axis=1)):
            draws[i, 1 : last + 1] = rng(i).random(last)
        lengths = (draws * sizes).astype(int)
        of_token = np.take_along_axis(lengths, rows.segments, 1)
        inside = rows.positions <= of_token
        scored = (rows.positions >= of_token) & (rows.segments != 0)
        if config.bidirectional:
            marked = inside & (rows.segments != 0)
            inputs = dataclasses.replace(batch.inputs, bidirectional=marked)
            batch = dataclasses.replace(batch, inputs=inputs)
        return dataclasses.replace(batch, weights=scored.astype(np.float32))

    return Objective(prefix, RowLayout((form.length,)))
