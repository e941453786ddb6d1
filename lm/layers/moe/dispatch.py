"""Dispatch of tokens to the experts that a router chose, and the sum of their weighted outputs.

Both variants are explicit about devices. What a device receives, in tokens of the residual stream:

    dropless       Each shard of experts (and of their width) gathers the tokens of all the shards
                   beside it, applies the experts that are here to those tokens that chose them,
                   and adds the results up where the tokens came from: (s - 1) times its own tokens
                   over s shards, each way, whatever the load. Rows sent only where they are wanted
                   would be k (s - 1) / s times at a balanced load, which is less for s > k.
    with_capacity  Rows of C slots for every expert are exchanged by an all-to-all, each way:
                   capacity_factor * k * (s - 1) / s times its own tokens over s shards.

The weights that FSDP divides are gathered before, and their gradients reduced and scattered after.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec

from lm.kernels.grouped_matmul import collect, grouped_matmul, sort_by_group, spread
from lm.kernels.quantization import NO_QUANTIZATION, QuantizationConfig
from lm.kernels.quantized_grouped_matmul import quantized_by_expert, quantized_grouped_matmul
from lm.layers.linear import Kept, Matrix, broadcast_as, gather
from lm.layers.mlp import hidden
from lm.parallel.sharding import Rules
from lm.types import Array

Experts = dict[str, jax.Array]  # up and, if gated, gate: [E, D, F], down: [E, F, D]
Matrices = dict[str, Matrix]  # the same, sharded
Grouped = Callable[[Array, Experts, Array], jax.Array]  # experts to rows in groups of these sizes
Apply = Callable[[Array, Array, Experts], jax.Array]  # experts to rows and their weights

AXES = {
    "up": ("expert", "embed", "mlp"),
    "gate": ("expert", "embed", "mlp"),
    "down": ("expert", "mlp", "embed"),
}

# Rows of one pass over what a shard of experts was sent, relative to a balanced load, and of one
# part where they have to be enough whatever the load.
ROOM = 1.25
ROOM_OF_PART = 4.0


def _feed_forward(
    rows: Array, experts: Experts, activation: str, product: Callable[[Array, Array], jax.Array]
) -> jax.Array:
    h = hidden(activation, lambda name: product(rows, experts[name]))
    return product(h, experts["down"])


def _on_shards(
    apply: Callable[..., jax.Array],
    x: Array,
    chosen: Array,
    weights: Array,
    experts: Matrices,
    rules: Rules,
    *,
    over: tuple[str, ...],
) -> jax.Array:
    """`apply(x, chosen, weights, experts)` on every device: [b, t, D] with the experts that it has.

    It gets the tokens of all shards along the logical axes `over`, and what it makes of them is
    added up over those shards.
    """
    if rules.mesh.size == 1:
        return apply(x, chosen, weights, {name: w.value for name, w in experts.items()})
    batch, length = rules.sharded_axes("batch"), _length_axes(rules, x.shape[1])
    # which dimension of the tokens an axis shards; those that shard none hold the same ones
    place = {axis: 0 for axis in batch} | {axis: 1 for axis in length}
    divided = dict.fromkeys(a for name in over for a in rules.sharded_axes(name))

    def of_all(a: Array) -> jax.Array:
        for axis in reversed(divided):
            if axis in place:
                a = jax.lax.all_gather(a, axis, axis=place[axis], tiled=True)
        return a

    def add_up(a: Array) -> jax.Array:
        for axis in divided:
            if axis in place:
                a = jax.lax.psum_scatter(a, axis, scatter_dimension=place[axis], tiled=True)
            else:
                a = jax.lax.psum(a, axis)
        return a

    def run(x: Array, chosen: Array, weights: Array, experts: Matrices) -> jax.Array:
        axes = rules.sharded_axes("embed")
        whole = {n: gather(axes, AXES[n].index("embed"), w) for n, w in experts.items()}
        return add_up(apply(of_all(x), of_all(chosen), of_all(weights), whole))

    spec = PartitionSpec(batch, length)
    layout = {name: rules.spec(*AXES[name]) for name in experts}
    in_specs = (spec, spec, spec, layout)
    return rules.shard_map(run, in_specs=in_specs, out_specs=spec)(x, chosen, weights, experts)


def _length_axes(rules: Rules, length: int) -> tuple[str, ...]:
    """The mesh axes of the length of the residual stream; one token isn't divided further."""
    divides = length % rules.size("act_length") == 0
    return rules.sharded_axes("act_length" if divides else "length")


def dropless(
    x: Array,
    chosen: Array,
    weights: Array,
    experts: Matrices,
    activation: str,
    rules: Rules,
    quantization: QuantizationConfig = NO_QUANTIZATION,
) -> jax.Array:
    """x: [B, T, D], chosen: int32 [B, T, k] (E: none), weights: float32 [B, T, k] -> [B, T, D]."""
    axes, shards, k = rules.sharded_axes("expert"), rules.size("expert"), chosen.shape[-1]
    here = experts["up"].value.shape[0] // shards
    # for each token, the assignments here at a balanced load, and at most
    balanced, most = k / shards, min(k, here)

    def grouped(rows: Array, experts: Experts, sizes: Array) -> jax.Array:
        function: Any = grouped_matmul
        if quantization.format != "none":
            function = functools.partial(quantized_grouped_matmul, quantization)
        product = functools.partial(function, rules.platform, balanced / most, sizes=sizes)
        return _feed_forward(rows, experts, activation, product)

    def apply(x: Array, chosen: Array, weights: Array, experts: Experts) -> jax.Array:
        # of n = b t tokens: [n, D], [n, k], [n, k]
        flat, chosen, weights = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights))
        if not axes:
            return _sorted(grouped, flat, chosen, weights, experts).reshape(x.shape)
        chosen = chosen - here * jax.lax.axis_index(axes)
        chosen = jnp.where((chosen >= 0) & (chosen < here), chosen, here)
        tokens = flat.shape[0]
        if rules.platform == "gpu":
            parts = min(math.ceil(most / (ROOM_OF_PART * balanced)), tokens)
            parts = next(n for n in range(parts, tokens + 1) if tokens % n == 0)
            y: Array = _in_parts(grouped, parts, flat, chosen, weights, experts)  # pyright: ignore
        else:
            size = min(math.ceil(ROOM * tokens * balanced), tokens * most)
            y = _in_passes(grouped, size, flat, chosen, weights, experts)  # pyright: ignore
        return y.reshape(x.shape)

    return _on_shards(apply, x, chosen, weights, experts, rules, over=("expert", "mlp"))


def _sorted(
    grouped: Grouped, x: Array, chosen: Array, weights: Array, experts: Experts
) -> jax.Array:
    """The experts that are here on all tokens [n, D], in one pass over their assignments."""
    here = experts["up"].shape[0]
    order, slots, sizes = sort_by_group(chosen.reshape(-1), here)
    order = order[: x.shape[0] * min(chosen.shape[1], here)]  # no more of them can be for here
    y = grouped(spread(x, order, slots.reshape(chosen.shape)), experts, sizes)
    y = y * broadcast_as(spread(weights.reshape(-1, 1), order, slots[:, None]), y)
    return collect(y, order, slots.reshape(chosen.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_parts(
    grouped: Grouped, parts: int, x: Array, chosen: Array, weights: Array, experts: Experts
) -> jax.Array:
    """As `_in_passes`, with no shape or length that is data: GPUs read such a length on the host,
    in every layer.

    The tokens are taken in `parts`, each with rows for all assignments that it can have. Those that
    there are not cost memory, and the bandwidth of what is elementwise, but none of the products.
    """

    def body(_: None, part: tuple[Array, ...]) -> tuple[None, jax.Array]:
        x, chosen, weights = part
        return None, _sorted(grouped, x, chosen, weights, experts)

    split = tuple(a.reshape(parts, -1, a.shape[-1]) for a in (x, chosen, weights))
    return jax.lax.scan(body, None, split)[1].reshape(x.shape)


def _in_parts_backward(
    grouped: Grouped,
    parts: int,
    residuals: tuple[Array, Array, Array, Experts],
    dy: jax.Array,
) -> tuple[jax.Array, None, jax.Array, Experts]:
    *arrays, experts = residuals

    def body(total: Experts, part: tuple[Array, ...]) -> tuple[Experts, tuple[Array, Array]]:
        x, chosen, weights, dy = part
        _, pullback = jax.vjp(
            lambda x, weights, experts: _sorted(grouped, x, chosen, weights, experts),
            *(x, weights, experts),
        )
        dx, d_weights, d_experts = pullback(dy)
        return jax.tree.map(jnp.add, total, d_experts), (dx, d_weights)

    split = tuple(a.reshape(parts, -1, a.shape[-1]) for a in (*arrays, dy))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), experts)  # sums in float32
    total, (dx, d_weights) = jax.lax.scan(body, zeros, split)
    d_experts = jax.tree.map(lambda d, a: d.astype(a.dtype), total, experts)
    x, _, weights = arrays
    return dx.reshape(x.shape), None, d_weights.reshape(weights.shape), d_experts


_in_parts.defvjp(
    lambda grouped, parts, *arrays: (_in_parts(grouped, parts, *arrays), arrays),
    _in_parts_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_passes(
    grouped: Grouped, size: int, x: Array, chosen: Array, weights: Array, experts: Experts
) -> jax.Array:
    """Some experts on the tokens of all shards [n, D]; chosen: [n, k], E for those elsewhere.

    How many assignments are for here is known only when it happens: from none to n min(k, E).
    They are taken `size` at a time until none is left, so memory is that of a capacity of that
    size, but what would be beyond it takes another pass instead of being dropped. The loop's
    length being data, its gradient is written out: it computes each pass again.
    """
    part, count = _passes(grouped, size, chosen, experts)

    def body(i: Array, out: jax.Array) -> jax.Array:
        apply, token, assignment = part(i)
        y = apply(_rows(x, token), _rows(weights.reshape(-1), assignment), experts)
        return out.at[token].add(y.astype(out.dtype), mode="drop")

    zeros = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.fori_loop(0, count, body, zeros).astype(x.dtype)


def _in_passes_backward(
    grouped: Grouped,
    size: int,
    residuals: tuple[Array, Array, Array, Experts],
    dy: jax.Array,
) -> tuple[jax.Array, None, jax.Array, Experts]:
    x, chosen, weights, experts = residuals
    part, count = _passes(grouped, size, chosen, experts)
    flat = weights.reshape(-1)

    def body(i: Array, sums: tuple[Array, Array, Experts]) -> tuple[Array, Array, Experts]:
        dx, d_flat, d_experts = sums
        apply, token, assignment = part(i)
        _, pullback = jax.vjp(apply, _rows(x, token), _rows(flat, assignment), experts)
        d_rows, d_weight, d_part = pullback(_rows(dy, token))
        dx = dx.at[token].add(d_rows.astype(dx.dtype), mode="drop")
        d_flat = d_flat.at[assignment].add(d_weight, mode="drop")
        return dx, d_flat, jax.tree.map(jnp.add, d_experts, d_part)

    inputs = x, flat, experts
    sums = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), inputs)  # in float32
    sums = jax.lax.fori_loop(0, count, body, sums)
    dx, d_flat, d_experts = jax.tree.map(lambda d, a: d.astype(a.dtype), sums, inputs)
    return dx, None, d_flat.reshape(weights.shape), d_experts


_in_passes.defvjp(
    lambda grouped, size, *arrays: (_in_passes(grouped, size, *arrays), arrays),
    _in_passes_backward,
)


def _passes(
    grouped: Grouped, size: int, chosen: Array, experts: Experts
) -> tuple[Callable[[Array], tuple[Apply, jax.Array, jax.Array]], jax.Array]:
    """(i -> (the function of pass i, its tokens [size], its assignments [size]), their number)."""
    order, _, sizes = sort_by_group(chosen.reshape(-1), experts["up"].shape[0])
    none, k = order.shape[0], chosen.shape[1]
    padded = jnp.pad(order, (0, -none % size), constant_values=none)
    ends = jnp.cumsum(sizes)

    def part(i: Array) -> tuple[Apply, jax.Array, jax.Array]:
        start = i * size
        assignment = jax.lax.dynamic_slice_in_dim(padded, start, size)
        within = [jnp.clip(edge, start, start + size) for edge in (ends, ends - sizes)]

        def apply(rows: Array, weights: Array, experts: Experts) -> jax.Array:
            y = grouped(rows, experts, within[0] - within[1])
            return y * broadcast_as(weights[:, None], y)

        return apply, assignment // k, assignment

    return part, (jnp.sum(sizes) + size - 1) // size


def _rows(a: Array, index: Array) -> jax.Array:
    """a[index], zeros beyond the end."""
    return jnp.take(a, index, axis=0, mode="fill", fill_value=0)


def with_capacity(
    x: Array,
    chosen: Array,
    weights: Array,
    experts: Matrices,
    activation: str,
    rules: Rules,
    quantization: QuantizationConfig = NO_QUANTIZATION,
    *,
    capacity: int,
) -> jax.Array:
    """[B, T, D] of x, chosen and weights as for `dropless`.

    Of each row, every expert takes the first `capacity` tokens that chose it.
    """
    axes, length = rules.sharded_axes("expert"), rules.sharded_axes("length")
    num_experts = experts["up"].value.shape[0]
    # shards of the length divide the slots: each fills its own from the whole row
    room = -(-capacity // rules.size("length"))
    product: Any = _by_expert
    if quantization.format != "none":
        product = functools.partial(quantized_by_expert, quantization)

    def apply(x: Array, chosen: Array, weights: Array, experts: Experts) -> jax.Array:
        b, t, k = chosen.shape
        first = room * jax.lax.axis_index(length) if length else 0
        permutation = functools.partial(_permutation, num_experts, capacity, first, room)
        order, slots = jax.vmap(permutation)(chosen.reshape(b, -1))
        rows = jax.vmap(spread)(x, order, slots.reshape(b, t, k))
        rows = rows.reshape(b, num_experts, room, -1)
        if axes:
            rows = jax.lax.all_to_all(rows, axes, split_axis=1, concat_axis=0, tiled=True)
        y = _feed_forward(rows, experts, activation, product)
        if axes:
            y = jax.lax.all_to_all(y, axes, split_axis=0, concat_axis=1, tiled=True)
        y = y.reshape(b, num_experts * room, -1)
        factor = jax.vmap(spread)(weights.reshape(b, -1, 1), order, slots[..., None])
        return jax.vmap(collect)(y * broadcast_as(factor, y), order, slots.reshape(b, t, k))

    over = ("act_length", "length", "mlp")
    return _on_shards(apply, x, chosen, weights, experts, rules, over=over)


@jax.custom_vjp
def _by_expert(rows: Array, weight: Array) -> jax.Array:
    """rows: [B, E, C, D] times the matrix of their expert, [E, D, F] -> [B, E, C, F].

    Its own gradient, for the sums over rows of that of the matrices: unlike float32, the type of
    the rows is one in which XLA's CPU compiler (jax 0.12) may add them up.
    """
    return jnp.einsum("becd,edf->becf", rows, weight)


def _by_expert_forward(rows: CustomVJPPrimal, weight: CustomVJPPrimal) -> tuple[jax.Array, Kept]:
    # what is frozen is spared the product that would be its gradient
    kept = (rows.value if weight.perturbed else None, weight.value if rows.perturbed else None)
    return _by_expert(rows.value, weight.value), kept


def _by_expert_backward(kept: Kept, dy: Array | SymbolicZero) -> Kept:
    rows, weight = kept
    if isinstance(dy, SymbolicZero):
        return None, None
    dx = d_weight = None
    if weight is not None:
        dx = jnp.einsum("becf,edf->becd", dy, weight)
    if rows is not None:
        d_weight = jnp.einsum("becd,becf->edf", rows, dy, preferred_element_type=jnp.float32)
        d_weight = d_weight.astype(rows.dtype)
    return dx, d_weight


_by_expert.defvjp(_by_expert_forward, _by_expert_backward, symbolic_zeros=True)


def _permutation(
    num_experts: int, capacity: int, first: Array | int, room: int, chosen: Array
) -> tuple[Array, Array]:
    """(order [E * room], slots [T k]) of the choices of one row, int32 [T k], for slots first ..
    first + room of all experts.

    By token first and choice second: that a later token is there changes nothing for an earlier.
    """
    count = chosen.shape[0]
    order, ranks, sizes = sort_by_group(chosen, num_experts)
    starts = jnp.cumsum(sizes) - sizes
    slot = ranks - jnp.take(starts, chosen, mode="fill", fill_value=0)
    taken = (chosen < num_experts) & (slot < capacity) & (slot >= first) & (slot < first + room)
    slots = jnp.where(taken, chosen * room + slot - first, num_experts * room)
    slot = first + jnp.arange(room)
    filled = slot < jnp.minimum(sizes, capacity)[:, None]  # [E, room]
    where = jnp.where(filled, starts[:, None] + slot, count)
    order = jnp.take(order, where, mode="fill", fill_value=count)
    return order.reshape(-1), slots
