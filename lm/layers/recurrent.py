"""Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000) over
packed rows.

The products that don't depend on the state are one for all positions; only the product of the state
is left in the loop over time. Its gradient is written out for the same reason: of the two products
of the backward pass only the one with the state needs the loop, and the gradient of the weight is
one product for all positions instead of a sum that the loop reads and writes at every one.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.layers.linear import (
    Matrix,
    broadcast_as,
    initializer,
    matrix,
    parameter,
    project_gates,
)
from lm.parallel.sharding import Rules
from lm.types import Array, Tokens

FORGET = 1  # of the gates input, forget, candidate, output


@flax.struct.dataclass
class State:
    """The state of a layer after the tokens so far."""

    hidden: Array  # [B, F], in the compute type
    memory: Array  # float32 [B, F]


@flax.struct.dataclass
class Marks:
    """Segment boundaries and cuts of the gradient; bool [B, T] each."""

    non_padding: Array  # padding leaves the state as it is
    starts: Array  # the first token of a segment, with an empty state before it
    cuts: Array  # no gradient flows back from this token


def marks(inputs: Tokens, bptt: int | None) -> Marks:
    """The Marks of rows whose gradients reach back `bptt` tokens at most; None: to their starts.

    The row is cut where its index is a multiple of `bptt`, whatever segments it holds.
    """
    length = inputs.ids.shape[1]
    non_padding = jnp.asarray(inputs.segments) != 0
    offset = jnp.arange(length) % (length if bptt is None else bptt)
    cuts = jnp.broadcast_to(offset == 0, non_padding.shape) & (bptt is not None)
    return Marks(non_padding, (jnp.asarray(inputs.positions) == 0) & non_padding, cuts)


def empty(shape: tuple[int, ...], dtype: DTypeLike, rules: Rules) -> State:
    """A State of zeros; shape: [..., B, F]."""
    lead = (None,) * (len(shape) - 2)
    hidden = rules.constrain(jnp.zeros(shape, dtype), *lead, "batch", None)
    return State(hidden, rules.constrain(jnp.zeros(shape), *lead, "batch", "mlp"))


class Lstm(nn.Module):
    """One layer. Parameters: `weight` [D, 4, F] of inputs, `recurrent` [F, 4, F] of the state, and
    `bias` [4, F]; gates in the order input, forget, candidate, output.

    Initially the forget gate has the bias `forget_bias` (Jozefowicz et al. 2015), the others none.
    """

    hidden_dim: int
    rules: Rules
    dtype: DTypeLike = jnp.float32
    init_std: float | None = None
    forget_bias: float = 1.0

    @nn.compact
    def __call__(self, x: Array, state: State, where: Marks) -> tuple[jax.Array, State]:
        """x: [B, T, D] -> ([B, T, F], the state after the last token)."""
        axes = ("embed", "gates", "mlp")

        def weights(name: str, size: int) -> Matrix:
            init = initializer(self.init_std, size)
            weight = parameter(self, name, init, (size, 4, self.hidden_dim), axes)
            value, total = matrix(weight, self.dtype, self.rules)
            # collected before the loop, not by each of its steps
            return Matrix(self.rules.constrain(value, None, "gates", "mlp"), total)

        gate = np.eye(4, dtype=np.float32)[FORGET]
        forget = nn.initializers.constant(self.forget_bias * gate[:, None])
        bias = parameter(self, "bias", forget, (4, self.hidden_dim), axes[1:])
        inputs = project_gates(x, weights("weight", x.shape[-1]), self.rules)
        inputs = inputs + broadcast_as(bias, inputs)
        inputs = self.rules.constrain(inputs, "batch", None, "gates", "mlp")
        recurrent = weights("recurrent", self.hidden_dim)
        hidden, state = recurrence(self.rules, inputs, recurrent, state, where)  # pyright: ignore
        return self.rules.constrain(hidden, "batch", None, "act_embed"), state


def cell(gates: Array, memory: Array) -> tuple[jax.Array, jax.Array]:
    """(hidden, memory) [B, F] after a token, of gates: [B, 4, F] before their non-linearities.

    Computed in float32; hidden has the type of gates.
    """
    write, keep, candidate, read = (gates[..., i, :].astype(jnp.float32) for i in range(4))
    memory = jax.nn.sigmoid(keep) * memory + jax.nn.sigmoid(write) * jnp.tanh(candidate)
    return (jax.nn.sigmoid(read) * jnp.tanh(memory)).astype(gates.dtype), memory


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(
    rules: Rules, inputs: Array, weight: Matrix, state: State, where: Marks
) -> tuple[jax.Array, State]:
    """(hidden [B, T, F], the last state) of inputs: [B, T, 4, F] and weight: [F, 4, F].

    The gates of a token are its inputs + weight * hidden of the token before.
    """
    return _forward(rules, inputs, weight, state, where)[0]


# gates [T, B, 4, F], memory and hidden before each token [T, B, F], weight, masks by time
Residuals: TypeAlias = tuple[Array, Array, Array, Matrix, Marks]


def _forward(
    rules: Rules, inputs: Array, weight: Matrix, state: State, where: Marks
) -> tuple[tuple[jax.Array, State], Residuals]:
    one = Matrix(weight.value)

    def step(old: State, x: tuple[Array, Array, Array]) -> tuple[State, tuple[Array, ...]]:
        inputs, non_padding, starts = x
        hidden, memory = (jnp.where(starts, 0, a) for a in (old.hidden, old.memory))
        gates = inputs + project_gates(hidden, one, rules)
        new = State(*cell(gates, memory))
        new = jax.tree.map(lambda a, b: jnp.where(non_padding, a, b), new, old)
        # the next product needs all of it on every device
        new = State(rules.constrain(new.hidden, "batch", None), new.memory)
        return new, (gates, memory, hidden, new.hidden)

    masks = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1)[..., None], where)  # [T, B, 1]
    xs = (jnp.swapaxes(inputs, 0, 1), masks.non_padding, masks.starts)
    last, (gates, memory, before, hidden) = jax.lax.scan(step, state, xs)
    return (jnp.swapaxes(hidden, 0, 1), last), (gates, memory, before, weight, masks)


def _backward(
    rules: Rules, residuals: Residuals, cotangents: tuple[Array, State]
) -> tuple[Array, Matrix, State, None]:
    gates, memory, befores, weight, masks = residuals
    d_hidden, d_last = cotangents
    before = d_last.hidden  # of its shape

    def step(d_new: State, x: tuple[Array, Array, Array, Marks]) -> tuple[State, jax.Array]:
        gates, memory, d_output, masks = x
        d_new = State(d_new.hidden + d_output, d_new.memory)
        _, pullback = jax.vjp(cell, gates, memory)
        d_gates, d_memory = pullback((d_new.hidden, d_new.memory))
        d_gates = jnp.where(masks.non_padding[..., None], d_gates, 0)
        [d_before] = jax.linear_transpose(
            lambda h: project_gates(h, Matrix(weight.value), rules), before
        )(d_gates)
        d_before = rules.constrain(d_before, "batch", None)
        d_old = State(d_before, d_memory)
        d_old = jax.tree.map(lambda a, b: jnp.where(masks.non_padding, a, b), d_old, d_new)
        stop = masks.starts | masks.cuts
        return jax.tree.map(lambda a: jnp.where(stop, 0, a), d_old), d_gates

    xs = (gates, memory, jnp.swapaxes(d_hidden, 0, 1), masks)
    d_first, d_gates = jax.lax.scan(step, d_last, xs, reverse=True)
    d_inputs, befores = jnp.swapaxes(d_gates, 0, 1), jnp.swapaxes(befores, 0, 1)
    if weight.total is None:
        transpose = jax.linear_transpose(
            lambda w: project_gates(befores, Matrix(w), rules), weight.value
        )
        d_weight = Matrix(*transpose(d_inputs))
    else:
        exact = jnp.einsum("btf,btgh->fgh", befores, d_inputs, preferred_element_type=jnp.float32)
        d_weight = Matrix(None, exact)  # pyright: ignore
    return d_inputs, d_weight, d_first, None


recurrence.defvjp(_forward, _backward)
