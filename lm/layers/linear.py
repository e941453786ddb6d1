"""Linear maps with named parameters and logical axes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from lm.kernels.quantization import NO_QUANTIZATION, QuantizationConfig, quantized_product
from lm.layers.lora import LoraConfig
from lm.parallel.sharding import Rules
from lm.types import Array

if TYPE_CHECKING:
    from lm.layers.block_config import BlockConfig


def initializer(std: float | None, fan_in: int, scale: float = 1.0) -> Initializer:
    """Normal weights of deviation `scale * std`, or `scale / sqrt(fan_in)` where `std` is None."""
    return nn.initializers.normal(scale * (fan_in**-0.5 if std is None else std))


def parameter(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> jax.Array:
    """A parameter of `module` whose dimensions have the logical names `axes`."""
    value: Any = module.param(name, nn.with_partitioning(init, axes), shape)
    return value


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(
    dim: int, dtype: DTypeLike, x: Array, weight: Array, total: Array | None = None
) -> jax.Array:
    """x: [..., D] times dimension `dim` of weight, which is [D, *out], or [V, D] -> [..., *out] as
    `dtype`, in which float32 sums of products of a smaller type aren't rounded.

    Its own gradient: the cotangent is rounded to the type of x, so that the two products of the
    backward pass are as fast as those of the same type, as they are for a rounded result.

    total: the float32 parameter, of the shape of weight, that weight was rounded from. It receives
    the gradient in weight's place: a sum that is never rounded, on no device and over none.
    """
    over = (((x.ndim - 1,), (dim,)), ((), ()))
    return jax.lax.dot_general(x, weight, over, preferred_element_type=dtype)


Kept: TypeAlias = tuple[Array | None, Array | None]  # x and the weight, or their gradients


def _product_forward(
    dim: int,
    dtype: DTypeLike,
    x: CustomVJPPrimal,
    weight: CustomVJPPrimal,
    total: CustomVJPPrimal | None = None,
) -> tuple[jax.Array, tuple[Array | None, Array | None, bool]]:
    # what is frozen is spared the product that would be its gradient
    kept = (x.value if weight.perturbed else None, weight.value if x.perturbed else None)
    return product(dim, dtype, x.value, weight.value), (*kept, total is not None)


def _product_backward(
    dim: int,
    dtype: DTypeLike,
    kept: tuple[Array | None, Array | None, bool],
    dy: Array | SymbolicZero,
) -> tuple[Array | None, Array | None, Array | None]:
    x, weight, in_total = kept
    if isinstance(dy, SymbolicZero):
        return None, None, None
    dx = d_weight = None
    if weight is not None:
        outer = tuple(i for i in range(weight.ndim) if i != dim)
        last = tuple(range(dy.ndim - len(outer), dy.ndim))
        dx = jax.lax.dot_general(dy.astype(weight.dtype), weight, ((last, outer), ((), ())))
    if x is not None:
        rows = tuple(range(x.ndim - 1))
        pair = (x, dy.astype(x.dtype)) if dim == 0 else (dy.astype(x.dtype), x)
        d_weight = jax.lax.dot_general(
            *pair,
            ((rows, rows), ((), ())),
            preferred_element_type=jnp.float32 if in_total else None,
        )
    return (dx, None, d_weight) if in_total else (dx, d_weight, None)


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


class Matrix(NamedTuple):
    """A matrix in the compute type, and the float32 parameter for its gradient (see `product`), or
    None where devices add up gradients in the compute type.
    """

    value: Array
    total: Array | None = None

    def reshape(self, *shape: int) -> Matrix:
        return Matrix(
            self.value.reshape(*shape), None if self.total is None else self.total.reshape(*shape)
        )


def matrix(parameter: Array, dtype: DTypeLike, rules: Rules) -> Matrix:
    """A float32 parameter as `dtype`."""
    exact = rules.float32_gradients and parameter.dtype != dtype
    return Matrix(parameter.astype(dtype), parameter if exact else None)


def project(
    x: jax.Array,
    weight: Matrix,
    rules: Rules,
    num_in: int = 1,
    unrounded: bool = False,
    quantization: QuantizationConfig = NO_QUANTIZATION,
) -> jax.Array:
    """x: [B, T, *in] times weight: [*in, *out] -> [B, T, *out], in their type, or `unrounded`
    float32.

    One matrix product on rows flattened to [B * T, in]: XLA's CPU products and their gradients are
    much faster in two dimensions, and on other platforms the reshape is free. Not where the length
    is sharded: merging two sharded dimensions would gather one of them.
    """
    shape = weight.value.shape
    lead, inner, outer = x.shape[:-num_in], shape[:num_in], shape[num_in:]
    flat = weight.reshape(math.prod(inner), math.prod(outer))
    x = x.reshape(*lead, math.prod(inner))
    x = x.reshape(-1, x.shape[-1]) if rules.size("length") == 1 else x
    y: Any
    if quantization.format != "none":
        y = quantized_product(quantization, x, *flat)
    elif unrounded or flat.total is not None:
        y = product(0, jnp.float32 if unrounded else x.dtype, x, *flat)
    else:
        y = x @ flat.value
    return y.reshape(*lead, *outer)


def project_gates(x: Array, weight: Matrix, rules: Rules) -> jax.Array:
    """x: [..., D] times weight: [D, G, F] -> [..., G, F], F on the logical axis `mlp`."""
    merges = rules.size("mlp") == 1 and rules.size("length") == 1  # it would gather what is sharded
    if merges:
        return project(x, weight, rules)
    if weight.total is None:
        return jnp.tensordot(x, weight.value, 1)
    y: Any = product(0, x.dtype, x, *weight)
    return y


def gather(axes: tuple[str, ...], dim: int, weight: Matrix) -> jax.Array:
    """The whole of a matrix, in its type, of which each device of the mesh `axes` has a part of
    dimension `dim`; for use inside shard_map.
    """
    if weight.total is not None:
        y: Any = _gather_to_total(axes, dim, weight)
        return y
    return _all_gather(axes, dim, weight.value)


def _all_gather(axes: tuple[str, ...], dim: int, x: Array) -> jax.Array:
    x = jnp.asarray(x)
    for axis in axes:
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_to_total(axes: tuple[str, ...], dim: int, weight: Matrix) -> jax.Array:
    """As `gather`; `weight.total` receives the gradient: the sums of the devices, each rounded to
    the type of the matrix, are added up in float32.
    """
    return _all_gather(axes, dim, weight.value)


def _gather_to_total_backward(
    axes: tuple[str, ...], dim: int, _: None, d_whole: jax.Array
) -> tuple[Matrix]:
    total = d_whole.astype(jnp.float32)
    for axis in reversed(axes):
        total = jax.lax.psum_scatter(total, axis, scatter_dimension=dim, tiled=True)
    return (Matrix(None, total),)  # pyright: ignore


_gather_to_total.defvjp(
    lambda axes, dim, weight: (_all_gather(axes, dim, weight.value), None),
    _gather_to_total_backward,
)


def broadcast_as(x: Array, like: Array) -> jax.Array:
    """Float32 numbers x broadcast to the shape of `like`, and then in its type.

    In this order, their gradient is a sum over tokens in float32: of numbers that are cast first,
    it is one in the compute type, of which bfloat16 loses all that is below 1 / 256 of it.
    """
    return jnp.broadcast_to(x, like.shape).astype(like.dtype)


def times(x: jax.Array, factor: float) -> jax.Array:
    """x * factor, in the type of x."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


class Linear(nn.Module):
    """y = x W (+ b) over the last dimensions of x, `inputs`, which follow [B, T].

    inputs, outputs: the logical axes and sizes of these dimensions. Parameters: `weight`
    [*inputs, *outputs], `bias` [*outputs], and, where `lora` has the module's name among its
    targets, `lora_a` [*inputs, rank], `lora_b` [rank, *outputs]. The adapter's dropout is on where
    there is a generator for `dropout`: in training.

    y has the type `dtype`, or, `unrounded`, the float32 that products are summed in. The product
    with `weight` is in the format of `quantization`, the adapter's are not.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    rules: Rules
    _: dataclasses.KW_ONLY
    bias: bool = False
    dtype: DTypeLike = jnp.float32
    init_std: float | None = None
    init_scale: float = 1.0
    lora: LoraConfig = LoraConfig()
    unrounded: bool = False
    quantization: QuantizationConfig = NO_QUANTIZATION

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = initializer(self.init_std, math.prod(self.inputs.values()), self.init_scale)
        weight = self._matrix("weight", init, self.inputs, self.outputs)
        how = self.unrounded, self.quantization
        y = project(x, weight, self.rules, len(self.inputs), *how)
        if self.bias:
            shape, axes = tuple(self.outputs.values()), tuple(self.outputs)
            y = y + broadcast_as(parameter(self, "bias", nn.initializers.zeros, shape, axes), y)
        if self.lora.rank and self.name in self.lora.targets:
            y = y + self._adapter(x)
        return y

    def _matrix(
        self, name: str, init: Initializer, inputs: Mapping[str, int], outputs: Mapping[str, int]
    ) -> Matrix:
        """A parameter in the compute type, collected from the devices that share it."""
        shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        value, total = matrix(parameter(self, name, init, shape, axes), self.dtype, self.rules)
        return Matrix(self.rules.collect(value, *axes), total)

    def _adapter(self, x: jax.Array) -> jax.Array:
        rank, fan_in = {"rank": self.lora.rank}, math.prod(self.inputs.values())
        wide = self._matrix("lora_a", initializer(None, fan_in), self.inputs, rank)
        # zero, so that training starts with the function of the base
        narrow = self._matrix("lora_b", nn.initializers.zeros, rank, self.outputs)
        x = nn.Dropout(self.lora.dropout, deterministic=not self.has_rng("dropout"))(x)
        low = project(x, wide, self.rules, len(self.inputs))  # [B, T, rank]
        return times(project(low, narrow, self.rules, 1, self.unrounded), self.lora.scale)


def hidden_linear(
    config: BlockConfig,
    rules: Rules,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    *,
    bias: bool,
    init_scale: float = 1.0,
    name: str | None = None,
) -> Linear:
    """A linear map inside the layers of a transformer, by its config."""
    return Linear(
        inputs,
        outputs,
        rules,
        bias=bias,
        dtype=jnp.dtype(config.dtype),
        init_std=config.init_std,
        init_scale=config.scaling.init("hidden", config.init_std) * init_scale,
        lora=config.lora,
        quantization=config.quantization,
        name=name,
    )
