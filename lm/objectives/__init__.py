"""Objectives: training targets as a pure transformation of rows on the host (NumPy only).

The contract. An objective is a module with

    Config                     a frozen dataclass, the fields of `config.objective`
    build(config, tokenizer, interface)
                               returns an `Objective`; ValueError where tokenizer, config or the
                               model's interface cannot work

The same rows and generators give the same batch; all batches have the same structure and shapes;
rows are treated independently, since a host has only its own rows of the global batch. All rows of
a host are transformed at once: a Python call for each row would cost more than the work (20 million
tokens/s are 50 us per row of 1,024). Randomness is per row: `rng(i)` makes the generator of row i,
`default_rng([seed, epoch, index])`; only where it is needed, as making one costs 15 us.

A document of a store, or a field of one, ends in eos, which is predicted like any other token. bos
precedes the decoder's targets, once in every segment, and is never predicted. An encoder's input
has no bos unless the objective says so (masked LM and classification, as in BERT).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lm.config.fields import field
from lm.data import streams
from lm.data.rows import RowLayout, Rows
from lm.data.streams import Stream
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Batch, HostBatch, HostTokens, Tokens, VocabularyPart

if TYPE_CHECKING:
    from lm.types import Array

RowGenerator = Callable[[int], np.random.Generator]
# (model, params, batch, rng, *, train, config: LossConfig, step: int32 [], None in evaluation) ->
# (the SUM over the batch to differentiate, additive sums: `tokens`, the divisor, `loss`, and others
# under other names). Where the Config has the fields `teacher`, a run's folder, and `teacher_step`,
# training calls it with the keyword `teacher`: (the model of that run, its parameters).
Loss = Callable[..., tuple["Array", dict[str, "Array"]]]


@dataclasses.dataclass(frozen=True)
class ModelInterface:
    """The shapes that a model takes.

    length: T of the inputs and targets. encoder_length: of the encoder's input, None without one.
    is_causal: a token of the inputs sees only itself and those before it.
    vocab_size: rows of the model's vocabulary matrix; None: those of the tokenizer.
    image_size: height and width of its pictures; None: it takes none.
    num_classes: those that a classifier tells apart; None: it is none.
    batch_size: rows of a global batch, all micro-batches together.
    """

    length: int
    encoder_length: int | None = None
    is_causal: bool = True
    vocab_size: int | None = None
    image_size: int | None = None
    batch_size: int | None = None
    num_classes: int | None = None

    def num_ids(self, tokenizer: Tokenizer) -> int:
        """Return the number of ids of the model: the tokenizer may have more, unused ones."""
        return self.vocab_size or tokenizer.vocab_size

    def spare_ids(self, tokenizer: Tokenizer) -> range:
        """Return the ids of the model that the tokenizer does not use."""
        return range(tokenizer.vocab_size, self.num_ids(tokenizer))

    def require_decoder(self, name: str) -> None:
        """Raise ValueError where the model does not predict token after token."""
        if not self.is_causal:
            raise ValueError(
                f"config.objective.name={name} needs a decoder, or an encoder with one: "
                "config.model.name=decoder or encoder_decoder; for an encoder there is mlm"
            )


def mask_field() -> int | None:
    """Return the field `mask_id` of a config."""
    return field(
        None,
        "Unset: the tokenizer's <mask> or [MASK], else the first id that it does not use.",
        ge=0,
    )


def mask_id(given: int | None, tokenizer: Tokenizer, interface: ModelInterface) -> int:
    """Return the id of the mask token: `given`, else the tokenizer's `<mask>` or `[MASK]`, else the
    first id of the model that the tokenizer does not use; ValueError where there is none.
    """
    named = [tokenizer.special_ids[n] for n in ("<mask>", "[MASK]") if n in tokenizer.special_ids]
    candidates = [*([] if given is None else [given]), *named, *interface.spare_ids(tokenizer)[:1]]
    if not candidates:
        raise ValueError(
            f"no mask token: tokenizer {tokenizer.name} has no <mask> or [MASK], and all "
            f"{interface.vocab_size} ids of config.model.vocab_size are its own; set it to at "
            f"least {tokenizer.vocab_size + 1}, or config.objective.mask_id to an id"
        )
    if not 0 <= candidates[0] < (limit := interface.num_ids(tokenizer)):
        raise ValueError(f"config.objective.mask_id ({candidates[0]}) must be an id below {limit}")
    return candidates[0]


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """The loss over pairs of rows of a global batch, `lm.layers.pair_loss`, and its evaluation.

    kind: "softmax" or "sigmoid". encode: texts -> their tokens [n, T]; ValueError where one is too
    long. prompts: texts that an evaluation embeds beside its rows. compare: the figures of a whole
    evaluation from embeddings float32 [N, 2, E] and targets int32 [N, 5] of its rows, and those of
    the prompts, float32 [M, E].
    """

    kind: str
    encode: Callable[[Sequence[str]], HostTokens]
    prompts: Sequence[str]
    compare: Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A function from rows to batches; row i may use `rng(i)`.

    layout: the rows that it takes. scores_every_token: every token of the data is predicted once,
    so that its loss is that of the text. tasks: the names of the numbers in `Batch.tasks`.
    by_source: the objective of each source, where they differ. loss: in place of the token
    cross-entropy of `lm.layers.cross_entropy.lm_loss`, a function of the same contract. pairs: in
    place of either, a loss that compares rows. summarize: the figures of an evaluation from the
    sums of all of it, in place of means per token. parts: of the columns and the vocabulary, where
    a target can only be some of the ids. make_evaluation: in place of `make` in an evaluation,
    where training adds noise.
    """

    make: Callable[[Rows, RowGenerator], HostBatch]
    layout: RowLayout
    scores_every_token: bool = False
    tasks: tuple[str, ...] = ()
    by_source: Mapping[str, Objective] | None = None
    loss: Loss | None = None
    pairs: PairLoss | None = None
    summarize: Callable[[Mapping[str, np.ndarray]], dict[str, float]] | None = None
    parts: tuple[VocabularyPart, ...] = ()
    make_evaluation: Callable[[Rows, RowGenerator], HostBatch] | None = None

    def __call__(self, rows: Rows, rng: RowGenerator, /) -> HostBatch:
        return self.make(rows, rng)

    def for_source(self, source: str) -> Objective:
        """Return the objective of a source, by its path; ValueError if it has none."""
        if self.by_source is None:
            return self
        if source not in self.by_source:
            raise ValueError(
                f"no task of config.objective.tasks has the source {source}; they have: "
                f"{', '.join(self.by_source)}"
            )
        return self.by_source[source]

    def for_evaluation(self) -> Objective:
        """Return the objective without what it does in training alone."""
        return dataclasses.replace(self, make=self.make_evaluation or self.make)


def conditional_batch(
    source: Stream,
    target: Stream,
    num_rows: int,
    interface: ModelInterface,
    tokenizer: Tokenizer,
    *,
    bidirectional: bool = False,
) -> HostBatch:
    """Return the batch that predicts every token of `target` from `source` and those before it.

    With an encoder, its input is the source, and the decoder's is bos and the target:

        encoder   a b . c .       inputs  ^ x ^ y z      (`.` is eos, `^` bos)
                  1 1 1 2 2       targets x . y z .

    Without one, the target follows the source, whose tokens are not scored; `bidirectional` marks
    bos and the source as a prefix that its whole segment sees:

        inputs    ^ a b . x ^ c . y z
        targets   a b . x . c . y z .
        weights   0 0 0 1 1 0 0 1 1 1
    """
    shape, bos = (num_rows, interface.length), tokenizer.bos_id
    if interface.encoder_length is not None:
        ids, segments, positions = streams.scatter_to_rows(target, shape)
        weights, prefix = (segments != 0).astype(np.float32), None
        encoder = Tokens(*streams.scatter_to_rows(source, (num_rows, interface.encoder_length)))
    else:
        stream, is_target = streams.join(source, target)
        ids, segments, positions, scored = streams.scatter_to_rows(stream, shape, is_target)
        weights, encoder = scored.astype(np.float32), None
        prefix = (segments != 0) & (streams.shift_right(scored, segments, positions, 0) == 0)
    inputs = streams.shift_right(ids, segments, positions, bos)
    return Batch(
        inputs=Tokens(inputs, segments, positions, prefix if bidirectional else None),
        targets=ids,
        weights=weights,
        encoder=encoder,
    )
