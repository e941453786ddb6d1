"""One optimizer step as a pure function of arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.types import Array, Batch, LossFn, Sums, TrainState


def _gradients(
    loss_fn: LossFn, params: Any, batch: Batch, rng: Array, num_microbatches: int
) -> tuple[Any, Sums]:
    """Gradients of the SUM of the loss, and additive sums, over all micro-batches."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        return grad_fn(params, batch, rng)

    def part(x: Array, i: Array) -> Array:
        # strided: every micro-batch takes rows from each device, so none of them moves
        rows = x.reshape(-1, num_microbatches, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(rows, i, axis=1, keepdims=False)

    def add(carry: Any, i: Array) -> tuple[Any, None]:
        microbatch = jax.tree.map(lambda x: part(x, i), batch)
        new = grad_fn(params, microbatch, jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, carry, new), None

    first = jax.tree.map(lambda x: part(x, jnp.int32(0)), batch)
    shapes = jax.eval_shape(grad_fn, params, first, rng)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, jnp.arange(num_microbatches))[0]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    rng: Array,
    num_microbatches: int = 1,
) -> tuple[TrainState, Sums]:
    """The state after `batch` and the sums of its loss.

    Gradients are summed over micro-batches and divided once by the total weight of the scored
    tokens: neither the number of micro-batches nor that of devices changes what the update means.
    `grad_norm`, before clipping, is the one entry that is no sum.
    """
    rng = jax.random.fold_in(rng, state.step)
    grads, sums = _gradients(loss_fn, state.params, batch, rng, num_microbatches)
    scale = 1.0 / jnp.maximum(sums["tokens"], 1.0)  # a batch without scored tokens changes nothing
    grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    sums = {**sums, "grad_norm": optax.global_norm(grads)}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), sums
