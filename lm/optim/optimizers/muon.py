"""Muon (arXiv:2502.16982) for matrices, and NorMuon (arXiv:2510.05491); embeddings and vectors by
Adam.

A step of Muon is the orthogonal matrix next to the momentum, so that it has to know which of the
dimensions of a parameter are the rows of a matrix, which its columns, and which count matrices.
Sharded parameters are exchanged for whole matrices (`lm.optim.matrix_owners`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from lm.config.fields import field
from lm.config.schema import OptimizerConfig
from lm.optim import matrix_owners
from lm.optim.optimizers import OptimizerContext, UpdateCost, check_moments
from lm.optim.param_tree import is_box
from lm.types import Params

STEPS = {"matrix": "muon", "embedding": "adam", "vector": "adam"}
# Polynomials a x + b x^3 + c x^5 of singular values, one for each iteration, the last one for all
# that follow.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
COEFFICIENTS = {
    # Jordan et al. 2024, "Muon"; `optax.contrib.muon` calls them so
    "standard": ((3.4445, -4.7750, 2.0315),),
    # arXiv:2505.16932, Algorithm 1: optimal for singular values in [0.001, 1], with its safety
    # factor of 1.01
    "polar_express": (
        *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS),
        (1.875, -1.25, 0.375),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(OptimizerConfig):
    newton_schulz: str = field(
        "standard",
        "Coefficients of the iteration: standard (Jordan et al. 2024; singular values end in 0.7 "
        "to 1.2) or polar_express (arXiv:2505.16932; they go to 1).",
        choices=tuple(COEFFICIENTS),
    )
    newton_schulz_steps: int = field(5, "Iterations, of three products each.", ge=1, le=20)
    newton_schulz_dtype: str = field(
        "float32",
        "Type of the matrices in the iteration and between devices, which send half as much in "
        "bfloat16; sums are float32.",
        choices=("float32", "bfloat16"),
    )
    owners: str = field(
        "all",
        "Devices that divide the whole matrices: all, or those of each replica (the results then "
        "don't cross data and sequence, and every replica computes them).",
        choices=("all", "replica"),
    )
    normuon_b2: float = field(
        0.0,
        "NorMuon: decay of the second moment of each neuron (0.95 in arXiv:2510.05491); 0: Muon.",
        ge=0,
        lt=1,
    )


def check(config: Config) -> None:
    """Raise ValueError for averages that bfloat16 would round away."""
    check_moments(config, "muon_momentum", "normuon_b2")


def build(config: Config, context: OptimizerContext) -> list[optax.GradientTransformation]:
    def one(leaf: nn.Partitioned, role: str) -> MuonDimensionNumbers | optax.MaskedNode:
        # of others nothing, as `optax.partition` leaves them
        return matrix_dimensions(leaf.names) if role == "matrix" else optax.MaskedNode()

    dimensions = jax.tree.map(one, context.boxed, context.roles, is_leaf=is_box)
    rate = config.muon_learning_rate
    neurons = normalize_neurons(config.normuon_b2, config.eps, dimensions)
    links = [orthogonalize(config, dimensions, _of_matrices(context))]
    links += [context.store(neurons)] if config.normuon_b2 else []
    matrices = [
        context.store(nesterov_momentum(config.muon_momentum)),
        optax.chain(*links, scale_to_adam(dimensions)),
        *context.decay_and_scale(config.learning_rate if rate is None else rate),
    ]
    others = [context.adam, *context.decay_and_scale(config.learning_rate)]
    labels = jax.tree.map(lambda role: "muon" if role == "matrix" else "adam", context.roles)
    return [optax.partition({"muon": optax.chain(*matrices), "adam": optax.chain(*others)}, labels)]


def _of_matrices(context: OptimizerContext) -> list[jax.sharding.NamedSharding] | None:
    """The shardings of the matrices, in the order of the tree."""
    if context.shardings is None:
        return None
    pairs = zip(jax.tree.leaves(context.shardings), jax.tree.leaves(context.roles), strict=True)
    return [sharding for sharding, role in pairs if role == "matrix"]


def update_cost(config: Config, boxed: Sequence[nn.Partitioned]) -> UpdateCost:
    """The cost of orthogonalizing these parameters, all of them matrices."""
    flops = size = 0
    for leaf in boxed:
        m, n = sorted(_sides(leaf.value, matrix_dimensions(leaf.names)))
        count = leaf.value.size // (m * n)
        flops += count * config.newton_schulz_steps * (4 * m * m * n + 2 * m**3)
        size += leaf.value.size * jnp.dtype(config.newton_schulz_dtype).itemsize
    return UpdateCost(flops, 2 * size, size if config.owners == "all" else 0)


def matrix_dimensions(names: Sequence[str | None]) -> MuonDimensionNumbers:
    """Rows and columns of a parameter with these logical axes: the dimensions that its linear map
    sums over, and those of the result. Other dimensions count matrices.
    """
    last = len(names) - 1
    stacked = ("layers", "expert")  # many matrices; a router's `expert` is a column of one
    dims = [i for i, name in enumerate(names) if name not in stacked or i == last]
    # from the residual stream or an adapter's rank to something, or from something to these
    num_in = 1 if names[dims[0]] in ("embed", "rank") else len(dims) - 1
    while names[dims[num_in]] == "taps":  # of the tokens that a convolution sums over
        num_in += 1
    return MuonDimensionNumbers(tuple(dims[:num_in]), tuple(dims[num_in:]))


class MomentumState(NamedTuple):
    # int32 []: updates so far; a tuple has a method of this name, as in the states of optax
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: optax.Updates


def nesterov_momentum(decay: float) -> optax.GradientTransformation:
    """Nesterov's momentum as an average without bias, as in `optax.contrib.scale_by_muon`, whose
    state has the coefficients of its iteration besides, for a type of moments to round.
    """

    def init(params: optax.Params) -> MomentumState:
        return MomentumState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(
        updates: optax.Updates, state: MomentumState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MomentumState]:
        mu, count = optax.tree.update_moment(updates, state.mu, decay, 1), state.count + 1
        ahead = optax.tree.bias_correction(mu, decay, count + 1)
        now = optax.tree.bias_correction(updates, decay, count)
        mixed = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, ahead, now)
        return mixed, MomentumState(count, mu)

    return optax.GradientTransformation(init, update)  # pyright: ignore


def coefficients(name: str, steps: int) -> list[tuple[float, float, float]]:
    """The polynomials of so many iterations."""
    table = COEFFICIENTS[name]
    return list(itertools.islice(itertools.chain(table, itertools.repeat(table[-1])), steps))


def newton_schulz(
    x: jax.Array, polynomials: Sequence[tuple[float, float, float]], slack: float = 1.0
) -> jax.Array:
    """Matrices with the singular vectors of x: [N, m, n], m <= n, and singular values near 1.

    slack: factor on the norms, below which singular values are brought. Products are in the type
    of x with float32 sums, and coefficients are exact in every type.
    """

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(x.dtype), b.astype(x.dtype)
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    y = x.astype(jnp.float32)
    y = y / (slack * jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) + 1e-8)
    for a, b, c in polynomials:
        gram = product(y, y.mT)
        y = a * y + product(b * gram + product(c * gram, gram), y)
    return y.astype(x.dtype)


def orthogonalize(
    config: Config, dimensions: Params, shardings: Sequence[jax.sharding.NamedSharding] | None
) -> optax.GradientTransformation:
    """The orthogonal matrix next to each matrix."""
    polynomials = coefficients(config.newton_schulz, config.newton_schulz_steps)
    slack = 1.01 if config.newton_schulz == "polar_express" else 1.0
    sides = jax.tree.leaves(dimensions, is_leaf=_is_dimensions)

    def iterate(x: jax.Array) -> jax.Array:
        return newton_schulz(x, polynomials, slack)

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        leaves, structure = jax.tree.flatten(updates)
        sent = [x.astype(config.newton_schulz_dtype) for x in leaves]
        over_replicas = config.owners == "all"
        found = matrix_owners.apply(iterate, sent, sides, shardings, over_replicas=over_replicas)
        return structure.unflatten([x.astype(jnp.float32) for x in found])

    return optax.stateless(update)


class NeuronState(NamedTuple):
    nu: optax.Updates  # of a parameter's shape, with ones in place of its rows


def normalize_neurons(decay: float, eps: float, dimensions: Params) -> optax.GradientTransformation:
    """NorMuon (arXiv:2510.05491): divide orthogonal matrices by the root of an average of each
    neuron's mean square, then give them the norm of an orthogonal matrix again.

    The neurons are the outputs of a matrix, here its columns.
    """

    def means(update: jax.Array, dims: MuonDimensionNumbers) -> jax.Array:
        return jnp.mean(jnp.square(update), dims.reduction_axis, keepdims=True)

    def init(params: optax.Params) -> NeuronState:
        def zeros(dims: MuonDimensionNumbers, param: jax.Array) -> jax.Array:
            return jnp.zeros(jax.eval_shape(lambda x: means(x, dims), param).shape, jnp.float32)

        return NeuronState(jax.tree.map(zeros, dimensions, params, is_leaf=_is_dimensions))

    def update(
        updates: optax.Updates, state: NeuronState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NeuronState]:
        def average(dims: MuonDimensionNumbers, x: jax.Array, nu: jax.Array) -> jax.Array:
            return decay * nu + (1 - decay) * means(x, dims)

        def scale(dims: MuonDimensionNumbers, x: jax.Array, nu: jax.Array) -> jax.Array:
            x = x / (jnp.sqrt(nu) + eps)
            both = (*dims.reduction_axis, *dims.output_axis)  # pyright: ignore
            norm = jnp.sqrt(jnp.sum(jnp.square(x), both, keepdims=True))
            return x * (min(_sides(x, dims)) ** 0.5 / jnp.maximum(norm, 1e-30))

        trees = {"is_leaf": _is_dimensions}
        nu = jax.tree.map(average, dimensions, updates, state.nu, **trees)
        return jax.tree.map(scale, dimensions, updates, nu, **trees), NeuronState(nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore


def scale_to_adam(dimensions: Params) -> optax.GradientTransformation:
    """Scale orthogonal matrices by 0.2 of the root of their longer side: the size of AdamW's steps.

    (`consistent_rms` of `optax.contrib.muon`, which exports it only within the whole optimizer.)
    """

    def one(dims: MuonDimensionNumbers, update: jax.Array) -> jax.Array:
        return update * (0.2 * max(_sides(update, dims)) ** 0.5)

    return optax.stateless(
        lambda updates, _: jax.tree.map(one, dimensions, updates, is_leaf=_is_dimensions)
    )


def _sides(x: jax.Array, dims: MuonDimensionNumbers) -> list[int]:
    """Rows and columns of the matrices in an array."""
    return [math.prod(np.take(x.shape, axes)) for axes in dims]


def _is_dimensions(x: object) -> bool:
    return isinstance(x, MuonDimensionNumbers)
