"""Pruning of matrices by magnitude, with masks in the optimizer state.

    sparsity   the smallest weights of each matrix, of a share that grows to it over `ramp_steps` by
               the cubic of arXiv:1710.01878, equation 1
    pattern    N:M, the N largest of every M consecutive inputs of each output, at once
               (arXiv:2104.08378)

The update sets pruned weights to exactly 0, in an average of the weights too, and a weight that is
pruned stays so. Masks are found every `every` steps, from the weights after the update.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from lm.config.schema import PruningConfig
from lm.optim import param_tree, parametrization
from lm.optim.optimizer_state import EmaState, PruningState, apply_masks
from lm.optim.optimizers.muon import matrix_dimensions
from lm.types import Params

PATH = "config.optimizer.pruning"
Matrices = Mapping[str, MuonDimensionNumbers]  # by name: dimensions of inputs and outputs


def is_on(config: PruningConfig) -> bool:
    """True if the config asks for pruning."""
    return bool(config.sparsity or config.pattern)


def check(config: PruningConfig) -> None:
    """Raise ValueError, naming config paths, for values that don't go together."""
    pattern, every, ramp = config.pattern, config.every, config.ramp_steps
    if pattern and config.sparsity:
        raise ValueError(
            f"{PATH}.sparsity ({config.sparsity}) and {PATH}.pattern ({pattern}) exclude each other"
        )
    if pattern:
        _parse(pattern)
        if ramp:
            raise ValueError(
                f"{PATH}.ramp_steps ({ramp}) is for sparsity: a pattern ({pattern}) prunes at once"
            )
    if ramp % every:
        raise ValueError(f"{PATH}.ramp_steps ({ramp}) must be divisible by {PATH}.every ({every})")


def check_steps(config: PruningConfig, num_steps: int) -> None:
    """Raise ValueError for a run that ends before its last weights are pruned."""
    last = config.start_step + config.ramp_steps
    if last >= num_steps:
        raise ValueError(
            f"{PATH}: start_step ({config.start_step}) + ramp_steps ({config.ramp_steps}) must be "
            f"less than the steps of the run ({num_steps})"
        )


def _parse(pattern: str) -> tuple[int, int]:
    """N and M of N:M."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise ValueError(f"{PATH}.pattern ({pattern!r}) must be N:M with 0 < N < M, such as 2:4")
    return n, m


def matrices(config: PruningConfig, boxed: Params) -> Matrices:
    """The matrices to prune among the trained parameters `boxed`: those of linear maps that the
    patterns match.

    Raises:
        ValueError: there is none, a pattern matches none, or M doesn't divide the inputs of one.
    """
    leaves = param_tree.flatten(boxed)
    linear = [n for n in leaves if parametrization.is_linear_map(n.split("."), leaves[n].names)]
    if not linear:
        raise ValueError(
            f"{PATH}: no matrix of a linear map is trained: adapters (config.model.lora.rank) and "
            "frozen parameters (config.optimizer.frozen) are not pruned"
        )
    chosen = param_tree.matching(f"{PATH}.parameters", config.parameters, linear)
    found = {n: matrix_dimensions(leaves[n].names) for n in linear if n in chosen}
    if config.pattern:
        _, m = _parse(config.pattern)
        for name, dims in found.items():
            inputs = math.prod(leaves[name].value.shape[i] for i in _axes(dims.reduction_axis))
            if inputs % m:
                raise ValueError(
                    f"{PATH}.pattern ({config.pattern}): the inputs of {name} ({inputs}) must be "
                    f"divisible by {m}; {PATH}.parameters leaves matrices out"
                )
    return found


def sparsity_at(config: PruningConfig, step: jax.Array) -> jax.Array:
    """float32 []: the share of the weights of each matrix that is pruned at a step, from
    `start_step`.
    """
    if not config.ramp_steps:
        return jnp.float32(config.sparsity)
    done = jnp.clip((step - config.start_step) / config.ramp_steps, 0.0, 1.0)
    return config.sparsity * (1.0 - (1.0 - done) ** 3)


def prune(
    inner: optax.GradientTransformation, config: PruningConfig, matrices: Matrices
) -> optax.GradientTransformation:
    """A whole chain, `inner`, whose updates take pruned weights to 0.

    Its state is (PruningState, that of `inner`), in which an average of the weights is pruned too.
    """

    def find_masks(
        weights: dict[str, jax.Array], old: dict[str, jax.Array], step: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        found = {}
        for name, dims in matrices.items():
            scores = _scores(weights[name], old[name])
            if config.pattern:
                kept = _largest_of_groups(scores, *_parse(config.pattern), dims)
            else:
                kept = _largest(scores, sparsity_at(config, step), dims)
            found[name] = kept & old[name]
        size = sum(mask.size for mask in found.values())
        pruned = jnp.stack([jnp.sum(~mask, dtype=jnp.float32) for mask in found.values()])
        return found, jnp.sum(pruned) / size

    def init(params: optax.Params) -> tuple[PruningState, optax.OptState]:
        leaves = param_tree.flatten(params)  # pyright: ignore
        masks = {name: jnp.ones(leaves[name].shape, bool) for name in matrices}
        step, pruned = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return PruningState(step, pruned, param_tree.unflatten(masks)), inner.init(params)

    def update(
        updates: optax.Updates,
        state: tuple[PruningState, optax.OptState],
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, tuple[PruningState, optax.OptState]]:
        pruning, inner_state = state
        updates, inner_state = inner.update(updates, inner_state, params)
        steps, weights = param_tree.flatten(updates), param_tree.flatten(params)  # pyright: ignore
        old = param_tree.flatten(pruning.masks)
        since = pruning.step - config.start_step
        masks, pruned = jax.lax.cond(
            (since >= 0) & (since % config.every == 0),
            lambda: find_masks({n: weights[n] + steps[n] for n in matrices}, old, pruning.step),
            lambda: (old, pruning.sparsity),
        )
        for name, mask in masks.items():
            steps[name] = jnp.where(mask, steps[name], -weights[name])
        tree = param_tree.unflatten(masks)
        inner_state = jax.tree.map(
            lambda x: x._replace(params=apply_masks(tree, x.params)) if _is_ema(x) else x,
            inner_state,
            is_leaf=_is_ema,
        )
        new = PruningState(pruning.step + 1, pruned, tree)
        return param_tree.unflatten(steps), (new, inner_state)

    return optax.GradientTransformation(init, update)  # pyright: ignore


def _is_ema(x: object) -> bool:
    return isinstance(x, EmaState)


def _scores(weights: jax.Array, mask: jax.Array) -> jax.Array:
    """uint32, in the order of the magnitudes; 0 for what is pruned."""
    # the bits of positive floats are in their order
    bits = jax.lax.bitcast_convert_type(jnp.abs(weights.astype(jnp.float32)), jnp.uint32)
    return jnp.where(mask, bits + jnp.uint32(1), jnp.uint32(0))


def _largest(scores: jax.Array, sparsity: jax.Array, dims: MuonDimensionNumbers) -> jax.Array:
    """bool, True for all but the smallest scores of each matrix; among equal ones, for all."""
    axes = (*_axes(dims.reduction_axis), *_axes(dims.output_axis))
    size = math.prod(scores.shape[i] for i in axes)
    count = jnp.minimum(jnp.round(sparsity * size).astype(jnp.int32), size - 1)
    return scores >= _order_statistic(scores, count, axes)


def _order_statistic(values: jax.Array, rank: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The smallest but `rank` of uint32 numbers over some dimensions, which are kept as 1.

    It is found by counting, bit by bit: a sort would gather what is sharded.
    """
    shape = [1 if i in axes else n for i, n in enumerate(values.shape)]

    def add_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << (31 - i.astype(jnp.uint32)))
        smaller = jnp.sum(values < candidate, axes, dtype=jnp.int32, keepdims=True)
        return jnp.where(smaller <= rank, candidate, found)

    return jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(shape, jnp.uint32))


def _largest_of_groups(scores: jax.Array, n: int, m: int, dims: MuonDimensionNumbers) -> jax.Array:
    """bool, True for the n largest of each m consecutive inputs; among equal ones the first."""
    inputs = _axes(dims.reduction_axis)
    stack, outputs = scores.shape[: inputs[0]], scores.shape[inputs[-1] + 1 :]
    axis = len(stack) + 1
    groups = scores.reshape(*stack, -1, m, *outputs)
    own, others = jnp.expand_dims(groups, axis + 1), jnp.expand_dims(groups, axis)
    earlier = jnp.tri(m, m, -1, dtype=bool).reshape(m, m, *(1 for _ in outputs))
    ahead = (others > own) | ((others == own) & earlier)  # [*stack, groups, m, m, *outputs]
    return (jnp.sum(ahead, axis + 1) < n).reshape(scores.shape)


def _axes(axes: object) -> tuple[int, ...]:
    assert isinstance(axes, tuple), "as `matrix_dimensions` makes them"
    return axes
