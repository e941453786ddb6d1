"""Adam for a generator and a discriminator, with a learning rate for each.

The part of a model whose gradient is 0 everywhere rests: its parameters and moments keep every bit,
so that a step may train either part or both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax

from lm.config.fields import field
from lm.config.schema import OptimizerConfig
from lm.optim.optimizers import ROLES, OptimizerContext

STEPS = dict.fromkeys(ROLES, "adam")
PARTS = ("generator", "discriminator")  # modules of the model, and labels in checkpoints


@dataclasses.dataclass(frozen=True)
class Config(OptimizerConfig):
    discriminator_learning_rate: float = field(
        1e-3, "Of the parameters below `discriminator`; learning_rate is the generator's.", gt=0
    )


def build(config: Config, context: OptimizerContext) -> list[optax.GradientTransformation]:
    """Raises ValueError where a parameter belongs to neither part."""
    if others := context.boxed.keys() - {*PARTS}:
        raise ValueError(
            "config.optimizer.name=adversarial is for models whose parameters lie below "
            f"{' and '.join(PARTS)}, not {', '.join(sorted(others))}"
        )
    rates = (config.learning_rate, config.discriminator_learning_rate)
    parts: dict[Hashable, optax.GradientTransformation] = {
        part: rest_without_gradient(optax.chain(context.adam, *context.decay_and_scale(rate)))
        for part, rate in zip(PARTS, rates, strict=True)
    }
    labels = {p: jax.tree.map(lambda _, p=p: p, x) for p, x in context.roles.items()}
    return [optax.partition(parts, labels)]  # pyright: ignore


def rest_without_gradient(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, whose updates are 0 and whose state stays where all gradients are 0."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        moves = jnp.any(jnp.stack([jnp.any(x != 0) for x in jax.tree.leaves(updates)]))
        new, after = inner.update(updates, state, params)
        new = jax.tree.map(lambda x: jnp.where(moves, x, 0), new)
        return new, jax.tree.map(lambda old, x: jnp.where(moves, x, old), state, after)

    return optax.GradientTransformation(inner.init, update)
