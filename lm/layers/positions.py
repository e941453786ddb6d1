"""Positional encodings: rotary (arXiv:2104.09864), sinusoidal (arXiv:1706.03762), T5 relative
(arXiv:1910.10683), ALiBi (arXiv:2108.12409). Learned absolute positions are an `Embedding`.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.config.fields import field
from lm.layers.linear import parameter

SCALINGS = ("none", "linear", "llama3", "yarn")
KINDS = ("rotary", "learned", "sinusoidal", "relative", "alibi", "none")


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    theta: float = field(10_000.0, "Base of the wavelengths.", gt=0)
    local_theta: float | None = field(
        None, "Base in local layers, unscaled; unset: as in global ones.", gt=0
    )
    scaling: str = field("none", "Scaling beyond the original length.", choices=SCALINGS)
    factor: float = field(1.0, "How many times the original length is wanted.", gt=0)
    original_length: int = field(8192, "Length that the model was first trained on.", ge=1)
    low_frequency_factor: float = field(
        1.0, "llama3: wavelengths longer than length/this are scaled.", gt=0
    )
    high_frequency_factor: float = field(
        4.0, "llama3: wavelengths shorter than length/this are kept.", gt=0
    )
    beta_fast: float = field(
        32.0, "yarn: rotations over the original length above which to keep.", gt=0
    )
    beta_slow: float = field(1.0, "yarn: rotations below which to interpolate fully.", gt=0)


def rotary_frequencies(
    config: RotaryConfig, head_dim: int, local: bool
) -> tuple[np.ndarray, float]:
    """Radians per position [H/2], and the factor on cos and sin (YaRN's temperature, else 1).

    Llama 3: wavelengths above `original_length / low_frequency_factor` are stretched by `factor`,
    those below `original_length / high_frequency_factor` kept, linear in between. YaRN
    (arXiv:2309.00071, eq. 23 and section 3.4): the same between dimensions that turn `beta_slow`
    and `beta_fast` times, and 0.1 ln(factor) + 1 on the magnitudes.
    """
    own_theta = local and config.local_theta is not None
    theta = config.local_theta if own_theta else config.theta
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = np.asarray(theta, np.float64) ** -exponents
    scaling, factor, magnitude = "none" if own_theta else config.scaling, config.factor, 1.0

    def dimension(turns: float) -> float:  # at which a frequency turns so often over the length
        wavelength = config.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(config.theta))

    if scaling == "linear":
        frequencies = frequencies / factor
    elif scaling == "llama3":
        turns = config.original_length * frequencies / (2 * np.pi)
        low, high = config.low_frequency_factor, config.high_frequency_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (keep + (1 - keep) / factor)
    elif scaling == "yarn":
        first = max(math.floor(dimension(config.beta_fast)), 0)
        last = min(math.ceil(dimension(config.beta_slow)), head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)
        frequencies = frequencies * (1 - ramp) + frequencies / factor * ramp
        magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return frequencies.astype(np.float32), magnitude


def rotary_tables(
    positions: jax.Array, frequencies: np.ndarray, magnitude: float
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32 [B, T, H/2], of positions: int32 [B, T]."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


@jax.custom_vjp
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x: [B, T, N, H] with its two halves turned by the angles of cos, sin: [B, T, H/2], which get
    no gradient.

    The halves are swapped in the type of x, and nothing is cut: on TPU, half a head fills half a
    tile, and arrays of halves, in float32 for the gradient, were the largest of a layer.
    """
    cos = jnp.concatenate([cos, cos], axis=-1)[:, :, None]  # [B, T, 1, H]
    sin = jnp.concatenate([-sin, sin], axis=-1)[:, :, None]
    swapped = jnp.roll(x, x.shape[-1] // 2, axis=-1)
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)


rotate.defvjp(
    lambda x, cos, sin: (rotate(x, cos, sin), (cos, sin)),
    lambda tables, dy: (rotate(dy, tables[0], -tables[1]), None, None),
)


def sinusoids(positions: jax.Array, embed_dim: int) -> jax.Array:
    """float32 [B, T, D]: sin in the first half of the features, cos in the second."""
    rates = np.exp(-np.log(10_000.0) * np.arange(embed_dim // 2) / max(embed_dim // 2 - 1, 1))
    angles = positions[..., None].astype(jnp.float32) * rates.astype(np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """float32 [N]: 2^(-8 i / N), with the published interleaving where N is no power of two."""

    def power_of_two(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    whole = 2 ** int(math.log2(num_heads))
    slopes = power_of_two(whole) + power_of_two(2 * whole)[0::2][: num_heads - whole]
    return np.asarray(slopes, np.float32)


def relative_buckets(
    distance: jax.Array, num_buckets: int, max_distance: int, bidirectional: bool
) -> jax.Array:
    """T5's bucket of distance = key position - query position: int32, same shape.

    Half of the buckets are exact, the rest logarithmic up to `max_distance`; with `bidirectional`
    each direction has half.
    """
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(
        max_distance / exact
    )
    far = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return bucket + jnp.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """T5's learned bias by bucketed distance. Parameters: `weight` [buckets, N]."""

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    @nn.compact
    def __call__(self, distance: jax.Array) -> jax.Array:
        """distance: int32 [..., T, S] -> float32 [..., N, T, S]."""
        init = nn.initializers.normal(self.num_heads**-0.5)
        shape = (self.num_buckets, self.num_heads)
        weight = parameter(self, "weight", init, shape, (None, "heads"))
        buckets = relative_buckets(
            distance, self.num_buckets, self.max_distance, self.bidirectional
        )
        return jnp.moveaxis(weight[buckets], -1, -3)
