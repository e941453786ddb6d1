"""The gradient noise scale (arXiv:1812.06162, appendix A.1): the batch, in tokens, beyond which
more tokens in a step gain less than as many more steps would.

The gradient of a mean over B tokens has the expected squared norm |G|^2 + tr(S) / B, where G is the
gradient over all data and S the covariance between tokens. Micro-batches give it at small B, their
sum at large B: two equations, whose solutions have no bias. Their ratio is the noise scale; it is
to be taken of means over many steps: single ones scatter widely and may even be negative.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.types import Array, StepInfo, Sums

NAMES = ("noise_parts", "noise_norms", "noise_inverses")


def of_part(gradients: Any, tokens: Array) -> Sums:
    """What one micro-batch adds: gradients of its SUM of the loss, over `tokens`. Parts without
    tokens add nothing.
    """
    some = tokens > 0
    count = jnp.maximum(tokens, 1e-30)
    norm = optax.tree.norm(gradients, squared=True) / jnp.square(count)
    values = (jnp.ones(()), norm, 1 / count)
    return {n: jnp.where(some, v, 0.0) for n, v in zip(NAMES, values, strict=True)}


def estimate(sums: Sums, norm: jax.Array) -> StepInfo:
    """Unbiased estimates of one step: `noise`, tr(S) per token, and `signal`, |G|^2.

    sums: the additive ones of `of_part`, and `tokens`. norm: of the gradient of the whole mean. All
    is 0 where there is only one part.
    """
    parts, norms, inverses = (sums[name] for name in NAMES)
    inverse = 1 / jnp.maximum(sums["tokens"], 1e-30)
    several = jnp.maximum(parts, 1.0)
    apart = inverses / several - inverse
    noise = (norms / several - jnp.square(norm)) / jnp.where(parts > 1, apart, 1.0)
    noise = jnp.where(parts > 1, noise, 0.0)
    return {"noise": noise, "signal": jnp.where(parts > 1, jnp.square(norm) - noise * inverse, 0.0)}
