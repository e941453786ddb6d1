"""Optimizers: one file each, found by the name in `config.optimizer.name`.

The contract. An optimizer is a module with

    Config                 a frozen dataclass below `lm.config.schema.OptimizerConfig`, the fields
                           of `config.optimizer`
    STEPS                  {role of a parameter: the kind of its steps}, one of the rules that
                           `lm.optim.parametrization` has learning rates for: "adam" and "lion" of
                           a size of their own, "sgd" of the gradient's
    build(config, parts)   the links of an optax chain, from clipped gradients to updates

and perhaps `check(config)`, which raises ValueError, naming config paths, for values that don't go
together. Clipping, the average of the weights, frozen parameters and the biases of routers come
with all of them (lm.optim.chain.make_optimizer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

ROLES = (
    "matrix",
    "embedding",
    "vector",
)  # and balance, which no optimizer takes: lm.optim.chain.steer


@dataclasses.dataclass(frozen=True)
class Parts:
    """Building blocks of optimizers, for the parameters of a run.

    boxed: the abstract parameters with their logical axes. roles: the role of each parameter, from
    `lm.optim.chain.roles`. store: a transformation whose state is kept as `config.moment_dtype`.
    finish: the last links of every chain: weight decay, and the learning rate from its peak, on
    schedule.
    """

    boxed: Any
    roles: Any
    store: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    adam: optax.GradientTransformation
    finish: Callable[[float], list[optax.GradientTransformation]]
