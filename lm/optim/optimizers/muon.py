"""Muon (arXiv:2502.16982), as `optax` has it, for matrices; embeddings and vectors by Adam.

A step of Muon is the orthogonal matrix next to the momentum, so that it has to know which of the
dimensions of a parameter are the rows of a matrix, which its columns, and which count matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from lm.config.schema import OptimizerConfig
from lm.optim.optimizers import OptimizerContext
from lm.optim.param_tree import is_box
from lm.types import Params

Config = OptimizerConfig
STEPS = {"matrix": "muon", "embedding": "adam", "vector": "adam"}
# Coefficients of the Newton-Schulz iteration (Jordan et al. 2024, "Muon").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def build(config: OptimizerConfig, context: OptimizerContext) -> list[optax.GradientTransformation]:
    def one(leaf: nn.Partitioned, role: str) -> MuonDimensionNumbers | optax.MaskedNode:
        # of others nothing, as `optax.partition` leaves them
        return matrix_dimensions(leaf.names) if role == "matrix" else optax.MaskedNode()

    dimensions = jax.tree.map(one, context.boxed, context.roles, is_leaf=is_box)
    rate = config.muon_learning_rate
    matrices = [
        context.store(orthogonalize(config.muon_momentum, dimensions)),
        scale_to_adam(dimensions),
        *context.decay_and_scale(config.learning_rate if rate is None else rate),
    ]
    others = [context.adam, *context.decay_and_scale(config.learning_rate)]
    labels = jax.tree.map(lambda role: "muon" if role == "matrix" else "adam", context.roles)
    return [optax.partition({"muon": optax.chain(*matrices), "adam": optax.chain(*others)}, labels)]


def matrix_dimensions(names: Sequence[str | None]) -> MuonDimensionNumbers:
    """Rows and columns of a parameter with these logical axes: the dimensions that its linear map
    sums over, and those of the result. Other dimensions count matrices.
    """
    last = len(names) - 1
    stacked = ("layers", "expert")  # many matrices; a router's `expert` is a column of one
    dims = [i for i, name in enumerate(names) if name not in stacked or i == last]
    # from the residual stream or an adapter's rank to something, or from something to these
    num_in = 1 if names[dims[0]] in ("embed", "rank") else len(dims) - 1
    while names[dims[num_in]] == "taps":  # of the tokens that a convolution sums over
        num_in += 1
    return MuonDimensionNumbers(tuple(dims[:num_in]), tuple(dims[num_in:]))


def orthogonalize(momentum: float, dimensions: Params) -> optax.GradientTransformation:
    """`optax`'s, with its constant coefficients, whatever became of those in the state: stored as
    bfloat16 3.4445 is 3.4375.
    """
    inner = scale_by_muon(
        ns_coeffs=NEWTON_SCHULZ, beta=momentum, weight_dimension_numbers=dimensions
    )

    def update(
        updates: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        exact = jnp.asarray(NEWTON_SCHULZ, jnp.float32)
        return inner.update(updates, state._replace(ns_coeffs=exact), params)

    return optax.GradientTransformation(inner.init, update)  # pyright: ignore


def scale_to_adam(dimensions: Params) -> optax.GradientTransformation:
    """Scale orthogonal matrices by 0.2 of the root of their longer side: the size of AdamW's steps.

    (`consistent_rms` of `optax.contrib.muon`, which exports it only within the whole optimizer.)
    """

    def one(dims: MuonDimensionNumbers, update: jax.Array) -> jax.Array:
        sides = [math.prod(np.take(update.shape, axes)) for axes in dims]
        return update * (0.2 * max(sides) ** 0.5)

    def is_leaf(x: object) -> bool:
        return isinstance(x, MuonDimensionNumbers)

    return optax.stateless(
        lambda updates, _: jax.tree.map(one, dimensions, updates, is_leaf=is_leaf)
    )
