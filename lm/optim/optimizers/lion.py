"""Lion (arXiv:2302.06675)."""

from __future__ import annotations

import optax

from lm.config.schema import OptimizerConfig
from lm.optim.optimizers import ROLES, OptimizerContext

Config = OptimizerConfig
STEPS = dict.fromkeys(ROLES, "lion")


def build(config: OptimizerConfig, context: OptimizerContext) -> list[optax.GradientTransformation]:
    lion = context.store(optax.scale_by_lion(config.b1, config.b2))
    return [lion, *context.decay_and_scale(config.learning_rate)]
