"""Adafactor (arXiv:1804.04235) of layers that are stacked: each is a parameter by itself.

Its second moments, the clipping of its steps and their size come from statistics of a parameter.
`optax` takes them over a whole leaf, which for stacked layers [L, ...] is all layers at once: a
small gradient of one layer was clipped for a large one of another.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def is_masked(x: Any) -> bool:
    """True if x stands for a parameter of another part of a partition."""
    return isinstance(x, optax.MaskedNode)


def each_layer(inner: optax.GradientTransformation, stacked: Any) -> optax.GradientTransformation:
    """`inner`, which has no state, on every parameter alone.

    stacked: bool for each parameter, True where its first dimension counts layers.
    """

    def apply(update: jax.Array, param: jax.Array) -> Any:
        return inner.update(update, optax.EmptyState(), param)[0]

    def one(is_stacked: bool, update: Any, param: Any) -> Any:
        if is_masked(update):
            return update
        return (jax.vmap(apply) if is_stacked else apply)(update, param)

    return optax.stateless(lambda updates, params: jax.tree.map(one, stacked, updates, params))


def factored_rms(stacked: Any) -> optax.GradientTransformation:
    """`optax.scale_by_factored_rms` of every parameter alone, `stacked` as in `each_layer`.

    The state has the form of `optax`'s: of stacked parameters moments lead with [L], and what
    stands for missing ones is no array of layers.
    """
    inner = optax.scale_by_factored_rms()

    def axes(param: Any) -> optax.FactoredState:
        """The dimension of layers of the state of a stacked parameter."""
        layer = jax.ShapeDtypeStruct(param.shape[1:], param.dtype)
        factored = jax.eval_shape(inner.init, layer).v.shape != layer.shape
        kept = (0, 0, None) if factored else (None, None, 0)
        return optax.FactoredState(None, *kept)  # pyright: ignore

    def init_one(is_stacked: bool, param: Any) -> Any:
        if is_masked(param):
            return optax.FactoredState(0, param, param, param)
        return (jax.vmap(inner.init, out_axes=axes(param)) if is_stacked else inner.init)(param)

    def unzip(count: Any, states: Any) -> optax.FactoredState:
        """The state of a tree, of a tree of states."""
        fields = (jax.tree.map(lambda _, s, i=i: s[i], stacked, states) for i in range(1, 4))
        return optax.FactoredState(count, *fields)

    def init(params: optax.Params) -> optax.FactoredState:
        states = jax.tree.map(init_one, stacked, params)
        return unzip(jnp.zeros((), jnp.int32), states)

    def update(updates: Any, state: Any, params: optax.Params | None = None) -> Any:
        def one(is_stacked: bool, update: Any, row: Any, col: Any, v: Any, param: Any) -> Any:
            own = optax.FactoredState(state.count, row, col, v)
            if is_masked(update):
                return update, own
            if not is_stacked:
                return inner.update(update, own, param)
            of_layers = axes(param)
            each = jax.vmap(inner.update, in_axes=(0, of_layers, 0), out_axes=(0, of_layers))
            return each(update, own, param)

        found = jax.tree.map(one, stacked, updates, state.v_row, state.v_col, state.v, params)
        updates, states = (
            jax.tree.map(lambda _, pair, i=i: pair[i], stacked, found) for i in range(2)
        )
        return updates, unzip(optax.safe_increment(state.count), states)

    return optax.GradientTransformation(init, update)
