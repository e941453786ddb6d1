"""Objectives: what a model is asked to predict, as a transformation of rows on the host.

The contract. An objective is a module with

    Config                     a frozen dataclass, the fields of `config.objective`
    build(config, tokenizer, form)
                               returns an `Objective`; ValueError where tokenizer, config or what
                               the model takes cannot work

An objective is a pure function of rows and randomness: the same rows and the same generators give
the same batch. It uses numpy only, keeps the shape [B, T] of its targets for all batches, and
treats rows independently, since a host calls it with its own rows of the global batch alone.

It takes all rows of a host at once, not one at a time: the arithmetic is the same for every row,
and a Python call for each row would cost more than the work (20 million tokens/s are 50 us per row
of 1,024). Randomness stays per row
all the same: `rng(i)` makes the generator of row i, `default_rng([seed, epoch, index])`, only where
it is asked for, as making one costs 15 us.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from lm.data.sources import Rows
from lm.types import Batch

RowGenerator = Callable[[int], np.random.Generator]


@dataclasses.dataclass(frozen=True)
class Form:
    """What the model takes, and so what an objective must make.

    length: T of the inputs and targets. encoder_length: of the encoder's stream, None without one.
    is_causal: whether a token of the inputs sees only itself and those before it.
    """

    length: int
    encoder_length: int | None = None
    is_causal: bool = True


class Objective(Protocol):
    def __call__(self, rows: Rows, rng: RowGenerator, /) -> Batch:
        """Returns the batch of these rows, numpy arrays; row i may use `rng(i)`."""
        ...
