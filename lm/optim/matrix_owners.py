"""Matrices whole on their owners: a function of matrices runs once for each of them.

A parameter that is sharded over mesh axes is a stack of matrices of which every device holds parts.
Left to the compiler, devices gather matrices, or shards of their products, in every iteration, and
replicas repeat each other's work. Here matrices of one shape and one sharding, from however many
parameters, are divided among the devices: an all-to-all gives each of them a few whole ones, and
another one gives the shards of the results back. Devices that hold the same shards (over `data`,
say) divide the matrices too, and gather the results.

Rows and columns of a whole matrix lie in the order of the shards that they come from, and some
matrices are transposed: f(P X Q) must be P f(X) Q for permutations P and Q, and f(X^T) be f(X)^T,
as functions of the singular values are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from optax.contrib import MuonDimensionNumbers

# Elements of the matrices that the function sees at once, of which it holds a few copies: 256 MiB
# in float32.
AT_ONCE = 2**26

Function = Callable[[jax.Array], jax.Array]  # [N, m, n] -> [N, m, n] with m <= n


class Group(NamedTuple):
    """Matrices that one exchange takes: their size, and the mesh axes of rows, columns, stack."""

    size: tuple[int, int]  # of a whole matrix, no more rows than columns
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    stack: tuple[str, ...]


class Stack(NamedTuple):
    """A parameter as a stack of matrices [N, m, n], from its dimensions in this order."""

    group: Group
    order: tuple[int, ...]
    num_stacked: int  # of the dimensions in `order`, which count matrices
    num_rows: int  # of those after them

    def matrices(self, x: jax.Array) -> jax.Array:
        """[N, m, n], with the rows and columns that are in `x`."""
        shape = x.transpose(self.order).shape
        first = self.num_stacked + self.num_rows
        rows = math.prod(shape[self.num_stacked : first])
        return x.transpose(self.order).reshape(-1, rows, math.prod(shape[first:]))

    def parameter(self, matrices: jax.Array, like: jax.Array) -> jax.Array:
        """The array of which `matrices` were made, in the shape of `like`."""
        inverse = sorted(range(like.ndim), key=self.order.__getitem__)
        return matrices.reshape([like.shape[i] for i in self.order]).transpose(inverse)


def make_stack(
    shape: Sequence[int], dimensions: MuonDimensionNumbers, sharding: NamedSharding | None
) -> Stack:
    """The stack of a parameter of this shape, its matrices wider than high."""
    spec = () if sharding is None else sharding.spec
    mesh = {} if sharding is None else sharding.mesh.shape

    def axes(dims: Sequence[int]) -> tuple[str, ...]:
        entries = [spec[i] for i in dims if i < len(spec) and spec[i] is not None]
        names = [(entry,) if isinstance(entry, str) else entry for entry in entries]
        return tuple(axis for group in names for axis in group if mesh[axis] > 1)

    def size(dims: Sequence[int]) -> int:
        return math.prod(shape[i] for i in dims)

    sides = (tuple(dimensions.reduction_axis), tuple(dimensions.output_axis))  # pyright: ignore
    # of square ones those are one group whose shards are each other's transposes
    rows, columns = sorted(sides, key=lambda dims: (size(dims), axes(dims)))
    stacked = tuple(i for i in range(len(shape)) if i not in rows + columns)
    group = Group((size(rows), size(columns)), axes(rows), axes(columns), axes(stacked))
    return Stack(group, stacked + rows + columns, len(stacked), len(rows))


def replicas(group: Group, count: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes over which shards of a group are replicated, and which leave a device fewer of
    `count` matrices than the devices of one replica would.
    """
    held = {*group.rows, *group.columns, *group.stack}
    owners = math.prod(mesh.shape[axis] for axis in group.rows + group.columns)
    chosen = []
    for axis, size in mesh.shape.items():
        if axis not in held and -(-count // (owners * size)) < -(-count // owners):
            chosen.append(axis)
            owners *= size
    return tuple(chosen)


def _bundles(
    stacks: Sequence[Stack], counts: Sequence[int], mesh: Mesh | AbstractMesh
) -> list[list[int]]:
    """The parameters of each exchange: one that all devices can divide evenly takes no copy among
    others; the rest of a group are divided together.
    """
    found: dict[tuple[Group, int | None], list[int]] = {}
    for i, (stack, count) in enumerate(zip(stacks, counts, strict=True)):
        devices = mesh.size // math.prod(mesh.shape[axis] for axis in stack.group.stack)
        found.setdefault((stack.group, None if count % devices else i), []).append(i)
    return list(found.values())


def apply(
    function: Function,
    arrays: Sequence[jax.Array],
    dimensions: Sequence[MuonDimensionNumbers],
    shardings: Sequence[NamedSharding] | None,
    *,
    over_replicas: bool = True,
) -> list[jax.Array]:
    """The function of the matrices in each array.

    shardings: those of the arrays, on one mesh; None: all is on one device, or the compiler's
    business. over_replicas: divide matrices among devices that hold the same shards, too.
    """
    known = shardings or [None] * len(arrays)
    shapes = [x.shape for x in arrays]
    stacks = [make_stack(*of) for of in zip(shapes, dimensions, known, strict=True)]
    if shardings is None or shardings[0].mesh.size == 1:

        def alone(stack: Stack, x: jax.Array) -> jax.Array:
            matrices = stack.matrices(x)
            part = _at_once(len(matrices), stack.group.size)
            return stack.parameter(_map(function, matrices.reshape(-1, part, *stack.group.size)), x)

        return list(map(alone, stacks, arrays))
    mesh = shardings[0].mesh

    def on_each_device(*shards: jax.Array) -> tuple[jax.Array, ...]:
        parts = [s.matrices(x) for s, x in zip(stacks, shards, strict=True)]
        results = list(shards)
        for members in _bundles(stacks, [len(part) for part in parts], mesh):
            group, count = stacks[members[0]].group, sum(len(parts[i]) for i in members)
            among = replicas(group, count, mesh) if over_replicas else ()
            x = jnp.concatenate([parts[i] for i in members])
            x = _exchange(function, x, group, among, mesh)
            for i in members:
                results[i] = stacks[i].parameter(x[: len(parts[i])], shards[i])
                x = x[len(parts[i]) :]
        return tuple(results)

    specs = tuple(s.spec for s in shardings)
    run = jax.shard_map(on_each_device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return list(run(*arrays))


def _exchange(
    function: Function,
    x: jax.Array,
    group: Group,
    among: tuple[str, ...],
    mesh: Mesh | AbstractMesh,
) -> jax.Array:
    """The function of N matrices of which each device has a part: x [N, m / rows, n / columns]."""
    rows, columns, copies = (
        math.prod(mesh.shape[axis] for axis in axes) for axes in (group.rows, group.columns, among)
    )
    axes, shards = group.rows + group.columns, rows * columns
    count, height, width = x.shape
    own = -(-count // (shards * copies))  # matrices of a device; those of zeros stay zeros
    part = _at_once(own, group.size)
    x = jnp.pad(x, ((0, own * shards * copies - count), (0, 0), (0, 0)))
    x = x.reshape(own // part, copies, shards * part, height, width)
    x = lax.dynamic_index_in_dim(x, lax.axis_index(among) if among else 0, 1, keepdims=False)

    def on_owners(x: jax.Array) -> jax.Array:
        if not axes:
            return function(x)
        x = _all_to_all(x, axes).reshape(rows, columns, part, height, width)
        x = function(x.transpose(2, 0, 3, 1, 4).reshape(part, *group.size))
        x = x.reshape(part, rows, height, columns, width).transpose(1, 3, 0, 2, 4)
        return _all_to_all(x.reshape(shards * part, height, width), axes)

    x = _map(on_owners, x)
    x = lax.all_gather(x, among, axis=1, tiled=True) if among else x
    return x.reshape(-1, height, width)


def _all_to_all(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Part i of x to device i, and the parts of all devices in their order."""
    # XLA's CPU compiler (jaxlib 0.10.2) simplifies the parts one by one, transpositions among them,
    # and then refuses an all-to-all of different layouts ("operands with different shapes")
    return lax.all_to_all(lax.optimization_barrier(x), axes, 0, 0, tiled=True)


def _at_once(count: int, size: tuple[int, int]) -> int:
    """The largest part of `count` matrices, a divisor, that memory is meant to take."""
    parts = [k for k in range(1, count + 1) if count % k == 0 and k * math.prod(size) <= AT_ONCE]
    return max(parts, default=1)


def _map(function: Function, x: jax.Array) -> jax.Array:
    """The function of each x[i], without a loop for one."""
    return function(x[0])[None] if len(x) == 1 else lax.map(function, x)
