"""Prefix language modelling (T5, arXiv:1910.10683): a text is predicted from its beginning."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.fields import field
from lm.data.rows import RowLayout, Rows
from lm.objectives import ModelInterface, Objective, RowGenerator, causal
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import HostBatch


@dataclasses.dataclass(frozen=True)
class Config:
    bidirectional: bool = field(True, "The prefix sees the whole of itself, not only backwards.")


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the prefix objective, for a decoder: the rows of `causal`, with a prefix in each.

    Every segment is split at a uniformly random position: of its `n` tokens, the first 0 to n - 1
    are the prefix and are not scored, the others are:

        ids            a b c d .      with a prefix of two tokens
        inputs         ^ a b c d
        bidirectional  1 1 1 0 0
        weights        0 0 1 1 1
    """
    plain = causal.build(causal.Config(), tokenizer, interface)

    def prefix(rows: Rows, rng: RowGenerator) -> HostBatch:
        batch = plain(rows, rng)
        held, last = rows.segments != 0, rows.segments.max(axis=1)
        shape = (len(rows.ids), max(int(last.max(initial=0)), 1) + 1)
        sizes = np.zeros(shape, int)  # of segment s of each row; 0 is padding
        np.add.at(sizes, (np.arange(shape[0])[:, None], rows.segments), 1)
        # drawn to the row's own number of segments: the batch it comes in changes nothing
        draws = np.zeros(shape)
        for i, count in enumerate(last):
            draws[i, 1 : count + 1] = rng(i).random(count)
        length = np.take_along_axis((draws * sizes).astype(int), rows.segments, 1)  # [B, T]
        inputs = batch.inputs
        if config.bidirectional:
            marked = (rows.positions <= length) & held
            inputs = dataclasses.replace(inputs, bidirectional=marked)
        scored = (rows.positions >= length) & held
        return dataclasses.replace(batch, inputs=inputs, weights=scored.astype(np.float32))

    return Objective(prefix, RowLayout((interface.length,)))
