"""Vector quantization (arXiv:1711.00937): a codebook by gradient or by averages of its latents.

The state of a run is its parameters, so the averages are parameters. What is called their gradient
is `n * (1 - decay) * average - statistics`, sums over rows in float32 that add up over devices and
micro-batches; divided by the number n of all rows, and subtracted as it is (the role `running` of
`lm.optim.chain`), it leaves exactly `decay * average + (1 - decay) * mean of the batch`.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.layers.linear import parameter
from lm.types import Array

_EXACT = jax.lax.Precision.HIGHEST
_FIRST_USE = 0.01  # of an average code: less than any limit, so that latents are the first codes
_OFFERS = 0.5  # latents of a global batch that a dead code is offered, on average


class Quantized(NamedTuple):
    """Latents as codes."""

    ids: Array  # int32 [B, P]
    latents: Array  # [B, P, D]: the codes, with the gradient of what they stand for
    commitment: Array  # float32 [B]: mean squared distance, for the encoder
    codebook: Array  # float32 [B]: the same, for the codes; 0 where they are averages
    bookkeeping: Array  # float32 []: of value 0, with the gradients of the averages


class Codebook(nn.Module):
    """The nearest of `num_codes` codes for each latent, by squared distance in float32.

    Parameters: `running_count` [K], a running average of each code's share of all latents, and, by
    `average`, `running_sum` [K, D], of the sums of these latents, whose quotient is the code; by
    gradient, `weight` [K, D] and `running_shift` [K, D], their sum being the code.

    A code whose share is below `revive_below` of the average one is dead. In training it is offered
    latents, drawn by the hashes of the batch's records, one in two steps on average, which count as
    its own, as many as an average code has: so the running average is led to them at once. Codes by
    gradient are moved there. All codes begin dead.
    """

    num_codes: int
    code_dim: int
    average: bool
    decay: float
    revive_below: float

    def setup(self) -> None:
        shape, axes = (self.num_codes, self.code_dim), (None, None)
        first, normal = _FIRST_USE / self.num_codes, nn.initializers.normal
        constant = nn.initializers.constant(first)
        self.running_count = parameter(self, "running_count", constant, shape[:1], axes[:1])
        if self.average:
            self.running_sum = parameter(self, "running_sum", normal(first), shape, axes)
        else:
            self.weight = parameter(self, "weight", normal(1.0), shape, axes)
            self.running_shift = parameter(
                self, "running_shift", nn.initializers.zeros, shape, axes
            )

    @property
    def codes(self) -> jax.Array:
        """float32 [K, D]."""
        if self.average:
            return self.running_sum / jnp.maximum(self.running_count, 1e-30)[:, None]
        return self.weight + self.running_shift

    def nearest(self, latents: Array) -> jax.Array:
        """latents: [B, P, D] -> int32 [B, P]."""
        codes = self.codes
        products = jnp.einsum("bpd,kd->bpk", latents.astype(jnp.float32), codes, precision=_EXACT)
        return jnp.argmin(jnp.sum(codes**2, axis=1) - 2 * products, axis=-1).astype(jnp.int32)

    def lookup(self, ids: Array, dtype: jnp.dtype) -> jax.Array:
        """ids: int32 [B, P] -> [B, P, D]."""
        return jnp.take(self.codes, ids, axis=0).astype(dtype)

    def quantize(
        self, latents: Array, weights: Array, records: Array | None, batch_size: int
    ) -> Quantized:
        """latents: [B, P, D], of rows of these weights: float32 [B].

        records: uint32 [B], the hash of each row of a training step; None: no code is revived.
        batch_size: the rows of a global batch.
        """
        stop, wide = jax.lax.stop_gradient, latents.astype(jnp.float32)
        ids = self.nearest(stop(latents))
        codes = jnp.take(self.codes, ids, axis=0)  # float32 [B, P, D]
        commitment = jnp.mean(jnp.square(wide - stop(codes)), axis=(1, 2))
        codebook = jnp.zeros_like(commitment)
        if not self.average:
            of_gradient = jnp.take(self.weight + stop(self.running_shift), ids, axis=0)
            codebook = jnp.mean(jnp.square(stop(wide) - of_gradient), axis=(1, 2))
        bookkeeping = self._averages(stop(wide), ids, weights, records, batch_size)
        through = latents + stop(codes - wide).astype(latents.dtype)  # the gradient straight on
        return Quantized(ids, through, commitment, codebook, bookkeeping)

    def _averages(
        self, latents: Array, ids: Array, weights: Array, records: Array | None, batch_size: int
    ) -> jax.Array:
        """A number of value 0, whose gradients by the averages are those of the module's text."""
        k, positions, rate = self.num_codes, latents.shape[1], 1 - self.decay
        uses = jax.nn.one_hot(ids, k) * (weights[:, None, None] / positions)  # [B, P, K]
        offers, codes = None, self.codes
        if self.revive_below and records is not None:
            offers = self._offers(records, positions, batch_size)
            # one offer is the use of an average code: 1 / K of all rows
            uses = uses + offers * (batch_size / (k * rate))
        uses, weight = jax.lax.stop_gradient((uses, jnp.sum(weights)))

        def term(average: Array, statistics: Array) -> jax.Array:
            """A term whose gradient is rate * (weight * average - statistics)."""
            own = weight * jnp.sum(jnp.square(average)) / 2 - jnp.sum(statistics * average)
            return rate * own

        total = term(self.running_count, jnp.sum(uses, axis=(0, 1)))
        if self.average:
            sums = jnp.einsum("bpk,bpd->kd", uses, latents, precision=_EXACT)
            total = total + term(self.running_sum, sums)
        elif offers is not None:
            there = jnp.einsum("bpk,bpd->kd", offers, latents, precision=_EXACT)
            way = there - jnp.sum(offers, axis=(0, 1))[:, None] * codes
            way = jax.lax.stop_gradient(way) * batch_size  # the division by rows undoes it
            total = total - jnp.sum(way * self.running_shift)
        return total - jax.lax.stop_gradient(total)

    def _offers(self, records: Array, positions: int, batch_size: int) -> jax.Array:
        """float32 [B, P, K]: 1 where a latent is offered to a dead code. A latent is offered once
        at most.

        A function of each row and the parameters: all micro-batches and devices agree, and together
        offer as many as the whole batch.
        """
        is_dead = self.running_count < self.revive_below / self.num_codes
        dead_first, num_dead = jnp.argsort(~is_dead), jnp.sum(is_dead)  # stable

        def draw(record: Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(0), record)
            return jax.random.uniform(key, (2, positions))

        draws = jax.vmap(draw)(records)  # [B, 2, P]
        is_offered = draws[:, 0] * (batch_size * positions) < _OFFERS * num_dead
        rank = jnp.minimum((draws[:, 1] * num_dead).astype(jnp.int32), num_dead - 1)
        code = jnp.where(is_offered, dead_first[rank], -1)
        return jax.lax.stop_gradient(jax.nn.one_hot(code, self.num_codes))
