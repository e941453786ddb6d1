"""Linear maps with named parameters and logical axes."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.layers.lora import LoraConfig
from lm.parallel.sharding import Rules
from lm.types import Array


def initializer(std: float | None, fan_in: int, scale: float = 1.0) -> Any:
    """Normal weights of deviation `scale * std`, or `scale / sqrt(fan_in)` where `std` is None."""
    return nn.initializers.normal(scale * (fan_in**-0.5 if std is None else std))


def parameter(
    module: nn.Module, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """A parameter of `module` whose dimensions have the logical names `axes`."""
    value: Any = module.param(name, nn.with_partitioning(init, axes), shape)
    return value


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_product(dim: int, x: Array, weight: Array) -> jax.Array:
    """The float32 sums that the product of x and weight is made of, without rounding them to the
    type of both: [..., D] with dimension `dim` of a matrix.

    Its own gradient: the cotangent is rounded to the type of x, so that the two products of the
    backward pass are as fast as those of the same type, as they are for a rounded result.
    """
    over = (((x.ndim - 1,), (dim,)), ((), ()))
    return jax.lax.dot_general(x, weight, over, preferred_element_type=jnp.float32)


def _product_forward(dim: int, x: Any, weight: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    # what is frozen is spared the product that would be its gradient
    kept = (x.value if weight.perturbed else None, weight.value if x.perturbed else None)
    return float32_product(dim, x.value, weight.value), kept


def _product_backward(dim: int, residuals: tuple[Any, Any], dy: Any) -> tuple[Any, Any]:
    x, weight = residuals
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
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
    """y = x W (+ b) over the last `len(in_shape)` dimensions of x, which follow [B, T].

    Parameters: `weight` [*in_shape, *out_shape], `bias` [*out_shape], and, where `lora` has its
    name among the targets, `lora_a` [*in_shape, rank], `lora_b` [rank, *out_shape]. The adapter's
    dropout is on where there is a generator for `dropout`: in training.

    y has the type `dtype`, or, `unrounded`, the float32 that products are summed in.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str | None, ...]
    out_axes: tuple[str | None, ...]
    rules: Rules
    bias: bool = False
    dtype: Any = jnp.float32
    init_std: float | None = None
    init_scale: float = 1.0
    lora: LoraConfig = LoraConfig()
    unrounded: bool = False

    def _project(self, x: jax.Array, weight: jax.Array, num_in: int = 1) -> jax.Array:
        return project(x, weight, self.rules, num_in, self.unrounded)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.in_shape, *self.out_shape)
        init = initializer(self.init_std, math.prod(self.in_shape), self.init_scale)
        axes = (*self.in_axes, *self.out_axes)
        weight = parameter(self, "weight", init, shape, axes).astype(self.dtype)
        y = self._project(x, self.rules.collect(weight, *axes), len(self.in_shape))
        if self.bias:
            zeros = nn.initializers.zeros
            bias = parameter(self, "bias", zeros, self.out_shape, self.out_axes)
            y = y + broadcast_as(bias, y)
        if self.lora.rank and self.name in self.lora.targets:
            y = y + self._adapter(x)
        return y

    def _adapter(self, x: jax.Array) -> jax.Array:
        rank, fan_in = self.lora.rank, math.prod(self.in_shape)
        axes = (*self.in_axes, "rank"), ("rank", *self.out_axes)
        wide = parameter(self, "lora_a", initializer(None, fan_in), (*self.in_shape, rank), axes[0])
        # zero, so that training begins with the function of the base
        zeros = nn.initializers.zeros
        narrow = parameter(self, "lora_b", zeros, (rank, *self.out_shape), axes[1])
        wide, narrow = (
            self.rules.collect(w.astype(self.dtype), *names)
            for w, names in zip((wide, narrow), axes, strict=True)
        )
        x = nn.Dropout(self.lora.dropout, deterministic=not self.has_rng("dropout"))(x)
        low = project(x, wide, self.rules, len(self.in_shape))  # [B, T, rank]
        return times(self._project(low, narrow), self.lora.scale)
