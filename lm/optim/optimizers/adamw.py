"""AdamW (arXiv:1711.05101)."""

from __future__ import annotations

import optax

from lm.config.schema import OptimizerConfig
from lm.optim.optimizers import ROLES, Parts

Config = OptimizerConfig
STEPS = dict.fromkeys(ROLES, "adam")


def build(config: OptimizerConfig, parts: Parts) -> list[optax.GradientTransformation]:
    return [parts.adam, *parts.finish(config.learning_rate)]
