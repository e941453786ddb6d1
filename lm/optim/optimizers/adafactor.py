"""Adafactor (arXiv:1804.04235), as in optax.adafactor, of every layer alone."""

from __future__ import annotations

import flax.linen as nn
import jax
import optax

from lm.config.schema import OptimizerConfig
from lm.optim.adafactor import each_layer, factored_rms
from lm.optim.optimizers import ROLES, Parts

Config = OptimizerConfig
STEPS = dict.fromkeys(ROLES, "adafactor")


def check(config: OptimizerConfig) -> None:
    """Raises ValueError for moments in bfloat16."""
    if config.moment_dtype != "float32":
        raise ValueError(
            "config.optimizer.name (adafactor) averages ever more slowly: "
            f"config.optimizer.moment_dtype ({config.moment_dtype}) would round its steps away"
        )


def build(config: OptimizerConfig, parts: Parts) -> list[optax.GradientTransformation]:
    stacked = jax.tree.map(
        lambda x: x.names[:1] == ("layers",),
        parts.boxed,
        is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )
    return [
        factored_rms(stacked),
        each_layer(optax.clip_by_block_rms(1.0), stacked),
        each_layer(optax.scale_by_param_block_rms(), stacked),
        *parts.finish(config.learning_rate),
    ]
