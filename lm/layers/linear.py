"""Linear maps with named parameters and logical axes."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.sharding import Rules


def initializer(std: float | None, fan_in: int, scale: float = 1.0) -> Any:
    """Normal weights of deviation `scale * std`, or `scale / sqrt(fan_in)` where `std` is None."""
    return nn.initializers.normal(scale * (fan_in**-0.5 if std is None else std))


def parameter(
    module: nn.Module, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """A parameter of `module` whose dimensions have the logical names `axes`."""
    value: Any = module.param(name, nn.with_partitioning(init, axes), shape)
    return value


def project(x: jax.Array, weight: jax.Array, rules: Rules, num_in: int = 1) -> jax.Array:
    """x: [B, T, *in] times weight: [*in, *out] -> [B, T, *out].

    One matrix product on rows flattened to [B * T, in]: XLA's CPU products and their gradients are
    much faster in two dimensions, and on other platforms the reshape is free. Not where the length
    is sharded: merging two sharded dimensions would gather one of them.
    """
    lead, inner, outer = x.shape[:-num_in], weight.shape[:num_in], weight.shape[num_in:]
    flat = weight.reshape(math.prod(inner), math.prod(outer))
    x = x.reshape(*lead, flat.shape[0])
    y = (x.reshape(-1, flat.shape[0]) if rules.size("length") == 1 else x) @ flat
    return y.reshape(*lead, *outer)


class Linear(nn.Module):
    """y = x W (+ b) over the last `len(in_shape)` dimensions of x, which follow [B, T].

    Parameters: `weight` [*in_shape, *out_shape], `bias` [*out_shape].
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.in_shape, *self.out_shape)
        init = initializer(self.init_std, math.prod(self.in_shape), self.init_scale)
        axes = (*self.in_axes, *self.out_axes)
        weight = parameter(self, "weight", init, shape, axes).astype(self.dtype)
        y = project(x, self.rules.collect(weight, *axes), self.rules, len(self.in_shape))
        if self.bias:
            zeros = nn.initializers.zeros
            bias = parameter(self, "bias", zeros, self.out_shape, self.out_axes)
            y = y + bias.astype(self.dtype)
        return y
