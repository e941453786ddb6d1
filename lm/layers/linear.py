"""Linear maps with named parameters and logical axes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_product(dim: int, x: Array, weight: Array) -> jax.Array:
    """The product of x: [..., D] with dimension `dim` of a matrix, in float32: its sums are not
    rounded to the type of both.

    Its own gradient: the cotangent is rounded to the type of x, so that the two products of the
    backward pass are as fast as those of the same type, as they are for a rounded result.
    """
    over = (((x.ndim - 1,), (dim,)), ((), ()))
    return jax.lax.dot_general(x, weight, over, preferred_element_type=jnp.float32)


Kept: TypeAlias = tuple[Array | None, Array | None]  # x and the weight, or their gradients


def _product_forward(
    dim: int, x: CustomVJPPrimal, weight: CustomVJPPrimal
) -> tuple[jax.Array, Kept]:
    # what is frozen is spared the product that would be its gradient
    kept = (x.value if weight.perturbed else None, weight.value if x.perturbed else None)
    return float32_product(dim, x.value, weight.value), kept


def _product_backward(dim: int, kept: Kept, dy: Array | SymbolicZero) -> Kept:
    x, weight = kept
    if isinstance(dy, SymbolicZero):
        return None, None
    dx = d_weight = None
    if weight is not None:
        dx = jax.lax.dot_general(
            dy.astype(weight.dtype), weight, (((dy.ndim - 1,), (1 - dim,)), ((), ()))
        )
    if x is not None:
        rows = tuple(range(dy.ndim - 1))
        pair = (x, dy.astype(x.dtype)) if dim == 0 else (dy.astype(x.dtype), x)
        d_weight = jax.lax.dot_general(*pair, ((rows, rows), ((), ())))
    return dx, d_weight


float32_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def project(
    x: jax.Array, weight: jax.Array, rules: Rules, num_in: int = 1, unrounded: bool = False
) -> jax.Array:
    """x: [B, T, *in] times weight: [*in, *out] -> [B, T, *out], in their type, or `unrounded`
    float32.

    One matrix product on rows flattened to [B * T, in]: XLA's CPU products and their gradients are
    much faster in two dimensions, and on other platforms the reshape is free. Not where the length
    is sharded: merging two sharded dimensions would gather one of them.
    """
    lead, inner, outer = x.shape[:-num_in], weight.shape[:num_in], weight.shape[num_in:]
    flat = weight.reshape(math.prod(inner), math.prod(outer))
    x = x.reshape(*lead, flat.shape[0])
    x = x.reshape(-1, flat.shape[0]) if rules.size("length") == 1 else x
    y: Any = float32_product(0, x, flat) if unrounded else x @ flat
    return y.reshape(*lead, *outer)


def project_gates(x: Array, weight: Array, rules: Rules) -> jax.Array:
    """x: [..., D] times weight: [D, G, F] -> [..., G, F], F on the logical axis `mlp`."""
    if rules.size("mlp") > 1 or rules.size("length") > 1:  # merging would gather what is sharded
        return jnp.tensordot(x, weight, 1)
    # two dimensions, as in `project`
    flat = x.reshape(-1, x.shape[-1]) @ weight.reshape(weight.shape[0], -1)
    return flat.reshape(*x.shape[:-1], *weight.shape[1:])


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

    y has the type `dtype`, or, `unrounded`, the float32 that products are summed in.
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = initializer(self.init_std, math.prod(self.inputs.values()), self.init_scale)
        weight = self._matrix("weight", init, self.inputs, self.outputs)
        y = project(x, weight, self.rules, len(self.inputs), self.unrounded)
        if self.bias:
            shape, axes = tuple(self.outputs.values()), tuple(self.outputs)
            y = y + broadcast_as(parameter(self, "bias", nn.initializers.zeros, shape, axes), y)
        if self.lora.rank and self.name in self.lora.targets:
            y = y + self._adapter(x)
        return y

    def _matrix(
        self, name: str, init: Initializer, inputs: Mapping[str, int], outputs: Mapping[str, int]
    ) -> jax.Array:
        """A parameter in the compute type, collected from the devices that share it."""
        shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        return self.rules.collect(
            parameter(self, name, init, shape, axes).astype(self.dtype), *axes
        )

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
        name=name,
    )
