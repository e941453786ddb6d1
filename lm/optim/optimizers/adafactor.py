"""Adafactor (arXiv:1804.04235), as `optax.adafactor`, with every layer a parameter by itself.

Its second moments, the clipping of its steps and their size come from statistics of a parameter.
`optax` takes them over a whole leaf, which for stacked layers [L, ...] is all layers at once: a
small gradient of one layer was clipped for a large one of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
    inner: Any = optax.scale_by_factored_rms()  # whose states have no type but that of any tree
    structure = jax.tree.structure(stacked)

    def each(function: Callable[..., Sequence], *trees: object) -> Iterator[optax.Params]:
        """Trees of the results of a function of (is stacked, one parameter's part of each tree)."""
        results = map(function, *map(structure.flatten_up_to, (stacked, *trees)))
        return map(structure.unflatten, zip(*results, strict=True))

    def axes(param: jax.Array) -> optax.FactoredState:
        """The dimension of layers of the state of a stacked parameter."""
        layer = jax.ShapeDtypeStruct(param.shape[1:], param.dtype)
        factored = jax.eval_shape(inner.init, layer).v.shape != layer.shape
        kept = (0, 0, None) if factored else (None, None, 0)
        return optax.FactoredState(None, *kept)  # pyright: ignore

    def init(params: optax.Params) -> optax.FactoredState:
        def one(is_stacked: bool, param: jax.Array) -> Sequence:
            if is_masked(param):
                return [param] * 3
            run = jax.vmap(inner.init, out_axes=axes(param)) if is_stacked else inner.init
            return run(param)[1:]

        return optax.FactoredState(jnp.zeros((), jnp.int32), *each(one, params))

    def update(
        updates: optax.Updates, state: optax.FactoredState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.FactoredState]:
        def one(
            is_stacked: bool, update: jax.Array, param: jax.Array, *moments: jax.Array
        ) -> Sequence:
            if is_masked(update):
                return [update, *moments]
            run, own = inner.update, optax.FactoredState(state.count, *moments)
            if is_stacked:
                layers = axes(param)
                run = jax.vmap(run, in_axes=(0, layers, 0), out_axes=(0, layers))
            update, new = run(update, own, param)
            return [update, *new[1:]]

        updates, *moments = each(one, updates, params, *state[1:])
        return updates, optax.FactoredState(optax.safe_increment(state.count), *moments)

    return optax.GradientTransformation(init, update)  # pyright: ignore
