"""Adafactor (arXiv:1804.04235), as `optax.adafactor`, with every layer a parameter by itself.

Its second moments, the clipping of its steps and their size come from statistics of a parameter.
`optax` takes them over a whole leaf, which for stacked layers [L, ...] is all layers at once: a
small gradient of one layer was clipped for a large one of another.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from lm.config.schema import OptimizerConfig
from lm.optim.optimizers import ROLES, OptimizerContext, is_masked
from lm.optim.param_tree import is_box
from lm.types import Params

Config = OptimizerConfig
STEPS = dict.fromkeys(ROLES, "adafactor")


def check(config: OptimizerConfig) -> None:
    """Raise ValueError for moments in bfloat16."""
    if config.moment_dtype != "float32":
        raise ValueError(
            "config.optimizer.name (adafactor) averages ever more slowly: "
            f"config.optimizer.moment_dtype ({config.moment_dtype}) would round its steps away"
        )


def build(config: OptimizerConfig, context: OptimizerContext) -> list[optax.GradientTransformation]:
    stacked = jax.tree.map(lambda x: x.names[:1] == ("layers",), context.boxed, is_leaf=is_box)
    return [
        factored_rms(stacked),
        each_layer(optax.clip_by_block_rms(1.0), stacked),
        each_layer(optax.scale_by_param_block_rms(), stacked),
        *context.decay_and_scale(config.learning_rate),
    ]


def each_layer(
    inner: optax.GradientTransformation, stacked: Params
) -> optax.GradientTransformation:
    """`inner`, which has no state, on every layer of every parameter by itself.

    stacked: bool for each parameter, True where its first dimension counts layers.
    """

    def apply(update: jax.Array, param: jax.Array) -> optax.Updates:
        return inner.update(update, optax.EmptyState(), param)[0]

    def one(is_stacked: bool, update: jax.Array, param: jax.Array) -> optax.Updates:
        if is_masked(update):
            return update
        return (jax.vmap(apply) if is_stacked else apply)(update, param)

    return optax.stateless(lambda updates, params: jax.tree.map(one, stacked, updates, params))


def factored_rms(stacked: Params) -> optax.GradientTransformation:
    """`optax.scale_by_factored_rms` of every layer by itself, `stacked` as in `each_layer`.

    The state has the form of `optax`'s: moments of stacked parameters lead with [L], and stand-ins
    for missing ones don't.
    """
    inner = optax.scale_by_factored_rms()

    def axes(param: jax.Array) -> optax.FactoredState:
        """The dimension of layers of the state of a stacked parameter."""
        layer = jax.ShapeDtypeStruct(param.shape[1:], param.dtype)
        factored = jax.eval_shape(inner.init, layer).v.shape != layer.shape
        kept = (0, 0, None) if factored else (None, None, 0)
        return optax.FactoredState(None, *kept)  # pyright: ignore

    def init_one(is_stacked: bool, param: jax.Array) -> optax.OptState:
        if is_masked(param):
            return optax.FactoredState(0, param, param, param)  # pyright: ignore
        return (jax.vmap(inner.init, out_axes=axes(param)) if is_stacked else inner.init)(param)

    def unzip(count: jax.typing.ArrayLike, states: Params) -> optax.FactoredState:
        """The state of a tree, of a tree of states."""
        fields = (jax.tree.map(lambda _, s, i=i: s[i], stacked, states) for i in range(1, 4))
        return optax.FactoredState(count, *fields)  # pyright: ignore

    def init(params: optax.Params) -> optax.FactoredState:
        states = jax.tree.map(init_one, stacked, params)
        return unzip(jnp.zeros((), jnp.int32), states)

    def update(
        updates: optax.Updates, state: optax.FactoredState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.FactoredState]:
        def one(
            is_stacked: bool, update: jax.Array, param: jax.Array, *moments: jax.Array
        ) -> tuple[optax.Updates, optax.OptState]:
            own = optax.FactoredState(state.count, *moments)
            if is_masked(update):
                return update, own
            if not is_stacked:
                return inner.update(update, own, param)
            of_layers = axes(param)
            each = jax.vmap(inner.update, in_axes=(0, of_layers, 0), out_axes=(0, of_layers))
            return each(update, own, param)

        found = jax.tree.map(one, stacked, updates, params, state.v_row, state.v_col, state.v)
        updates, states = (
            jax.tree.map(lambda _, pair, i=i: pair[i], stacked, found) for i in range(2)
        )
        return updates, unzip(optax.safe_increment(state.count), states)

    return optax.GradientTransformation(init, update)  # pyright: ignore
