"""Optimizers: one file each, found by the name in `config.optimizer.name`.

The contract. An optimizer is a module with

    Config                   a frozen dataclass below `lm.config.schema.OptimizerConfig`, the fields
                             of `config.optimizer`
    STEPS                    {role of a parameter: the kind of its steps}, one of the rules that
                             `lm.optim.parametrization` has learning rates for: "adam" and "lion" of
                             a size of their own, "sgd" of the gradient's
    build(config, context)   the links of an optax chain, from clipped gradients to updates

and perhaps

    check(config)            raises ValueError, naming config paths, for values that don't go
                             together
    update_cost(config, boxed)
                             the `UpdateCost` of these parameters, for estimates of plans

Clipping, the average of the weights, frozen parameters and the biases of routers come
with all of them (lm.optim.chain.make_optimizer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import optax

from lm.config.schema import OptimizerConfig
from lm.types import Params

# An average of decay d moves by up to 1 - d of its size; bfloat16 rounds at 2^-9 of it.
LARGEST_BFLOAT16_DECAY = 0.99
# Beside them router_bias and running, which no optimizer takes: lm.optim.chain.except_statistics.
ROLES = ("matrix", "embedding", "vector")


@dataclasses.dataclass(frozen=True)
class UpdateCost:
    """Work of an update beyond what is done element by element, of all devices together."""

    flops: float = 0.0  # of products
    exchanged: float = 0.0  # bytes that all-to-alls move
    gathered: float = 0.0  # bytes that replicas gather from each other


@dataclasses.dataclass(frozen=True)
class OptimizerContext:
    """The parameters of a run, and the transformations that optimizers share.

    boxed: the abstract parameters with their logical axes. roles: the role of each parameter, from
    `lm.optim.chain.parameter_roles`. store: a transformation whose moments are kept as
    `config.moment_dtype`. decay_and_scale: the last links of every chain, from the peak of the
    learning rate: weight decay, and the learning rate on schedule. shardings: those of the
    gradients, moments and updates of the parameters; None: on one device.
    """

    boxed: Params
    roles: Params
    store: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    adam: optax.GradientTransformation
    decay_and_scale: Callable[[float], list[optax.GradientTransformation]]
    shardings: Params | None = None


def check_moments(config: OptimizerConfig, *names: str) -> None:
    """Raise ValueError where moments in bfloat16 lose the steps of averages of these decays."""
    values = [getattr(config, name) for name in names]
    if config.moment_dtype == "bfloat16" and max(values) > LARGEST_BFLOAT16_DECAY:
        given = " and ".join(f"{n} ({v})" for n, v in zip(names, values, strict=True))
        raise ValueError(
            f"config.optimizer.{given} must be at most {LARGEST_BFLOAT16_DECAY} for "
            "config.optimizer.moment_dtype (bfloat16): smaller steps of an average are lost to its "
            "rounding"
        )


def is_masked(x: object) -> bool:
    """True if x stands for a parameter of another part of a partition."""
    return isinstance(x, optax.MaskedNode)
