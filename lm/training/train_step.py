"""One optimizer step as a pure function of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.checkpoint.manifest import checksums
from lm.optim import chain, param_tree
from lm.training import gradient_noise_scale
from lm.types import Array, Batch, LossFn, StepInfo, Sums, TrainState


def gradients(
    loss_fn: LossFn,
    params: Any,
    batch: Batch,
    rng: Array,
    num_microbatches: int,
    frozen: Collection[str] = (),
    measure_noise: bool = False,
) -> tuple[Any, Sums]:
    """Gradients of the SUM of the loss, and additive sums, over all micro-batches; none is computed
    of parameters whose names are in `frozen`, and the tree leaves them out. `measure_noise` adds
    those of `lm.training.gradient_noise_scale` to the sums.
    """
    rest, params = param_tree.split(params, frozen)

    def loss_of_trained(params: Any, batch: Batch, rng: Array) -> tuple[Array, Sums]:
        return loss_fn(param_tree.join(params, rest), batch, rng)

    grad_fn = jax.grad(loss_of_trained, has_aux=True)
    if num_microbatches == 1:
        return grad_fn(params, batch, rng)

    def part(x: Array, i: Array) -> Array:
        # strided: every micro-batch takes rows from each device, so none of them moves
        rows = x.reshape(-1, num_microbatches, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(rows, i, axis=1, keepdims=False)

    def of_part(params: Any, microbatch: Batch, i: Array) -> tuple[Any, Sums]:
        grads, sums = grad_fn(params, microbatch, jax.random.fold_in(rng, i))
        noise = gradient_noise_scale.of_part(grads, sums["tokens"]) if measure_noise else {}
        return grads, {**sums, **noise}

    def add(carry: Any, i: Array) -> tuple[Any, None]:
        microbatch = jax.tree.map(lambda x: part(x, i), batch)
        return jax.tree.map(jnp.add, carry, of_part(params, microbatch, i)), None

    first = jax.tree.map(lambda x: part(x, jnp.int32(0)), batch)
    shapes = jax.eval_shape(of_part, params, first, jnp.int32(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, jnp.arange(num_microbatches))[0]


def fingerprint(batch: Batch) -> StepInfo:
    """What a batch is, exactly, in integers that don't depend on how it is sharded.

    records: uint32 [2], of the ids of its records. content: uint32 [2], of every bit that the model
    and the loss get. filled, scored: int32 [], tokens that aren't padding, and those that count.
    """
    records = jnp.zeros((1,), jnp.uint32) if batch.records is None else batch.records
    # a hash per row already: its sum is one of their set, and mixing it makes a second one
    twice = jnp.stack([records, records * (records >> 15 | 1)])
    parts = jax.tree.leaves(checksums(dataclasses.replace(batch, records=None)))
    weights = 2 * jnp.arange(len(parts), dtype=jnp.uint32)[:, None] + 1
    return {
        "records": jnp.sum(twice, axis=1, dtype=jnp.uint32),
        "content": jnp.sum(jnp.stack(parts) * weights, axis=0, dtype=jnp.uint32),
        "filled": jnp.sum(batch.inputs.segments != 0, dtype=jnp.int32),
        "scored": jnp.sum(batch.weights != 0, dtype=jnp.int32),
    }


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    rng: Array,
    num_microbatches: int = 1,
    spike_factor: float = 0.0,
    spike_warmup: int = 0,
    shardings: Any = None,
    frozen: Collection[str] = (),
    measure_noise: bool = False,
) -> tuple[TrainState, Sums, StepInfo]:
    """The state after `batch`, the sums of its loss, and the facts of the step.

    Gradients are summed over micro-batches and divided once by the total weight of the scored
    tokens: neither the number of micro-batches nor that of devices changes what the update means.

    A step is bad if its loss, the norm of its gradient or a number that it would write into the
    parameters is not finite, or if that norm is `spike_factor` times its running geometric mean (0:
    never). Its update is not applied: parameters and optimizer state keep every bit, and only
    `step` moves on.

    Parameters whose names are in `frozen` are no argument of the loss's gradient and none of the
    optimizer's, whose state knows the others alone.

    `shardings`, those of the optimizer's view of the trained parameters, are pinned on the
    gradients: where that view is finer (ZeRO-1), devices reduce and update only their own part.

    Facts: grad_norm, before clipping; bad, bool; finite_params, bool, whether those that the update
    gives are finite; and those of `fingerprint`; with `measure_noise`, which needs several
    micro-batches, those of `lm.training.gradient_noise_scale.estimate`.
    """
    rng = jax.random.fold_in(rng, state.step)
    grads, sums = gradients(
        loss_fn, state.params, batch, rng, num_microbatches, frozen, measure_noise
    )
    scale = 1.0 / jnp.maximum(sums["tokens"], 1.0)  # a batch without scored tokens changes nothing
    grads = jax.tree.map(lambda g: g * scale, grads)
    if shardings is not None:
        grads = jax.lax.with_sharding_constraint(grads, shardings)
    norm = optax.tree.norm(grads)
    rest, trained = param_tree.split(state.params, frozen)
    # the schedule is a function of the step: a skipped update must not put its end off
    before = chain.at_step(state.opt_state, state.step)
    updates, opt_state = tx.update(grads, before, trained)
    params = optax.apply_updates(trained, updates)
    # a finite gradient may still give an update that is not
    written = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
    bad = ~(jnp.isfinite(norm) & jnp.isfinite(sums["objective"]) & written)
    if spike_factor:
        bad |= chain.is_spike(state.opt_state, norm, factor=spike_factor, warmup=spike_warmup)
    # selected, not multiplied by zero: 0 * nan is nan
    params, opt_state = jax.tree.map(
        lambda old, new: jnp.where(bad, old, new),
        (trained, state.opt_state),
        (params, opt_state),
    )
    params = param_tree.join(params, rest)
    facts = {"grad_norm": norm, "bad": bad, "finite_params": written, **fingerprint(batch)}
    if measure_noise:
        facts |= gradient_noise_scale.estimate(sums, norm)
        sums = {n: x for n, x in sums.items() if n not in gradient_noise_scale.NAMES}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), sums, facts
