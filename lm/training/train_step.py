"""One optimizer step as a pure function of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import optax

from lm.checkpoint.checksums import checksums
from lm.optim import optimizer_state, param_tree
from lm.training import gradient_noise_scale
from lm.types import Array, Batch, CoupledLoss, LossFn, Params, StepInfo, Sums, TrainState, Tree


def gradients(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    rng: Array,
    num_microbatches: int,
    frozen: Collection[str] = (),
    measure_noise: bool = False,
    statistics: Collection[str] = (),
) -> tuple[Params, Sums]:
    """(gradients of the SUM of the loss, additive sums) over all micro-batches.

    Parameters named in `frozen` have no gradient, and the tree leaves them out. `measure_noise`
    adds the sums of `gradient_noise_scale.micro_batch_sums`, of all but `statistics`. A
    `CoupledLoss` compares the rows of all micro-batches.
    """
    frozen_params, trained = param_tree.split(params, frozen)

    def loss_of_trained(trained: Params, batch: Batch, rng: Array) -> tuple[Array, Sums]:
        return loss_fn(param_tree.join(trained, frozen_params), batch, rng)

    grad_fn = jax.grad(loss_of_trained, has_aux=True)
    if num_microbatches == 1:
        return grad_fn(trained, batch, rng)

    def take(batch: Tree, i: Array) -> Tree:
        # strided: every micro-batch takes rows from each device, so that none of them moves
        def rows(x: Array) -> jax.Array:
            strided = x.reshape(-1, num_microbatches, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(strided, i, axis=1, keepdims=False)

        return jax.tree.map(rows, batch)

    if isinstance(loss_fn, CoupledLoss):
        return _cached_gradients(
            lambda trained, i: loss_fn.embed(
                param_tree.join(trained, frozen_params), take(batch, i), jax.random.fold_in(rng, i)
            ),
            lambda trained, embeddings: loss_fn.loss(
                param_tree.join(trained, frozen_params), embeddings, batch
            ),
            take,
            trained,
            num_microbatches,
        )

    def micro_batch_gradients(i: Array) -> tuple[Params, Sums]:
        grads, sums = grad_fn(trained, take(batch, i), jax.random.fold_in(rng, i))
        if measure_noise:
            measured = param_tree.split(grads, statistics)[1]
            sums = sums | gradient_noise_scale.micro_batch_sums(measured, sums["tokens"])
        return grads, sums

    def add(total: tuple[Params, Sums], i: Array) -> tuple[tuple[Params, Sums], None]:
        return jax.tree.map(jnp.add, total, micro_batch_gradients(i)), None

    shapes = jax.eval_shape(micro_batch_gradients, jnp.int32(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, jnp.arange(num_microbatches))[0]


def _cached_gradients(
    embed: Callable[[Params, Array], Array],
    loss: Callable[[Params, Array], tuple[Array, Sums]],
    take: Callable[[Array, Array], Array],
    trained: Params,
    num_microbatches: int,
) -> tuple[Params, Sums]:
    """Gradients of a loss over pairs of rows with the activations of one micro-batch at a time
    (GradCache, arXiv:2101.06983): embeddings of all, the gradient with respect to them, and then
    each micro-batch again, with the same random keys.

    embed: (trained, i) -> embeddings of micro-batch i; take: (those of all rows, i) -> those of i.
    """
    numbers = jnp.arange(num_microbatches)
    parts = jax.lax.map(lambda i: embed(trained, i), numbers)  # [k, B / k, ...]
    embeddings = jnp.swapaxes(parts, 0, 1)  # strided, as `take`
    embeddings = embeddings.reshape(-1, *embeddings.shape[2:])
    (grads, cotangents), sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(trained, embeddings)

    def add(total: Params, i: Array) -> tuple[Params, None]:
        _, pullback = jax.vjp(lambda trained: embed(trained, i), trained)
        return jax.tree.map(jnp.add, total, pullback(take(cotangents, i))[0]), None

    return jax.lax.scan(add, grads, numbers)[0], sums


def fingerprint(batch: Batch) -> StepInfo:
    """Hashes and counts that identify a batch, whatever its sharding.

    records: uint32 [2], of the ids of its records. content: uint32 [2], of every bit that the model
    and the loss read. filled, scored: int32 [], non-padding tokens and tokens with a weight.
    """
    records = jnp.zeros((1,), jnp.uint32) if batch.records is None else batch.records
    # each is a hash of a row: their sum is one of the set, and that of their mixes a second one
    hashes = jnp.stack([records, records * (records >> 15 | 1)])
    parts = jax.tree.leaves(checksums(dataclasses.replace(batch, records=None)))
    weights = 2 * jnp.arange(len(parts), dtype=jnp.uint32)[:, None] + 1
    return {
        "records": jnp.sum(hashes, axis=1, dtype=jnp.uint32),
        "content": jnp.sum(jnp.stack(parts) * weights, axis=0, dtype=jnp.uint32),
        "filled": jnp.sum(batch.inputs.segments != 0, dtype=jnp.int32),
        "scored": jnp.sum(batch.weights != 0, dtype=jnp.int32),
    }


def _norm(grads: Params, statistics: Collection[str]) -> jax.Array:
    return optax.tree.norm(param_tree.split(grads, statistics)[1])


def update(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    rng: Array,
    num_microbatches: int = 1,
    spike_factor: float = 0.0,
    spike_warmup: int = 0,
    shardings: Params | None = None,
    frozen: Collection[str] = (),
    statistics: Collection[str] = (),
    measure_noise: bool = False,
) -> tuple[TrainState, Sums, StepInfo]:
    """(the state after `batch`, the sums of its loss, the info of the step).

    Gradients are summed over micro-batches and divided once by the total weight of the scored
    tokens: neither the number of micro-batches nor that of devices changes what the update means.

    A step is bad if its loss, the norm of its gradient or an updated parameter is not finite, or if
    that norm is `spike_factor` times its running geometric mean (0: never). Its update is not
    applied: parameters and optimizer state keep every bit, and only `step` moves on.

    frozen: names of parameters of which neither a gradient is computed nor optimizer state kept.
    statistics: names of parameters whose gradient is none of the loss and counts in no norm.
    shardings: those of the optimizer's view of the trained parameters, pinned on the gradients:
    where that view is finer (ZeRO-1), devices reduce and update only their own shard.

    Info: grad_norm, before clipping and without pruned weights; sparsity, where the optimizer
    prunes; bad, bool; finite_params, bool, False where an updated
    parameter is not finite; those of `fingerprint`; with `measure_noise`, which needs several
    micro-batches, those of `gradient_noise_scale.estimate`.
    """
    rng = jax.random.fold_in(rng, state.step)
    grads, sums = gradients(
        loss_fn, state.params, batch, rng, num_microbatches, frozen, measure_noise, statistics
    )
    scale = 1.0 / jnp.maximum(sums["tokens"], 1.0)  # a batch without scored tokens: no update
    grads = jax.tree.map(lambda g: g * scale, grads)
    if shardings is not None:
        grads = jax.lax.with_sharding_constraint(grads, shardings)
    norm = dense_norm = _norm(grads, statistics)
    if (pruning := optimizer_state.pruning_state(state.opt_state)) is not None:
        grads = optimizer_state.apply_masks(pruning.masks, grads)  # weights that stay 0 have none
        norm = _norm(grads, statistics)
    frozen_params, trained = param_tree.split(state.params, frozen)
    # the schedule is a function of the step: a skipped update must not postpone its end
    before = optimizer_state.set_schedule_step(state.opt_state, state.step)
    updates, opt_state = tx.update(grads, before, trained)
    params = optax.apply_updates(trained, updates)
    # a finite gradient may still give an update that is not
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
    bad = ~(jnp.isfinite(norm) & jnp.isfinite(sums["objective"]) & finite)
    if spike_factor:
        bad |= optimizer_state.is_spike(
            state.opt_state, norm, factor=spike_factor, warmup=spike_warmup
        )
    # selected, not multiplied by zero: 0 * nan is nan
    params, opt_state = jax.tree.map(
        lambda old, new: jnp.where(bad, old, new), (trained, state.opt_state), (params, opt_state)
    )
    params = param_tree.join(params, frozen_params)
    info = {"grad_norm": norm, "bad": bad, "finite_params": finite, **fingerprint(batch)}
    if (pruning := optimizer_state.pruning_state(opt_state)) is not None:
        info["sparsity"] = pruning.sparsity
    if measure_noise:
        info |= gradient_noise_scale.estimate(sums, dense_norm)
        sums = {n: x for n, x in sums.items() if n not in gradient_noise_scale.NAMES}
    after = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return after, sums, info
