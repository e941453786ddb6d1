"""The evidence lower bound (ELBO) of sentences by a variational autoencoder (arXiv:1511.06349).

A segment of a row is a sentence x with a latent z of its own, of prior N(0, 1) and posterior
q(z | x). In training the negative ELBO, with the divergence weighted and thresholded, is

    -log p(x | z) + weight(step) * sum_j max(free_bits, KL_j),     z ~ q(z | x)

weight: from 0 to 1 along a line over `anneal_steps`. The threshold (arXiv:1606.04934) holds for
each sentence, where the paper has it for the mean over a batch: so the loss stays a sum over
sentences, the same for all micro-batches and shards. Word dropout hides inputs of the decoder.

An evaluation has neither weight, threshold nor word dropout, and `num_samples` latents of each
sentence: the mean of their ELBOs, and the importance-weighted bound (arXiv:1509.00519, equation 8)

    log p(x) >= log 1/n sum_i p(x | z_i) p(z_i) / q(z_i | x)

Latents are drawn by a key for each row, which belongs to the row and the step in training, and to
the row in evaluation, whatever batch, device or micro-batch it is in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.config.fields import check_values, field
from lm.data import streams
from lm.data.rows import RowLayout, Rows
from lm.objectives import ModelInterface, Objective, RowGenerator, mask_field, mask_id
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Batch, HostBatch, Tokens

if TYPE_CHECKING:
    from lm.types import Array

ACTIVE = 0.01  # variance of the means of an active unit, arXiv:1509.00519, section 4.1


@dataclasses.dataclass(frozen=True)
class Config:
    anneal_steps: int = field(
        0, "Steps over which the weight of the divergence grows from 0 to 1; 0: it is 1.", ge=0
    )
    free_bits: float = field(
        0.0, "Nats of divergence of each number of a latent that cost nothing more.", ge=0
    )
    word_dropout: float = field(
        0.0, "Fraction of the decoder's inputs that are masked in training.", ge=0, le=1
    )
    num_samples: int = field(
        16, "Evaluation: latents of each sentence, for the importance-weighted bound.", ge=1
    )
    mask_id: int | None = mask_field()


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the objective; its model is lm.models.vae.

    Every token is predicted from the latent of its segment and the tokens before it; `?` is the
    mask token of word dropout:

        encoder   a b . c .      inputs  ^ ? b ^ c      targets  a b . c .
    """
    check_values(config, "config.objective")
    if interface.encoder_length != interface.length:
        raise ValueError(
            f"config.data.encoder_length ({interface.encoder_length}) must be config.data.length "
            f"({interface.length}) for config.objective.name=vae, whose encoder reads the rows "
            "that are predicted; its model is config.model.name=vae"
        )
    mask = mask_id(config.mask_id, tokenizer, interface) if config.word_dropout else None

    def rows_of(rows: Rows) -> HostBatch:
        inputs = streams.shift_right(rows.ids, rows.segments, rows.positions, tokenizer.bos_id)
        return Batch(
            inputs=Tokens(inputs, rows.segments, rows.positions),
            targets=rows.ids,
            weights=(rows.segments != 0).astype(np.float32),
            encoder=Tokens(rows.ids, rows.segments, rows.positions),
        )

    def training(rows: Rows, rng: RowGenerator) -> HostBatch:
        batch = rows_of(rows)
        if mask is None:
            return batch
        draws = np.stack([rng(i).random(rows.ids.shape[1]) for i in range(len(rows.ids))])
        hidden = (draws < config.word_dropout) & (rows.positions > 0) & (rows.segments != 0)
        ids = np.where(hidden, np.int32(mask), batch.inputs.ids)
        return dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, ids=ids))

    def evaluation(rows: Rows, rng: RowGenerator) -> HostBatch:
        keys = [rng(i).integers(2**32, dtype=np.uint32) for i in range(len(rows.ids))]
        return dataclasses.replace(rows_of(rows), records=np.array(keys, np.uint32))

    def loss(
        model: Any,
        params: Any,
        batch: Batch,
        rng: Array,
        *,
        train: bool,
        config: Any,
        step: Array | None,
    ) -> tuple[Array, dict[str, Array]]:
        del config
        if not hasattr(model, "losses"):
            raise ValueError("config.objective.name=vae needs config.model.name=vae")
        return model.apply(
            {"params": params},
            batch,
            train=train,
            weight=weight(step),
            free_bits=free_bits,
            num_samples=num_samples,
            method="losses",
            rngs={"dropout": rng} if train else {},
        )

    def weight(step: Array | None) -> Array | float:
        if step is None or not anneal_steps:
            return 1.0
        return (step / anneal_steps).clip(max=1.0)

    anneal_steps, free_bits, num_samples = (
        config.anneal_steps,
        config.free_bits,
        config.num_samples,
    )
    return Objective(
        training,
        RowLayout((interface.length,)),
        loss=loss,
        summarize=summarize,
        make_evaluation=evaluation,
    )


def summarize(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the figures of a whole evaluation, in nats per token: `loss`, the negative ELBO, of
    `reconstruction` and `kl`; `iw_bound`, negative too, and its `perplexity`. `kl_per_sentence`;
    `active_units`, the numbers of a latent whose mean varies by more than `ACTIVE`.
    """
    tokens, sentences = (max(float(sums[name]), 1.0) for name in ("tokens", "sentences"))
    result = {"tokens": float(sums["tokens"]), "sentences": float(sums["sentences"])}
    for name in ("loss", "reconstruction", "kl", "iw_bound"):
        result[name] = float(sums[name]) / tokens
    result["perplexity"] = math.exp(min(result["iw_bound"], 700.0))
    result["kl_per_sentence"] = float(sums["kl"]) / sentences
    mean = np.asarray(sums["latent_means"], np.float64) / sentences
    variance = np.asarray(sums["latent_squares"], np.float64) / sentences - mean**2
    result["active_units"] = float(np.sum(variance > ACTIVE))
    return result
