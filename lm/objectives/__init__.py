"""Objectives: what a model is asked to predict, as a transformation of rows on the host.

The contract. An objective is a module with

    Config                     a frozen dataclass, the fields of `config.objective`
    build(config, tokenizer, form)
                               returns an `Objective`; ValueError where tokenizer, config or what
                               the model takes cannot work

An objective is a pure function of rows and randomness: the same rows and the same generators give
the same batch. It says in its `layout` which rows it wants, uses numpy only, gives all batches the
same structure and shapes, and treats rows independently, since a host calls it with its own rows
of the global batch alone.

It takes all rows of a host at once, not one at a time: the arithmetic is the same for every row,
and a Python call for each row would cost more than the work (20 million tokens/s are 50 us per row
of 1,024). Randomness stays per row
all the same: `rng(i)` makes the generator of row i, `default_rng([seed, epoch, index])`, only where
it is asked for, as making one costs 15 us.

Which tokens are ends and beginnings is the same for all. A document of a store, or a field of one,
ends in eos, which is predicted like any other token where its text is. bos is put before what a
decoder predicts, once in every segment, and is never predicted. An encoder's input has no bos but
where the objective says so (masked LM and classification, BERT's form).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lm.data.sources import RowLayout, Rows
from lm.data.tokenizer import Tokenizer
from lm.types import Batch

RowGenerator = Callable[[int], np.random.Generator]
# (model, params, batch, rng, *, train, config: LossConfig) -> (the SUM over the batch to
# differentiate, additive sums: `tokens`, what to divide by, `loss`, and others under other names)
Loss = Callable[..., tuple[Any, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class ModelInterface:
    """What the model takes, and so what an objective must make.

    length: T of the inputs and targets. encoder_length: of the encoder's stream, None without one.
    is_causal: whether a token of the inputs sees only itself and those before it.
    vocab_size: rows of the model's vocabulary matrix; None: those of the tokenizer.
    """

    length: int
    encoder_length: int | None = None
    is_causal: bool = True
    vocab_size: int | None = None

    def num_rows(self, tokenizer: Tokenizer) -> int:
        """Returns the ids that the model has: a tokenizer may have more, which nothing uses."""
        return self.vocab_size or tokenizer.vocab_size

    def spare_ids(self, tokenizer: Tokenizer) -> range:
        """Returns the ids that the model has and the tokenizer does not use."""
        return range(tokenizer.vocab_size, self.num_rows(tokenizer))


def mask_id(given: int | None, tokenizer: Tokenizer, form: ModelInterface) -> int:
    """Returns the id that stands for a hidden token.

    It is `given`, else the tokenizer's `<mask>` or `[MASK]`, else the first id of the model that
    the tokenizer does not use. Raises ValueError where there is none.
    """
    found = [tokenizer.special_ids[n] for n in ("<mask>", "[MASK]") if n in tokenizer.special_ids]
    spare = form.spare_ids(tokenizer)
    if given is None and not found and not spare:
        raise ValueError(
            f"no mask token: tokenizer {tokenizer.name} has no <mask> or [MASK], and all "
            f"{form.vocab_size} ids of config.model.vocab_size are its own; set it to at least "
            f"{tokenizer.vocab_size + 1}, or config.objective.mask_id to an id"
        )
    chosen = given if given is not None else found[0] if found else spare[0]
    limit = form.num_rows(tokenizer)
    if not 0 <= chosen < limit:
        raise ValueError(f"config.objective.mask_id ({chosen}) must be an id below {limit}")
    return chosen


@dataclasses.dataclass(frozen=True)
class Objective:
    """Makes batches of rows; row i may use `rng(i)`.

    layout: the rows that it takes. scores_every_token: every token of the data is predicted once,
    so that its loss is that of the text. tasks: names of the tasks that `Batch.tasks` tells apart.
    by_source: where rows of different sources have different objectives, these. loss: in place of
    the token cross-entropy of `lm.layers.cross_entropy.lm_loss`, a function of the same contract.
    """

    make: Callable[[Rows, RowGenerator], Batch]
    layout: RowLayout
    scores_every_token: bool = False
    tasks: tuple[str, ...] = ()
    by_source: Mapping[str, Objective] | None = None
    loss: Loss | None = None

    def __call__(self, rows: Rows, rng: RowGenerator, /) -> Batch:
        return self.make(rows, rng)

    def of(self, source: str) -> Objective:
        """Returns the objective of the rows of a source, by its path; ValueError if it has none."""
        if self.by_source is None:
            return self
        if source not in self.by_source:
            raise ValueError(
                f"no task of config.objective.tasks has the source {source}; they have: "
                f"{', '.join(self.by_source)}"
            )
        return self.by_source[source]
