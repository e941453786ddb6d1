"""Linear maps with named parameters and logical axes."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.layers.lora import LoraConfig
from lm.sharding import Rules
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


def project_gates(x: Array, weight: Array, rules: Rules) -> jax.Array:
    """x: [..., D] times weight: [D, G, F] -> [..., G, F], F on the logical axis `mlp`."""
    if rules.size("mlp") > 1 or rules.size("length") > 1:  # merging would gather what is sharded
        return jnp.tensordot(x, weight, 1)
    # two dimensions, as in `project`
    flat = x.reshape(-1, x.shape[-1]) @ weight.reshape(weight.shape[0], -1)
    return flat.reshape(*x.shape[:-1], *weight.shape[1:])


def times(x: jax.Array, factor: float) -> jax.Array:
    """x * factor, in the type of x."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


class Linear(nn.Module):
    """y = x W (+ b) over the last `len(in_shape)` dimensions of x, which follow [B, T].

    Parameters: `weight` [*in_shape, *out_shape], `bias` [*out_shape], and, where `lora` has its
    name among the targets, `lora_a` [*in_shape, rank], `lora_b` [rank, *out_shape]. The adapter's
    dropout is on where there is a generator for `dropout`: in training.
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
        return project(low, narrow, self.rules) * jnp.asarray(self.lora.scale, self.dtype)
