"""The loss and the most likely guess of a model at every token."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.pipeline import evaluation_batches
from lm.layers.cross_entropy import token_nll
from lm.training.experiment import Experiment
from lm.types import Batch, Model, Params


class TokenLosses(NamedTuple):
    """A model's predictions for every target, [B, T] each; of several layers, [L, B, T]."""

    nll: np.ndarray | jax.Array  # float32: -log p(target)
    guesses: np.ndarray | jax.Array  # int32: the most likely id
    confidence: np.ndarray | jax.Array  # float32: the probability of the guess


def losses_of_logits(logits: jax.Array, targets: jax.Array) -> TokenLosses:
    """The predictions of logits [..., V] for targets [...]."""
    nll, log_z = token_nll(logits, targets)
    guesses = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return TokenLosses(nll, guesses, jnp.exp(jnp.max(logits, axis=-1) - log_z))


def token_losses(model: Model, params: Params, batch: Batch) -> TokenLosses:
    """The predictions for the targets of a batch, [B, T]."""
    return jax.device_get(_token_losses(model, params, batch))


@functools.partial(jax.jit, static_argnames="model")
def _token_losses(model: Model, params: Params, batch: Batch) -> TokenLosses:
    variables = {"params": params}
    hidden = model.apply(variables, batch.inputs, encoder=batch.encoder).hidden

    def column(x: tuple[jax.Array, jax.Array]) -> TokenLosses:
        h, targets = x  # [B, 1, D], [B, 1]
        return losses_of_logits(model.apply(variables, h, method="logits"), targets)

    # one column after the other, so that [B, T, V] logits never exist
    columns = (jnp.moveaxis(x, 1, 0)[:, :, None] for x in (hidden, jnp.asarray(batch.targets)))
    return TokenLosses(*(x[..., 0].T for x in jax.lax.map(column, tuple(columns))))


def held_out(
    experiment: Experiment, params: Params, *, num_batches: int = 8
) -> tuple[Batch, TokenLosses]:
    """The first `num_batches` batches of the first validation source, joined, and their losses.

    Raises:
        ValueError: the run has no validation source.
    """
    if not experiment.validation:
        raise ValueError("config.data.validation is empty: name a token store that was held out")
    name, source = next(iter(experiment.validation.items()))
    objective, size = experiment.objective.for_source(name), experiment.batch_size
    found = evaluation_batches(source, objective, batch_size=size)
    batches = list(itertools.islice(found, num_batches))
    losses = [
        token_losses(experiment.model, params, experiment.make_global_batch(batch))
        for batch in batches
    ]
    join = functools.partial(jax.tree.map, lambda *x: np.concatenate(x))
    return join(*batches), join(*losses)
