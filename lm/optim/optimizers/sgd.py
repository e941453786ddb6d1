"""Stochastic gradient descent with momentum b1, Nesterov's where wanted."""

from __future__ import annotations

import optax

from lm.config.schema import OptimizerConfig
from lm.optim.optimizers import ROLES, Parts

Config = OptimizerConfig
STEPS = dict.fromkeys(ROLES, "sgd")


def build(config: OptimizerConfig, parts: Parts) -> list[optax.GradientTransformation]:
    momentum = parts.store(optax.trace(config.b1, config.nesterov))
    return [momentum, *parts.finish(config.learning_rate)]
