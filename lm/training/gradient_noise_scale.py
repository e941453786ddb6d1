"""Gradient noise scale (arXiv:1812.06162, appendix A.1): the critical batch size in tokens.

The gradient of a mean over B tokens has the expected squared norm |G|^2 + tr(S) / B, where G is the
gradient over all data and S the covariance between tokens. Micro-batches give it at small B, their
sum at large B: two equations with an unbiased solution, whose ratio is the noise scale. Take it of
means over many steps: single estimates scatter widely and may even be negative.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from lm.types import Params, StepInfo, Sums

NAMES = ("noise_parts", "noise_norms", "noise_inverses")


def micro_batch_sums(gradients: Params, tokens: jax.Array) -> Sums:
    """Terms of one micro-batch: its gradients are of the SUM of the loss over `tokens`.

    Micro-batches without tokens contribute nothing.
    """
    count = jnp.maximum(tokens, 1e-30)
    norm = optax.tree.norm(gradients, squared=True) / jnp.square(count)
    values = (jnp.ones(()), norm, 1 / count)
    return {n: jnp.where(tokens > 0, v, 0.0) for n, v in zip(NAMES, values, strict=True)}


def estimate(sums: Sums, norm: jax.Array) -> StepInfo:
    """Unbiased estimates of one step: `noise`, tr(S) per token, and `signal`, |G|^2.

    sums: those of `micro_batch_sums`, and `tokens`. norm: of the gradient of the mean over all
    tokens. Both are 0 where there is only one micro-batch.
    """
    parts, norms, inverses = (sums[name] for name in NAMES)
    inverse = 1 / jnp.maximum(sums["tokens"], 1e-30)
    divisor = jnp.maximum(parts, 1.0)
    difference = inverses / divisor - inverse
    noise = (norms / divisor - jnp.square(norm)) / jnp.where(parts > 1, difference, 1.0)
    noise = jnp.where(parts > 1, noise, 0.0)
    return {"noise": noise, "signal": jnp.where(parts > 1, jnp.square(norm) - noise * inverse, 0.0)}
