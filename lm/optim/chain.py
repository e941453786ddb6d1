"""Roles of parameters, and what all optimizers (lm/optim/optimizers) share, through optax."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lm.config.components import COMPONENTS, component
from lm.config.fields import check_values
from lm.config.schema import OptimizerConfig
from lm.optim import parametrization
from lm.optim.adafactor import is_masked
from lm.optim.optimizers import Parts
from lm.optim.parametrization import STANDARD, Scaling
from lm.optim.schedules import make_schedule
from lm.types import Params

# An average of decay d moves by up to 1 - d of its size; bfloat16 rounds at 2^-9 of it.
LARGEST_BFLOAT16_DECAY = 0.99


def check(config: OptimizerConfig, scaling: Scaling = STANDARD) -> None:
    """Raises ValueError, naming the config path, for a name or a number that no optimizer takes, or
    a kind of step that the table of the parametrization has not.
    """
    optimizer = component(COMPONENTS["optimizer"], config.name)
    if not isinstance(config, OptimizerConfig):
        raise ValueError(
            f"config.optimizer.name ({config.name}): its Config must be a subclass of "
            "lm.config.schema.OptimizerConfig, whose fields every optimizer has"
        )
    check_values(config, "config.optimizer")
    if not scaling.has(rule := optimizer.STEPS["matrix"]):
        raise ValueError(
            f"config.optimizer.name ({config.name}) has no learning rates in the table of "
            f"config.model.parametrization ({scaling.name}): the size of its steps ({rule}) is "
            "that of gradients or of the parameters themselves; take adamw, lion or muon"
        )
    if hasattr(optimizer, "check"):
        optimizer.check(config)
    if config.moment_dtype == "bfloat16" and max(config.b1, config.b2) > LARGEST_BFLOAT16_DECAY:
        raise ValueError(
            f"config.optimizer.b1 ({config.b1}) and b2 ({config.b2}) must be at most "
            f"{LARGEST_BFLOAT16_DECAY} for config.optimizer.moment_dtype (bfloat16): smaller steps "
            "of an average are lost to its rounding"
        )


def roles(boxed: Any) -> Any:
    """The role of each parameter in a tree of boxes; vocabulary projections count as embeddings."""

    def one(path: Any, leaf: nn.Partitioned) -> str:
        if path[-1].key == "selection_bias":
            return "balance"
        kinds = {"hidden": "matrix", "router": "matrix", "head": "embedding"}
        found = _row(path, leaf)
        return kinds.get(found, found)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=_is_box)


def _row(path: Any, leaf: nn.Partitioned) -> str:
    return parametrization.role([part.key for part in path], leaf.names)


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


def store_as(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, computing in float32 on a state that is stored as `dtype`; its integers stay."""
    if dtype == "float32":
        return inner

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    def init(params: optax.Params) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: optax.Params | None = None) -> Any:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Factors:
    """Those of one parameter, on what the config says."""

    rate: float  # on the learning rate
    decay: float  # on the product of learning rate and weight decay; 0 where nothing decays
    epsilon: float


def make_factors(config: OptimizerConfig, boxed: Any, scaling: Scaling) -> Any:
    """The `Factors` of each parameter in a tree of boxes."""
    steps = component(COMPONENTS["optimizer"], config.name).STEPS

    def one(path: Any, leaf: nn.Partitioned, kind: str) -> Factors:
        row, in_block = _row(path, leaf), "layers" in leaf.names
        rule = steps.get(kind, steps["vector"])
        decay = scaling.decay(row, in_block) if kind in config.decay_roles else 0.0
        return Factors(scaling.rate(row, rule, in_block), decay, scaling.epsilon(row, in_block))

    return jax.tree_util.tree_map_with_path(one, boxed, roles(boxed), is_leaf=_is_box)


def scale_and_decay(weight_decay: float, factors: Any) -> optax.GradientTransformation:
    """Updates times their parameter's factor on the learning rate, plus what it decays by."""

    def one(f: Factors, update: Any, param: Any) -> Any:
        if is_masked(update):  # of another part of a partition
            return update
        update = update if f.rate == 1 else f.rate * update
        return update + weight_decay * f.decay * param if f.decay else update

    def update(updates: Any, params: optax.Params | None) -> Any:
        return jax.tree.map(one, factors, updates, params)

    return optax.stateless(update)


def with_epsilons(
    inner: optax.GradientTransformation, factors: Any
) -> optax.GradientTransformation:
    """Adam, `inner`, with each parameter's factor on its epsilon: gradients divided by it, which
    changes nothing else about m / (sqrt(v) + epsilon).
    """

    def one(f: Factors, gradient: Any) -> Any:
        return gradient if f.epsilon == 1 or is_masked(gradient) else gradient / f.epsilon

    def update(updates: Any, state: Any, params: optax.Params | None = None) -> Any:
        return inner.update(jax.tree.map(one, factors, updates), state, params)

    return optax.GradientTransformation(inner.init, update)


def sign_update_router_bias(
    inner: optax.GradientTransformation, rate: float, kinds: Any
) -> optax.GradientTransformation:
    """`inner`, but parameters of the role `balance` move by `rate` against their gradient's sign.

    They are selection biases of routers, and their gradient is the excess of each expert's load
    (arXiv:2408.15664): neither clipping, decay nor the learning rate's schedule concern them.
    """
    labels = jax.tree.map(lambda role: "balance" if role == "balance" else "other", kinds)
    sign = optax.chain(optax.scale_by_sign(), optax.scale(-rate))
    return optax.partition({"balance": sign, "other": inner}, labels)


class EmaState(NamedTuple):
    step: jax.Array
    params: Params


def average_weights(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential average of the updated parameters; the last link of a chain, which it
    doesn't change.

    The decay of step t is at most (1 + t) / (10 + t), so that the average forgets the initial
    values.
    """

    def init(params: optax.Params) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: optax.Params | None = None) -> Any:
        d = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        new = jax.tree.map(
            lambda average, p, u: d * average + (1 - d) * (p + u), state.params, params, updates
        )
        return updates, EmaState(state.step + 1, new)

    return optax.GradientTransformation(init, update)


def averaged_params(opt_state: Any) -> Params | None:
    """The averaged weights inside an optimizer state, or None where there are none."""
    found = [
        s
        for s in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, EmaState))
        if isinstance(s, EmaState)
    ]
    return found[0].params if found else None


class NormState(NamedTuple):
    steps: jax.Array  # int32 []: updates so far
    log_mean: jax.Array  # float32 []: running mean of the log of the gradient's norm


def track_norms(decay: float = 0.98) -> optax.GradientTransformation:
    """Keeps the running geometric mean of the gradient's norm; the first link of a chain, which it
    doesn't change.

    It lives in the optimizer state, so that whether a step is a spike is a function of the state
    and the batch alone, and a step that is not applied leaves no trace in it.
    """

    def init(params: optax.Params) -> NormState:
        del params
        return NormState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: Any, state: Any, params: optax.Params | None = None) -> Any:
        del params
        log_norm = jnp.log(jnp.maximum(optax.tree.norm(updates), 1e-30))
        d = jnp.minimum(decay, state.steps / (state.steps + 1))  # a plain mean at first
        return updates, NormState(state.steps + 1, d * state.log_mean + (1 - d) * log_norm)

    return optax.GradientTransformation(init, update)


def norm_state(opt_state: Any) -> NormState:
    """What `track_norms` keeps inside an optimizer state."""
    found = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, NormState))
    [state] = [s for s in found if isinstance(s, NormState)]
    return state


def at_step(opt_state: Any, step: jax.Array) -> Any:
    """An optimizer state whose learning rates are those of this step, int32 [], however many
    updates were applied before it.
    """

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda x: x._replace(count=step) if is_schedule(x) else x, opt_state, is_leaf=is_schedule
    )


def is_spike(opt_state: Any, norm: jax.Array, *, factor: float, warmup: int) -> jax.Array:
    """bool []: is the gradient's norm `factor` times its running mean, after `warmup` updates?"""
    state = norm_state(opt_state)
    return (state.steps >= warmup) & (jnp.log(norm) > state.log_mean + jnp.log(factor))


def shard_like_params(
    opt_state: Any, params: Params, replicated: Any, memory: str = "device"
) -> Any:
    """An abstract optimizer state with the shardings of the parameters that its leaves belong to.

    A leaf belongs to the parameter whose path ends its own, if the shapes agree, and lies in
    `memory`; others are replicated, on the devices.
    """
    known = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owner = next((known[t] for t in _tails(path) if t in known), None)
        sharding = replicated
        if owner is not None and owner.shape == leaf.shape:
            kinds = {"device": None, "host": "pinned_host"}
            sharding = owner.sharding.with_memory_kind(kinds[memory])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, opt_state)


def _tails(path: Any) -> list[str]:
    return [jax.tree_util.keystr(path[i:]) for i in range(len(path))]


def make_optimizer(
    config: OptimizerConfig, boxed: Any, num_steps: int, scaling: Scaling = STANDARD
) -> optax.GradientTransformation:
    """One optax chain for the parameters of the abstract tree `boxed`: clip, core, decay, rate."""
    check(config, scaling)
    kinds, factors = roles(boxed), make_factors(config, boxed, scaling)
    schedule = make_schedule(config.schedule, num_steps)

    def finish(peak: float) -> list[optax.GradientTransformation]:
        decay = scale_and_decay(config.weight_decay, factors)
        return [decay, optax.scale_by_learning_rate(lambda step: peak * schedule(step))]

    stored = functools.partial(store_as, config.moment_dtype)
    adam = stored(optax.scale_by_adam(config.b1, config.b2, config.eps, nesterov=config.nesterov))
    parts = Parts(boxed, kinds, stored, with_epsilons(adam, factors), finish)
    core = component(COMPONENTS["optimizer"], config.name).build(config, parts)
    if not isinstance(core, list) or not all(hasattr(link, "update") for link in core):
        raise ValueError(
            f"config.optimizer.name={config.name}: its build must return a list of optax "
            f"transformations, got {type(core).__name__}"
        )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    average = [average_weights(config.ema_decay)] if config.ema_decay else []
    links = [track_norms(), *clip, *core]
    if "balance" in jax.tree.leaves(kinds):
        links = [sign_update_router_bias(optax.chain(*links), config.bias_rate, kinds)]
    return optax.chain(*links, *average)
