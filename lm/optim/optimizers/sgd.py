"""Stochastic gradient descent with momentum b1, Nesterov's where wanted."""

from __future__ import annotations

import optax

from lm.config.schema import OptimizerConfig
from lm.optim.optimizers import ROLES, OptimizerContext

Config = OptimizerConfig
STEPS = dict.fromkeys(ROLES, "sgd")


def build(config: OptimizerConfig, context: OptimizerContext) -> list[optax.GradientTransformation]:
    momentum = context.store(optax.trace(config.b1, config.nesterov))
    return [momentum, *context.decay_and_scale(config.learning_rate)]
