"""Muon (arXiv:2502.16982) for matrices; embeddings and vectors by Adam."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import optax

from lm.config.schema import OptimizerConfig
from lm.optim import muon
from lm.optim.optimizers import Parts

Config = OptimizerConfig
STEPS = {"matrix": "muon", "embedding": "adam", "vector": "adam"}


def build(config: OptimizerConfig, parts: Parts) -> list[optax.GradientTransformation]:
    dimensions, rate = _dimensions(parts), config.muon_learning_rate
    matrices = [
        parts.store(muon.orthogonalize(config.muon_momentum, dimensions)),
        muon.scale_to_adam(dimensions),
        *parts.finish(config.learning_rate if rate is None else rate),
    ]
    others = [parts.adam, *parts.finish(config.learning_rate)]
    labels = jax.tree.map(lambda role: "muon" if role == "matrix" else "adam", parts.roles)
    return [optax.partition({"muon": optax.chain(*matrices), "adam": optax.chain(*others)}, labels)]


def _dimensions(parts: Parts) -> Any:
    """Rows and columns of each matrix; of others nothing, as `optax.partition` leaves them."""

    def one(leaf: nn.Partitioned, role: str) -> Any:
        return muon.matrix_dimensions(leaf.names) if role == "matrix" else optax.MaskedNode()

    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    return jax.tree.map(one, parts.boxed, parts.roles, is_leaf=is_box)
