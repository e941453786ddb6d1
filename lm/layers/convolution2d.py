"""Convolutions over the height and width of pictures."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.layers.linear import broadcast_as, initializer, matrix, parameter
from lm.parallel.sharding import Rules
from lm.types import Array

_LAYOUT = ("NHWC", "IHWO", "NHWC")


class Convolution2d(nn.Module):
    """y = x * W + b over x: [B, height, width, in], padded with zeros to `1 / stride` of its size.

    inputs, outputs: the logical axis and the size of the channels. Parameters: `weight`
    [in, kernel_size, kernel_size, out] and `bias` [out].
    """

    inputs: tuple[str, int]
    outputs: tuple[str, int]
    kernel_size: int
    rules: Rules
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """x: [B, height, width, in] -> [B, height / stride, width / stride, out]."""
        (in_axis, num_in), (out_axis, num_out) = self.inputs, self.outputs
        size, axes = self.kernel_size, (in_axis, "taps", "taps", out_axis)
        init = initializer(None, num_in * size**2)
        shape = (num_in, size, size, num_out)
        value, total = matrix(parameter(self, "weight", init, shape, axes), self.dtype, self.rules)
        # as FSDP does: left to the compiler, the channels of x may be sharded instead of the batch
        value = self.rules.constrain(value, *(None if a == "embed" else a for a in axes))
        y: Any = _convolve(self.stride, x, value, total)
        bias = parameter(self, "bias", nn.initializers.zeros, (num_out,), (out_axis,))
        return self.rules.constrain(y + broadcast_as(bias, y), "act_batch", None, None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(stride: int, x: Array, weight: Array, total: Array | None = None) -> jax.Array:
    """Its own gradient: `total`, as in `lm.layers.linear.product`, receives that of weight as a
    sum in float32, which a rounded one of devices is not.
    """
    del total
    return _windows(stride, x, weight)


def _windows(stride: int, x: Array, weight: Array) -> jax.Array:
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(x, weight, strides, "SAME", dimension_numbers=_LAYOUT)


def _forward(
    stride: int, x: Array, weight: Array, total: Array | None
) -> tuple[jax.Array, tuple[Array, Array, bool]]:
    return _windows(stride, x, weight), (x, weight, total is not None)


def _backward(
    stride: int, kept: tuple[Array, Array, bool], dy: Array
) -> tuple[Array, Array | None, Array | None]:
    x, weight, in_total = kept
    [dx] = jax.linear_transpose(lambda x: _windows(stride, x, weight), x)(dy)
    # numbers of the compute type as float32, whose products are the same and sums unrounded
    wide = x.astype(jnp.float32)
    of_weight = jax.linear_transpose(
        lambda w: _windows(stride, wide, w), weight.astype(jnp.float32)
    )
    [d_weight] = of_weight(dy.astype(jnp.float32))
    return (dx, None, d_weight) if in_total else (dx, d_weight.astype(weight.dtype), None)


_convolve.defvjp(_forward, _backward)


def depth_to_space(x: Array, factor: int) -> jax.Array:
    """x: [B, height, width, factor ** 2 * C] -> [B, factor * height, factor * width, C]."""
    batch, height, width, depth = x.shape
    x = x.reshape(batch, height, width, factor, factor, depth // factor**2)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, height, factor, width, factor, C]
    return x.reshape(batch, factor * height, factor * width, depth // factor**2)
