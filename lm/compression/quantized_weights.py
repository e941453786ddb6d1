"""Weights in 8 or 4 bits for generation and evaluation; activations stay in the compute type.

    int8    a scale for each output of a matrix (arXiv:2208.07339, section 3, weights alone)
    int4    a scale for each group of inputs of each output (arXiv:2210.17323, section 4); two
            numbers in a byte

Scales are symmetric and float32. Those of int4 are the best of `RATIOS` times the largest magnitude
of the group, by the squared error of the group: one outlier then doesn't coarsen all others.

Matrices inside the layers are in the format; tables of the vocabulary (embedding, head) are int8
with a scale for each token in both, as a row of theirs is read or scored as a whole. Routers,
positions, adapters, norms and biases keep their type: they are few, and sensitive.

A `QuantizedMatrix` stands in a tree of parameters where the array stood. Modules unbox it when they
read the parameter, inside the compiled function and the loop over layers: one matrix of one layer
is dequantized at a time, and what lies in memory is 8 or 4 bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lm.kernels.quantization import QuantizationConfig, quantize
from lm.optim import param_tree, parametrization
from lm.optim.optimizers.muon import matrix_dimensions
from lm.parallel.sharding import Rules
from lm.types import Array, Params

FORMATS = ("int8", "int4")
GROUPS = (32, 64, 128)
RATIOS = tuple(1 - 0.04 * i for i in range(13))
INT4_MAX = 7  # symmetric; qwix divides the largest magnitude by 7.5
_INT8 = QuantizationConfig("int8")


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """name: one of FORMATS. group: inputs that share a scale of int4, or a few
    less where that needs less padding.

    Raises:
        ValueError: a value is out of its range.
    """

    name: str
    group: int = 32

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise ValueError(f"weights ({self.name!r}) must be one of {', '.join(FORMATS)}")
        if self.group not in GROUPS:
            raise ValueError(f"group ({self.group}) must be one of {', '.join(map(str, GROUPS))}")


@flax.struct.dataclass
class QuantizedMatrix(nn.meta.AxisMetadata):
    """Integers and scales of a parameter [*stack, *inputs, *outputs], of which a loop over layers
    takes the first dimension of both.

    int8: values int8, of the parameter's shape, scale float32 [*stack, *outputs].
    int4: values uint8 [*stack, groups, group / 2, *outputs], the first half of a group's inputs in
    the low 4 bits, the second in the high; scale float32 [*stack, groups, *outputs].
    """

    values: Array
    scale: Array
    inputs: tuple[int, ...] = flax.struct.field(pytree_node=False)  # sizes summed over
    num_outputs: int = flax.struct.field(pytree_node=False)  # dimensions after them
    inputs_last: bool = flax.struct.field(pytree_node=False)  # [*outputs, *inputs]: of a table
    packed: bool = flax.struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        """The parameter, float32."""
        # a barrier, or the compiler would hoist the float matrix out of the loop of decoding
        values, scale = jax.lax.optimization_barrier((self.values, self.scale))
        if not self.packed:
            places = (
                range(-len(self.inputs), 0)
                if self.inputs_last
                else [-self.num_outputs - i - 1 for i in range(len(self.inputs))]
            )
            return values.astype(jnp.float32) * jnp.expand_dims(scale, tuple(places))
        axis = values.ndim - self.num_outputs - 1
        signed = jax.lax.bitcast_convert_type(values, jnp.int8)
        low = jnp.right_shift(jnp.left_shift(signed, 4), 4)
        whole = jnp.concatenate([low, jnp.right_shift(signed, 4)], axis=axis)
        x = whole.astype(jnp.float32) * jnp.expand_dims(scale, axis)
        stack, outputs = x.shape[: axis - 1], x.shape[axis + 1 :]
        x = x.reshape(*stack, -1, *outputs)  # the last group may have padding
        x = jax.lax.slice_in_dim(x, 0, math.prod(self.inputs), axis=axis - 1)
        return x.reshape(*stack, *self.inputs, *outputs)

    # flax's contract of boxes: what is added and removed is a dimension of `stack`
    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> QuantizedMatrix:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> QuantizedMatrix:
        return self


def quantize_params(params: Params, boxed: Params, rules: Rules, weights: WeightFormat) -> Params:
    """The parameters with matrices as `QuantizedMatrix`, each sharded as it was; the others are the
    same arrays.

    boxed: abstract parameters that name their logical axes. rules: those of the parameters.
    """
    boxes, leaves = param_tree.flatten(boxed), param_tree.flatten(params)
    found = {}
    for name, x in leaves.items():
        plan = _plan(name, boxes[name].names, weights)
        found[name] = x if plan is None else _quantize(x, boxes[name].names, rules, *plan)
    return param_tree.unflatten(found)


def straight_through(params: Params, boxed: Params, weights: WeightFormat) -> Params:
    """The float32 values of `quantize_params`; the gradient of a parameter is that of its rounded
    one (the straight-through estimator, arXiv:1308.3432). Quantized matrices stay as they are.
    """
    boxes, found = param_tree.flatten(boxed), param_tree.flatten(params)
    for name, x in found.items():
        plan = _plan(name, boxes[name].names, weights)
        if plan is not None and not isinstance(x, QuantizedMatrix):
            found[name] = _straight_through(x, *plan)
    return param_tree.unflatten(found)


def dequantize_params(params: Params) -> Params:
    """The parameters as float arrays."""
    return jax.jit(nn.meta.unbox)(params)


def stored_bytes(params: Params) -> int:
    """Bytes of a tree of parameters in memory, all shards together."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


def group_size(num_inputs: int, limit: int) -> int:
    """Inputs that share a scale, an even number of at most `limit`, with little padding."""
    count = -(-num_inputs // limit)
    return -(-num_inputs // (2 * count)) * 2


def _plan(
    name: str, axes: tuple[str | None, ...], weights: WeightFormat
) -> tuple[tuple[int, ...], int | None] | None:
    """(the dimensions that are summed over, the group or None) of a parameter that is quantized."""
    path = name.split(".")
    if "vocab" in axes and parametrization.role(path, axes) in ("embedding", "head"):
        return (axes.index("embed"),), None
    if not parametrization.is_linear_map(path, axes):
        return None
    summed = tuple(matrix_dimensions(axes).reduction_axis)  # pyright: ignore
    return summed, weights.group if weights.name == "int4" else None


def _straight_through(x: Array, summed: tuple[int, ...], group: int | None) -> jax.Array:
    constant = jax.lax.stop_gradient(x)
    # x - constant is 0, and the sum exact
    return _function(summed, group)(constant).unbox() + (x - constant)


def _function(summed: tuple[int, ...], group: int | None) -> Callable[[Array], QuantizedMatrix]:
    return functools.partial(_int8 if group is None else _int4, summed=summed, group=group)


def _quantize(
    x: Array, axes: tuple[str | None, ...], rules: Rules, summed: tuple[int, ...], group: int | None
) -> QuantizedMatrix:
    function = _function(summed, group)
    shape = jax.eval_shape(function, x)
    outer = [a for i, a in enumerate(axes) if i not in summed]
    inputs = [axes[i] for i in summed]
    stack, outputs = axes[: summed[0]], axes[summed[-1] + 1 :]
    if group is None:
        shardings = rules.sharding(*axes), rules.sharding(*outer)
    else:
        count, axis = shape.scale.shape[len(stack)], inputs[0]
        groups = axis if axis is not None and count % rules.size(axis) == 0 else None
        shardings = (
            rules.sharding(*stack, groups, None, *outputs),
            rules.sharding(*stack, groups, *outputs),
        )
    placed = dataclasses.replace(shape, values=shardings[0], scale=shardings[1])
    return jax.jit(function, out_shardings=placed)(x)


def _int8(x: Array, *, summed: tuple[int, ...], group: None) -> QuantizedMatrix:
    del group
    operand = quantize(_INT8, x, summed)
    last = summed[-1] == x.ndim - 1
    return QuantizedMatrix(
        operand.qvalue,
        jnp.squeeze(operand.scale, summed),
        inputs=tuple(x.shape[i] for i in summed),
        num_outputs=0 if last else x.ndim - 1 - summed[-1],
        inputs_last=last,
        packed=False,
    )


def _int4(x: Array, *, summed: tuple[int, ...], group: int) -> QuantizedMatrix:
    import qwix  # imported here: only quantized models need it

    stack, inputs = x.shape[: summed[0]], x.shape[summed[0] : summed[-1] + 1]
    outputs, axis = x.shape[summed[-1] + 1 :], len(stack)
    size = math.prod(inputs)
    group = group_size(size, group)
    x = x.astype(jnp.float32).reshape(*stack, size, *outputs)
    padding = [(0, -size % group if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, padding).reshape(*stack, -1, group, *outputs)
    channels = tuple(i for i in range(x.ndim) if i != axis + 1)
    best: tuple[Array, Array, Array] | None = None
    for ratio in RATIOS:
        how = f"absmax,{ratio * 7.5 / INT4_MAX}"
        found = qwix.quantize(x, jnp.int4, channelwise_axes=channels, calibration_method=how)
        error = jnp.sum(jnp.square(qwix.dequantize(found) - x), axis=axis + 1, keepdims=True)
        new = error, found.qvalue.astype(jnp.int8), found.scale
        if best is None:
            best = new
        else:
            is_better = error < best[0]
            best = tuple(jnp.where(is_better, a, b) for a, b in zip(new, best, strict=True))  # pyright: ignore
    assert best is not None
    low, high = jnp.split(jax.lax.bitcast_convert_type(best[1], jnp.uint8), 2, axis=axis + 1)
    return QuantizedMatrix(
        (low & 15) | (high << 4),
        jnp.squeeze(best[2], axis + 1),
        inputs=inputs,
        num_outputs=len(outputs),
        inputs_last=False,
        packed=True,
    )
