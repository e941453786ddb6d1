"""The state of an optimizer: links that keep an average or a norm in it, and what is read of it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath

from lm.optim import param_tree
from lm.types import Params


class EmaState(NamedTuple):
    step: jax.Array  # int32 []
    params: Params


def average_weights(decay: float) -> optax.GradientTransformation:
    """Keep an exponential average of the updated parameters; the last link of a chain, which it
    doesn't change.

    The decay of step t is at most (1 + t) / (10 + t), so that the average forgets the initial
    values.
    """

    def init(params: optax.Params) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(
        updates: optax.Updates, state: EmaState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, EmaState]:
        d = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        new = jax.tree.map(
            lambda average, p, u: d * average + (1 - d) * (p + u), state.params, params, updates
        )
        return updates, EmaState(state.step + 1, new)

    return optax.GradientTransformation(init, update)  # pyright: ignore


class NormState(NamedTuple):
    steps: jax.Array  # int32 []: updates so far
    log_mean: jax.Array  # float32 []: running mean of the log of the gradient's norm


def track_norms(decay: float = 0.98) -> optax.GradientTransformation:
    """Keep the running geometric mean of the gradient's norm; the first link of a chain, which it
    doesn't change.

    As a part of the optimizer state, it makes a spike a function of the state and the batch, and a
    step that is not applied leaves no trace in it.
    """

    def init(params: optax.Params) -> NormState:
        return NormState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(
        updates: optax.Updates, state: NormState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NormState]:
        log_norm = jnp.log(jnp.maximum(optax.tree.norm(updates), 1e-30))
        d = jnp.minimum(decay, state.steps / (state.steps + 1))  # a plain mean at first
        return updates, NormState(state.steps + 1, d * state.log_mean + (1 - d) * log_norm)

    return optax.GradientTransformation(init, update)  # pyright: ignore


class PruningState(NamedTuple):
    step: jax.Array  # int32 []: of the run
    sparsity: jax.Array  # float32 []: the pruned share of the weights of all masks
    masks: Params  # bool, of the shapes of the matrices that are pruned; False: the weight is 0


def pruning_state(opt_state: optax.OptState) -> PruningState | None:
    """The state of `lm.optim.pruning.prune` in an optimizer state, or None without any."""
    return optax.tree.get(opt_state, PruningState.__name__)


def apply_masks(masks: Params, tree: Params) -> Params:
    """A tree of arrays like the parameters, 0 where the masks of some of them are False."""
    leaves = param_tree.flatten(tree)
    for name, mask in param_tree.flatten(masks).items():
        leaves[name] = jnp.where(mask, leaves[name], 0)
    return param_tree.unflatten(leaves)


def averaged_params(opt_state: optax.OptState) -> Params | None:
    """The averaged weights in an optimizer state, or None without any."""
    state: EmaState | None = optax.tree.get(opt_state, EmaState.__name__)
    return None if state is None else state.params


def norm_state(opt_state: optax.OptState) -> NormState:
    """The state of `track_norms` in an optimizer state."""
    return optax.tree.get(opt_state, NormState.__name__)


def is_spike(
    opt_state: optax.OptState, norm: jax.Array, *, factor: float, warmup: int
) -> jax.Array:
    """bool []: the gradient's norm is `factor` times its running mean, after `warmup` updates."""
    state = norm_state(opt_state)
    return (state.steps >= warmup) & (jnp.log(norm) > state.log_mean + jnp.log(factor))


def set_schedule_step(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """An optimizer state with the learning rates and the sparsity of this step, int32 [], however
    many updates were applied before it.
    """

    def at_step(x: Any) -> Any:
        if isinstance(x, optax.ScaleByScheduleState):
            return x._replace(count=step)
        return x._replace(step=step) if isinstance(x, PruningState) else x

    def is_scheduled(x: object) -> bool:
        return isinstance(x, optax.ScaleByScheduleState | PruningState)

    return jax.tree.map(at_step, opt_state, is_leaf=is_scheduled)


def owner_path(path: KeyPath, names: Container[str]) -> str | None:
    """The parameter, one of `names`, whose path ends that of a leaf of the state; None: none."""
    tails = (jax.tree_util.keystr(path[i:]) for i in range(len(path)))
    return next((tail for tail in tails if tail in names), None)


def shard_like_params(
    opt_state: optax.OptState,
    params: Params,
    replicated: jax.sharding.Sharding,
    memory: str = "device",
) -> optax.OptState:
    """An abstract optimizer state with the shardings of the parameters that its leaves belong to.

    A leaf belongs to the parameter whose path ends its own, if the shapes agree but for dimensions
    of one, and lies in `memory`; others are replicated, on the devices. (`optax.tree_map_params`
    runs init on one placeholder for all parameters, which partitions by label and states by layer
    don't accept.)
    """
    owners = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    kind = {"device": None, "host": "pinned_host"}[memory]

    def one(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name, sharding = owner_path(path, owners), replicated
        if name is not None and _is_like(leaf.shape, owners[name].shape):
            owner = owners[name]
            own = owner.sharding.spec
            spec = [axes if leaf.shape[i] == owner.shape[i] else None for i, axes in enumerate(own)]
            sharding = owner.sharding.update(spec=P(*spec)).with_memory_kind(kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, opt_state)


def _is_like(shape: Sequence[int], owner: Sequence[int]) -> bool:
    """True for the shape of a parameter, or of statistics that keep its dimensions."""
    if shape == owner:
        return True
    pairs = zip(shape, owner, strict=False)
    return len(shape) == len(owner) and max(shape) > 1 and all(n in (1, m) for n, m in pairs)
