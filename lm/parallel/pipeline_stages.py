"""Pipeline parallelism: layers over the mesh axis `stage`, micro-batches in one forward pass.

GPipe (arXiv:1811.06965), and circular schedules (arXiv:2104.04473, section 2.2).

All stages run one program. Each array of the schedule has a leading [S], sharded over `stage`; each
stage applies its layers to its shard, and collective-permutes pass the activations to the next
stage (arXiv:2105.04663, section 3.3). Weights don't move inside the loop. The gradient of the loop
is the pipeline backwards.

With R repeats, group g of k = L / (S R) layers is on stage g mod S, and a micro-batch passes all
stages R times. In iteration t stage s works on micro-batch (t - s) mod M in repeat (t - s) // M:

    S = 2, M = 2, R = 2     t =   0     1     2     3     4
    stage 0                       m0    m1    m0    m1    -      groups 0 and 2
    stage 1                       -     m0    m1    m0    m1     groups 1 and 3

There are R M + S - 1 iterations; every stage is idle in S - 1 of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.config.fields import field
from lm.parallel.sharding import Rules
from lm.types import Array, Params, PyTree, Tree

Outputs: TypeAlias = PyTree  # that a layer returns

STREAM = ("layers", None, "batch", "act_length", "act_embed")  # of [S, M / S, B / M, T, D]
STATE = ("layers", "batch", "act_length", "act_embed")  # of [S, B / M, T, D]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    num_microbatches: int = field(
        1, "Parts of a batch that flow through the stages of the mesh; 1: no pipeline.", ge=1
    )
    num_repeats: int = field(
        1,
        "Times that each part goes round the stages: idle time falls about as many times, for an "
        "exchange of weights and of gradients between stages in every forward pass.",
        ge=1,
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Numbers of stages S, micro-batches M, repeats R and layers L; the work of each iteration."""

    num_stages: int
    num_microbatches: int
    num_repeats: int
    num_layers: int

    @property
    def group_size(self) -> int:
        """Layers that one stage applies in one repeat."""
        return self.num_layers // (self.num_stages * self.num_repeats)

    @property
    def num_iterations(self) -> int:
        return self.num_repeats * self.num_microbatches + self.num_stages - 1

    @property
    def bubble(self) -> float:
        """The fraction of the time that a stage is idle."""
        return (self.num_stages - 1) / self.num_iterations

    def work(self, t: Array) -> tuple[jax.Array, jax.Array]:
        """(micro-batch, repeat) of every stage in iteration t, [S] each.

        An idle stage repeats its first or last work, and the results are dropped.
        """
        turn = t - jnp.arange(self.num_stages)
        turn = jnp.clip(turn, 0, self.num_repeats * self.num_microbatches - 1)
        return turn % self.num_microbatches, turn // self.num_microbatches


def make_schedule(config: PipelineConfig, num_layers: int, rules: Rules) -> Schedule:
    """The schedule on a mesh; ValueError where layers or micro-batches can't be divided among the
    stages. On a single stage repeats have no effect.
    """
    stages, m = rules.size("layers"), config.num_microbatches
    repeats = config.num_repeats if stages > 1 else 1
    if m % stages:
        raise ValueError(
            f"config.model.pipeline.num_microbatches ({m}) must be a multiple of mesh stage "
            f"({stages}): each stage keeps an equal share of them, and of the embedding and loss"
        )
    if num_layers % (stages * repeats):
        raise ValueError(
            f"config.model.num_layers ({num_layers}) must be divisible by mesh stage ({stages}) * "
            f"config.model.pipeline.num_repeats ({repeats})"
        )
    return Schedule(stages, m, repeats, num_layers)


# ---- rows ----


def interleave(rules: Rules, num_microbatches: int, tree: Tree) -> Tree:
    """Arrays [B, ...] reordered so that `split` makes micro-batch m of rows m, m + M, ... on any
    mesh, without moving rows between devices.
    """

    def one(x: Array) -> jax.Array:
        rows = x.reshape(rules.size("batch"), -1, num_microbatches, *x.shape[1:])
        return jnp.moveaxis(rows, 2, 1).reshape(x.shape)

    return tree if num_microbatches == 1 else jax.tree.map(one, tree)


def split(rules: Rules, num_microbatches: int, x: Array) -> jax.Array:
    """[B, ...] -> [M, B / M, ...]; each device splits its own rows, so that none moves. Raises
    ValueError where these don't divide among M micro-batches.
    """
    shards = rules.size("batch")
    if x.shape[0] % (shards * num_microbatches):
        raise ValueError(
            f"a forward pass of {x.shape[0]} rows must be divisible by mesh "
            f"{'*'.join(rules.axes('batch'))} ({shards}) * "
            f"config.model.pipeline.num_microbatches ({num_microbatches})"
        )
    rows = x.reshape(shards, num_microbatches, -1, *x.shape[1:])
    return jnp.moveaxis(rows, 1, 0).reshape(num_microbatches, -1, *x.shape[1:])


def merge(rules: Rules, x: Array) -> jax.Array:
    """The inverse of `split`: [M, B / M, ...] -> [B, ...]."""
    rows = x.reshape(x.shape[0], rules.size("batch"), -1, *x.shape[2:])
    return jnp.moveaxis(rows, 0, 1).reshape(-1, *x.shape[2:])


# ---- layers ----


def _rounds(num_stages: int, num_repeats: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index of the group that a stage sends, target stage, index there) of every stage in R
    rounds, int [R, S] each: in every round each stage sends one group and receives one.

    Stored in the order of layers, groups s R ... s R + R - 1 are on stage s.
    """
    stages = np.arange(num_stages)
    # stages at this distance would send equal indices to the same stage
    first = stages // (num_stages // math.gcd(num_stages, num_repeats))
    index = (np.arange(num_repeats)[:, None] + first) % num_repeats
    group = stages * num_repeats + index
    return index, group % num_stages, group // num_stages


def _exchange(params: Params, schedule: Schedule, rules: Rules) -> Params:
    """[L, ...], consecutive layers on a stage -> [S, R, k, ...], what each stage works on.

    Parameters are stored in the order of their layers, whatever the mesh, so that a checkpoint
    means the same on all of them. The price is paid here, in every forward pass, and by the
    transpose of this in every backward pass: all of a device's shards of layers but those that
    are in place already go over the links once.
    """
    s, r, k = schedule.num_stages, schedule.num_repeats, schedule.group_size
    [stage_axis] = rules.axes("layers")
    rounds = _rounds(s, r)

    def local(weights: Params) -> Params:
        stage = jax.lax.axis_index(stage_axis)

        def one(w: Array) -> jax.Array:
            groups = w.reshape(r, k, *w.shape[1:])
            out = jnp.zeros_like(groups)
            for send, target, repeat in zip(*rounds, strict=True):
                sent = _at(groups, jnp.asarray(send)[stage])
                sent = jax.lax.ppermute(sent, stage_axis, list(enumerate(target.tolist())))
                out = _put(out, sent, jnp.asarray(repeat[np.argsort(target)])[stage], 0)
            return out[None]

        return jax.tree.map(one, weights)

    # other shardings of the parameters stay as they are
    spec = rules.spec("layers")
    mapped = jax.shard_map(
        local, mesh=rules.mesh, in_specs=spec, out_specs=spec, axis_names={stage_axis}
    )
    return mapped(params)


def _on_stages(params: Params, schedule: Schedule, rules: Rules) -> Params:
    """[L, ...] -> [S, R, k, ...], on the stages that apply them."""
    s, r, k = schedule.num_stages, schedule.num_repeats, schedule.group_size
    if r > 1:
        return _exchange(params, schedule, rules)

    def one(w: Array) -> jax.Array:
        w = w.reshape(s, 1, k, *w.shape[1:])
        free = (PartitionSpec.UNCONSTRAINED,) * (w.ndim - 1)
        sharding = NamedSharding(rules.mesh, PartitionSpec(*rules.spec("layers"), *free))
        return w if s == 1 else jax.lax.with_sharding_constraint(w, sharding)

    return jax.tree.map(one, params)


# ---- the loop ----

# (parameters, per-layer arrays, x [b, T, D], result of `prepare`, key or None) -> (x, outputs)
Layer = Callable[[Params, PyTree, Array, PyTree, Array | None], tuple[Array, Outputs]]


def pipeline(
    layer: Layer,
    prepare: Callable[[PyTree, PyTree], PyTree],
    params: Params,
    per_layer: PyTree,
    x: Array,
    rows: PyTree,
    common: PyTree = None,
    *,
    schedule: Schedule,
    rules: Rules,
    rng: Array | None = None,
    unroll: int = 1,
) -> tuple[jax.Array, Outputs]:
    """(x after all layers [M, b, T, D], outputs of the layers [M, L, ...]) of x: [M, b, T, D].

    layer: one layer on the b rows of a micro-batch, inside a shard_map over the stages.
    prepare: (arrays of `rows` without their [M], `common`) -> values that the layers share.
    params: [L, ...] in the order of the layers.
    per_layer: [k, ...], the same for every group of k layers.
    rows: a tree of [M, b, ...] that is not differentiated and that every stage holds.
    common: arrays that all micro-batches share, with gradients.
    rng: the key of layer l on micro-batch m is fold_in(fold_in(rng, l), m), whatever the mesh.
    """
    s, m, r = schedule.num_stages, schedule.num_microbatches, schedule.num_repeats
    k, share = schedule.group_size, m // s
    weights = _on_stages(params, schedule, rules)
    stages = jnp.arange(s).reshape(-1, *(1,) * (x.ndim - 1))  # along an array [S, b, T, D]
    first, last = stages == 0, stages == s - 1

    def stage(
        common: PyTree, number: Array, weights: Params, x: Array, m: Array, r: Array
    ) -> tuple[Array, Outputs]:
        shared = prepare(jax.tree.map(lambda a: _at(a, m), rows), common)
        layers = (r * s + number) * k + jnp.arange(k)

        def step(x: Array, own: PyTree) -> tuple[Array, Outputs]:
            weights, each, number = own
            key = None if rng is None else jax.random.fold_in(jax.random.fold_in(rng, number), m)
            return layer(weights, each, x, shared, key)

        own = jax.tree.map(lambda w: _at(w, r), weights)
        return jax.lax.scan(step, x, (own, per_layer, layers), unroll=min(unroll, k))

    on_stages = _map_stages(stage, rules)

    def iteration(carry: PyTree, t: Array) -> tuple[PyTree, Outputs]:
        before, stream, waiting = carry
        microbatch, repeat = schedule.work(t)
        # a ring where nothing waits in between
        arriving = again = _send(before, 1, rules, wrap=r > 1 and share == 1)
        if r > 1 and share > 1:  # M - S micro-batches wait for their next repeat
            slot = t % (share - 1)
            again = _at(waiting, slot, 1)
            waiting = _put(waiting, jnp.where(last, before, _send(again, -1, rules)), slot, 1)
        fresh = _at(stream, t % share, 1)
        entering = jnp.where(t < m, fresh, again)
        now = rules.constrain(jnp.where(first, entering, arriving), *STATE)
        now, outputs = on_stages(common, jnp.arange(s), weights, now, microbatch, repeat)
        now = rules.constrain(now, *STATE)
        # the slot that stage 0 has read takes, moving towards it, the output of the last stage
        stream = _put(stream, jnp.where(last, now, _send(fresh, -1, rules)), t % share, 1)
        return (now, stream, waiting), outputs

    stream = rules.constrain(x.reshape(s, share, *x.shape[1:]), *STREAM)
    before = rules.constrain(jnp.zeros_like(stream[:, 0]), *STATE)
    waiting = stream[:, 1:] if r > 1 else None
    (_, stream, _), outputs = jax.lax.scan(
        iteration, (before, stream, waiting), jnp.arange(schedule.num_iterations)
    )
    # the last M iterations finished micro-batches 0 ... M - 1, from slot S - 1 on
    stream = jnp.roll(stream, -((s - 1) % share), axis=1)
    stream = rules.constrain(stream, *STREAM)
    return stream.reshape(x.shape), jax.tree.map(lambda o: _in_order(o, schedule), outputs)


def _in_order(outputs: Array, schedule: Schedule) -> jax.Array:
    """[iterations, S, k, ...] -> [M, L, ...], without the outputs of idle stages."""
    s, m, r = schedule.num_stages, schedule.num_microbatches, schedule.num_repeats
    busy = jnp.stack([outputs[i : i + r * m, i] for i in range(s)], axis=1)  # [R M, S, k, ...]
    by_repeat = jnp.moveaxis(busy.reshape(r, m, *busy.shape[1:]), 1, 0)  # [M, R, S, k, ...]
    return by_repeat.reshape(m, schedule.num_layers, *outputs.shape[3:])


def _map_stages(stage: Callable[..., Outputs], rules: Rules) -> Callable[..., Outputs]:
    """`stage(common, *own)` for each entry of own [S, ...], on its own stage.

    As jax.vmap, but not every kernel can be vmapped, and a conditional would run all its branches.
    Other axes of the mesh are left to the compiler.
    """
    if rules.size("layers") == 1:
        return lambda common, *args: jax.vmap(functools.partial(stage, common))(*args)

    def local(common: PyTree, own: PyTree) -> Outputs:
        result = stage(common, *jax.tree.map(lambda a: a[0], own))
        return jax.tree.map(lambda a: a[None], result)

    spec = rules.spec("layers")
    mapped = jax.shard_map(
        local,
        mesh=rules.mesh,
        in_specs=(PartitionSpec(), spec),
        out_specs=spec,
        axis_names=set(rules.axes("layers")),
        check_vma=False,  # kernels don't declare over which axes their results vary
    )
    return lambda common, *own: mapped(common, own)


def _send(x: Array, by: int, rules: Rules, wrap: bool = False) -> jax.Array:
    """x: [S, b, T, D] of every stage, moved by `by` stages; zeros where none arrives.

    A roll left to the compiler is one collective-permute forwards and two backwards.
    """
    [axis], size = rules.axes("layers"), x.shape[0]
    pairs = [(i, (i + by) % size) for i in range(size) if wrap or 0 <= i + by < size]
    if size == 1:
        return x
    spec = rules.spec(*STATE)
    return jax.shard_map(
        lambda x: jax.lax.ppermute(x, axis, pairs), mesh=rules.mesh, in_specs=spec, out_specs=spec
    )(x)


def _at(x: Array, i: Array, axis: int = 0) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)


def _put(x: Array, value: Array, i: Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, i, axis)
