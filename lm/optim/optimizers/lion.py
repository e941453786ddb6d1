"""Lion (arXiv:2302.06675)."""

from __future__ import annotations

import optax

from lm.config.schema import OptimizerConfig
from lm.optim.optimizers import ROLES, Parts

Config = OptimizerConfig
STEPS = dict.fromkeys(ROLES, "lion")


def build(config: OptimizerConfig, parts: Parts) -> list[optax.GradientTransformation]:
    lion = parts.store(optax.scale_by_lion(config.b1, config.b2))
    return [lion, *parts.finish(config.learning_rate)]
