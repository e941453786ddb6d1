"""AdamW (arXiv:1711.05101)."""

from __future__ import annotations

import optax

from lm.config.schema import OptimizerConfig
from lm.optim.optimizers import ROLES, OptimizerContext

Config = OptimizerConfig
STEPS = dict.fromkeys(ROLES, "adam")


def build(config: OptimizerConfig, context: OptimizerContext) -> list[optax.GradientTransformation]:
    return [context.adam, *context.decay_and_scale(config.learning_rate)]
