"""The optax chain that `config.optimizer` asks for, around one of `lm.optim.optimizers`."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath

from lm.config.components import COMPONENTS, component
from lm.config.fields import check_values
from lm.config.schema import OptimizerConfig
from lm.optim import param_tree, parametrization, pruning
from lm.optim.optimizer_state import average_weights, owner_path, track_norms
from lm.optim.optimizers import OptimizerContext, check_moments, is_masked
from lm.optim.param_tree import is_box
from lm.optim.parametrization import STANDARD, Scaling
from lm.optim.schedules import make_schedule
from lm.types import Params

_STATISTICS = {"router_bias", "running"}  # roles


def check(config: OptimizerConfig, scaling: Scaling = STANDARD) -> None:
    """Raise ValueError, naming the config path, for a name or a number that no optimizer takes, or
    a kind of step that the table of the parametrization has not.
    """
    optimizer = component(COMPONENTS["optimizer"], config.name)
    if not issubclass(optimizer.Config, OptimizerConfig):
        raise ValueError(
            f"config.optimizer.name ({config.name}): its Config must be a subclass of "
            "lm.config.schema.OptimizerConfig, whose fields every optimizer has"
        )
    assert isinstance(config, optimizer.Config), "made by lm.config.conversion.resolve"
    check_values(config, "config.optimizer")
    if not scaling.has(rule := optimizer.STEPS["matrix"]):
        raise ValueError(
            f"config.optimizer.name ({config.name}) has no learning rates in the table of "
            f"config.model.parametrization ({scaling.name}): the size of its steps ({rule}) is "
            "that of gradients or of the parameters themselves; take adamw, lion or muon"
        )
    if hasattr(optimizer, "check"):
        optimizer.check(config)
    check_moments(config, "b1", "b2")
    pruning.check(config.pruning)


def parameter_roles(boxed: Params) -> Params:
    """The role of each parameter in a tree of boxes; vocabulary projections count as embeddings."""

    def one(path: KeyPath, leaf: nn.Partitioned) -> str:
        row = _row(path, leaf)
        if path[-1].key == "selection_bias":
            return "router_bias"
        if path[-1].key.startswith("running_"):
            return "running"
        return {"hidden": "matrix", "router": "matrix", "head": "embedding"}.get(row, row)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)


def statistics(boxed: Params) -> frozenset[str]:
    """Return the names of the parameters that hold statistics: see `except_statistics`."""
    roles = param_tree.flatten(parameter_roles(boxed))
    return frozenset(name for name, role in roles.items() if role in _STATISTICS)


def _row(path: KeyPath, leaf: nn.Partitioned) -> str:
    """The row of a parameter in the tables of `lm.optim.parametrization`."""
    return parametrization.role([part.key for part in path], leaf.names)


def store_as(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, computing in float32 on moments that are stored as `dtype`.

    A moment is a leaf of the state that has the path of a parameter; constants, counts and other
    statistics keep their type.
    """
    if dtype == "float32":
        return inner

    def cast(
        state: optax.OptState, params: optax.Params, to: jax.typing.DTypeLike
    ) -> optax.OptState:
        names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)}

        def one(path: KeyPath, x: jax.Array) -> jax.Array:
            is_moment = owner_path(path, names) and jnp.issubdtype(x.dtype, jnp.floating)
            return x.astype(to) if is_moment else x

        return jax.tree_util.tree_map_with_path(one, state)

    def init(params: optax.Params) -> optax.OptState:
        return cast(inner.init(params), params, dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        new, state = inner.update(updates, cast(state, updates, jnp.float32), params)
        return new, cast(state, updates, dtype)

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class ParameterFactors:
    """The factors of one parameter on values of the config."""

    rate: float  # on the learning rate, but not on its product with the weight decay
    epsilon: float
    decays: bool


def make_factors(config: OptimizerConfig, boxed: Params, scaling: Scaling) -> Params:
    """The `ParameterFactors` of each parameter in a tree of boxes."""
    steps = component(COMPONENTS["optimizer"], config.name).STEPS

    def one(path: KeyPath, leaf: nn.Partitioned, role: str) -> ParameterFactors:
        rule, in_block = steps.get(role, steps["vector"]), "layers" in leaf.names
        rate = scaling.rate(_row(path, leaf), rule, in_block)
        return ParameterFactors(rate, scaling.epsilon(in_block), role in config.decay_roles)

    return jax.tree_util.tree_map_with_path(one, boxed, parameter_roles(boxed), is_leaf=is_box)


def scale_and_decay(
    weight_decay: float, factors: Params, rule: str = "decoupled"
) -> optax.GradientTransformation:
    """Scale updates by their parameter's factor on the learning rate, and add its weight decay.

    By the rule `cautious` (arXiv:2510.12402) only weights whose sign is that of their update decay:
    those that the step brings nearer to zero.
    """

    def one(f: ParameterFactors, update: jax.Array, param: jax.Array) -> jax.Array:
        if is_masked(update):
            return update
        update = update if f.rate == 1 else f.rate * update
        if not f.decays:
            return update
        decay = weight_decay * param
        return update + (jnp.where(update * param >= 0, decay, 0) if rule == "cautious" else decay)

    return optax.stateless(lambda updates, params: jax.tree.map(one, factors, updates, params))


def with_epsilons(
    inner: optax.GradientTransformation, factors: Params
) -> optax.GradientTransformation:
    """Adam, `inner`, with each parameter's factor on its epsilon: gradients divided by it, which
    changes nothing else about m / (sqrt(v) + epsilon).
    """

    def one(f: ParameterFactors, gradient: jax.Array) -> jax.Array:
        return gradient if f.epsilon == 1 or is_masked(gradient) else gradient / f.epsilon

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(jax.tree.map(one, factors, updates), state, params)

    return optax.GradientTransformation(inner.init, update)


def except_statistics(
    inner: optax.GradientTransformation, rate: float, roles: Params
) -> optax.GradientTransformation:
    """`inner`, but for parameters that hold statistics: neither clipping, decay nor the learning
    rate's schedule concern them.

    Those of the role `router_bias`, selection biases of routers, move by `rate` against the sign of
    their gradient, which is the excess of each expert's load (arXiv:2408.15664). From those of the
    role `running`, running averages (see lm.layers.codebook), their gradient is subtracted.
    """
    sign = optax.chain(optax.scale_by_sign(), optax.scale(-rate))
    # these labels are names in checkpoints
    own = {"router_bias": ("balance", sign), "running": ("running", optax.scale(-1.0))}
    present = {role: own[role] for role in own if role in jax.tree.leaves(roles)}
    labels = jax.tree.map(lambda role: present[role][0] if role in present else "other", roles)
    return optax.partition({**dict(present.values()), "other": inner}, labels)


def make_optimizer(
    config: OptimizerConfig,
    boxed: Params,
    num_steps: int,
    scaling: Scaling = STANDARD,
    shardings: Params | None = None,
) -> optax.GradientTransformation:
    """One optax chain for the parameters of the abstract tree `boxed`: clip, core, decay, rate; and
    pruning around it.

    shardings: those of gradients and updates; None: on one device.
    """
    check(config, scaling)
    roles, factors = parameter_roles(boxed), make_factors(config, boxed, scaling)
    schedule = make_schedule(config.schedule, num_steps)

    def decay_and_scale(peak: float) -> list[optax.GradientTransformation]:
        decay = scale_and_decay(config.weight_decay, factors, config.decay_rule)
        return [decay, optax.scale_by_learning_rate(lambda step: peak * schedule(step))]

    store = functools.partial(store_as, config.moment_dtype)
    adam = store(optax.scale_by_adam(config.b1, config.b2, config.eps, nesterov=config.nesterov))
    adam = with_epsilons(adam, factors)
    context = OptimizerContext(boxed, roles, store, adam, decay_and_scale, shardings)
    core = component(COMPONENTS["optimizer"], config.name).build(config, context)
    if not isinstance(core, list) or not all(hasattr(link, "update") for link in core):
        raise ValueError(
            f"config.optimizer.name={config.name}: its build must return a list of optax "
            f"transformations, got {type(core).__name__}"
        )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    average = [average_weights(config.ema_decay)] if config.ema_decay else []
    links = [track_norms(), *clip, *core]
    if _STATISTICS & {*jax.tree.leaves(roles)}:
        links = [except_statistics(optax.chain(*links), config.bias_rate, roles)]
    tx = optax.chain(*links, *average)
    if not pruning.is_on(config.pruning):
        return tx
    pruning.check_steps(config.pruning, num_steps)
    return pruning.prune(tx, config.pruning, pruning.matrices(config.pruning, boxed))
