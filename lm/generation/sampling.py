"""Sampling of the next token: temperature, and filters that keep the likeliest tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.types import Array

# Bounds of factors on logits. Beyond some 1e38 either way they are 0 or infinite in float32, and
# make NaN of masked logits.
SMALLEST, LARGEST = 1e-6, 1e6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Continuation of prompts by sampling.

    The filters apply in the order top_k, top_p, min_p, each to the tokens left by the one before.
    top_p keeps the smallest set of most likely tokens with this probability (arXiv:1904.09751), and
    all that are as likely as its last; min_p keeps those at least this many times as likely as
    the best (arXiv:2407.01082).
    """

    temperature: float = 1.0  # divides the logits, 1e-6 to 1e6; 0: greedy
    top_k: int = 0  # most likely tokens that are kept; 0: all
    top_p: float = 1.0  # 1e-6 to 1
    min_p: float = 0.0
    # 1e-6 to 1e6; above 1: tokens that came before, in the prompt or since, are less likely
    repetition_penalty: float = 1.0
    num_samples: int = 1  # continuations of each prompt
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end a continuation, and are left out of it

    def __post_init__(self) -> None:
        temperature, factor = self.temperature, f"in [{SMALLEST:g}, {LARGEST:g}]"
        is_valid = temperature == 0 or SMALLEST <= temperature <= LARGEST
        for name, good, wanted in (
            ("temperature", is_valid, f"0, which is greedy, or {factor}"),
            ("top_k", self.top_k >= 0, "positive, or 0 for all"),
            ("top_p", SMALLEST <= self.top_p <= 1, f"in [{SMALLEST:g}, 1]"),
            ("repetition_penalty", SMALLEST <= self.repetition_penalty <= LARGEST, factor),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("num_samples", self.num_samples > 0, "positive"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2**32)"),
            ("stop", "" not in self.stop, "without empty strings, which end a text at once"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


def penalize(scores: Array, seen: Array, penalty: Array) -> jax.Array:
    """scores: [..., V] with those of tokens seen: bool [..., V] divided by `penalty` where positive
    and multiplied where negative (arXiv:1909.05858, section 4.1, for scores of either sign).
    """
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose(logits: Array, keys: Array, values: Array, *, top_k: int, nucleus: bool) -> jax.Array:
    """Sampled ids, int32 [B], of logits: float32 [B, V].

    values: temperature, top_p (read with `nucleus`), min_p. A draw is the argmax of logits plus
    Gumbel noise from keys: [B]. The vocabulary is never sorted: that takes longer on a CPU than the
    step of a small model.
    """
    if top_k == 1:
        return jnp.argmax(logits, axis=1)
    temperature, top_p, min_p = values
    ids = None
    if top_k:
        logits, ids = jax.lax.top_k(logits, top_k)
    logits = (logits - jnp.max(logits, axis=1, keepdims=True)) / temperature
    if nucleus:
        logits = jnp.where(_nucleus(jax.nn.softmax(logits), top_p), logits, -jnp.inf)
    logits = jnp.where(logits >= jnp.log(min_p), logits, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    place = jnp.argmax(logits + noise, axis=1)
    return place if ids is None else jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]


def _nucleus(probabilities: Array, top_p: Array) -> jax.Array:
    """bool [B, V]: the fewest largest probabilities that sum to `top_p`, and ties with the least.

    The least is the highest threshold that leaves enough. Floats that aren't negative are ordered
    like their bits, so 30 halvings between the bits of 0 and of 1 find it exactly.
    """
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        left = jnp.sum(jnp.where(bits >= middle[:, None], probabilities, 0), axis=1)
        enough = left >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(bits.shape[:1], jnp.int32)
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, 0x3F800001)))  # above 1.0
    return bits >= low[:, None]
