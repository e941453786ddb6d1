"""SeqGAN (arXiv:1609.05473): an LSTM that generates sequences, and a convolutional network that
tells them from those of the data (arXiv:1408.5882, with a highway layer).

Parameters lie below `generator` and `discriminator`, which an optimizer can treat apart
(lm.optim.optimizers.adversarial). `lm.objectives.seqgan` documents training and evaluation. Draws
are by a key for each row, whatever batch, device or micro-batch it is in.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.data import oracle
from lm.layers import recurrent
from lm.layers.base_config import require
from lm.layers.cross_entropy import token_nll
from lm.layers.embedding import Embedding
from lm.layers.linear import Linear
from lm.models import lstm
from lm.models.lstm import LanguageModel
from lm.models.vocabulary import check_unsharded
from lm.parallel.sharding import Rules
from lm.types import Array, Batch, Cache, Output, Params, Sums, Tokens


@dataclasses.dataclass(frozen=True)
class Config(lstm.Config):
    max_length: int = field(20, "Tokens of a sequence; config.data.length.", ge=2)
    tie_embeddings: bool = field(False, "The vocabulary projection is the embedding.")
    widths: tuple[int, ...] = field(
        (1, 2, 3, 4, 5, 8), "Tokens that the convolutions of the discriminator span.", ge=1
    )
    filters: tuple[int, ...] = field((64,) * 6, "Filters of each width.", ge=1)
    discriminator_dim: int = field(64, "Width of the discriminator's embeddings.", ge=1)
    discriminator_dropout: float = field(
        0.25, "Dropout before the discriminator's last projection.", ge=0, lt=1
    )
    dtype: str = field(
        "float32", "Compute type: draws are compared bit by bit.", choices=("float32",)
    )

    def check(self, length: int) -> None:
        """As `BaseConfig.check`."""
        super().check(length)
        require(
            length == self.max_length,
            f"max_length ({self.max_length}) must be config.data.length ({length}): the "
            "discriminator reads whole sequences",
        )
        require(
            0 < max(self.widths, default=0) <= length,
            f"widths {self.widths} must be some of 1 to config.data.length ({length})",
        )
        require(
            len(self.filters) == len(self.widths),
            f"filters {self.filters} must be as many numbers as widths {self.widths}",
        )


class Discriminator(nn.Module):
    """Parameters: `embedding`, `conv0` ... by the order of `widths`, `highway`, `real`."""

    config: Config
    rules: Rules

    @nn.compact
    def __call__(self, ids: Array, train: bool) -> jax.Array:
        """ids: int32 [B, T] -> logits that they are data, float32 [B]."""
        c, rules = self.config, self.rules
        init_std = 3**-0.5  # of U(-1, 1), as the authors begin
        table = Embedding(
            c.vocab_size, c.discriminator_dim, rules, init_std=init_std, name="embedding"
        )
        x, found = table(ids), []
        for i, (width, size) in enumerate(zip(c.widths, c.filters, strict=True)):
            count = ids.shape[1] - width + 1
            windows = jnp.stack([x[:, j : j + count] for j in range(width)], axis=2)
            inputs = {"taps": width, "embed": c.discriminator_dim}
            linear = Linear(inputs, {"mlp": size}, rules, bias=True, name=f"conv{i}")
            found.append(jnp.max(nn.relu(linear(windows)), axis=1))
        x = jnp.concatenate(found, axis=-1)[:, None]  # [B, 1, F]
        inner = {"embed": x.shape[-1]}
        both = Linear(inner, {"gates": 2, "mlp": x.shape[-1]}, rules, bias=True, name="highway")(x)
        share = jax.nn.sigmoid(both[..., 0, :] - 2)  # carries most of x on at first
        x = share * nn.relu(both[..., 1, :]) + (1 - share) * x
        x = nn.Dropout(c.discriminator_dropout, deterministic=not train)(x)
        logits = Linear(inner, {"channels": 1}, rules, bias=True, unrounded=True, name="real")(x)
        return logits[:, 0, 0]


class SeqGan(nn.Module):
    """The model. Parameters: `generator`, those of `lm.models.lstm`, and `discriminator`.

    Called as any model, it is the generator.
    """

    config: Config
    rules: Rules
    num_pipeline_microbatches = 1
    head_params = ("generator",)

    def setup(self) -> None:
        self.generator = LanguageModel(self.config, self.rules)
        self.discriminator = Discriminator(self.config, self.rules)

    def __call__(
        self,
        inputs: Tokens,
        *,
        encoder: Tokens | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Output:
        """As `LanguageModel`."""
        if self.is_initializing():
            shape = inputs.ids.shape[0], self.config.max_length
            self.discriminator(jnp.zeros(shape, jnp.int32), False)
        return self.generator(inputs, encoder=encoder, cache=cache, train=train)

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, T, D] -> float32 [B, T, V]."""
        return self.generator.logits(hidden)

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """As `LanguageModel`."""
        return self.generator.init_cache(batch_size, length)

    def discriminate(self, ids: Array, train: bool = False) -> jax.Array:
        """As `Discriminator`."""
        return self.discriminator(ids, train)

    # Functions of the parameters: modules can't be called inside of `lax.scan` and `lax.switch`.

    @nn.nowrap
    def _apply(self, params: Params, *args: Any, **options: Any) -> Any:
        return self.apply({"params": params}, *args, **options)

    @nn.nowrap
    def losses(
        self,
        params: Params,
        batch: Batch,
        rng: Array,
        *,
        phase: Array,
        num_rollouts: int,
        subtract_prefix: bool,
    ) -> tuple[jax.Array, Sums]:
        """(SUM to differentiate, additive sums) of a training step. phase: int32 [], 0 maximum
        likelihood, 1 discriminator, 2 policy gradient.
        """
        keys, start = row_keys(batch), batch.inputs.ids[:, 0]
        weights, of_row, length = batch.weights, batch.weights[:, 0], batch.targets.shape[1]
        tokens = jnp.sum(weights)
        names = ("loss/discriminator", "accuracy/discriminator", "loss/policy", "reward/policy")
        none = dict.fromkeys((*names, "tokens/discriminator", "tokens/policy"), jnp.zeros(()))

        def nll_of_data(train: bool) -> jax.Array:
            nll = self._nll(params, batch.inputs, batch.targets, rng if train else None)
            return jnp.sum(weights * nll)

        def likelihood() -> tuple[jax.Array, Sums]:
            nll = nll_of_data(True)
            return nll, {**none, "loss": nll}

        def discriminator() -> tuple[jax.Array, Sums]:
            fake = self.complete(params, keys, start)

            def logits(ids: Array, number: int) -> jax.Array:
                rngs = {"dropout": jax.random.fold_in(rng, number)}
                return self._apply(params, ids, True, rngs=rngs, method="discriminate")

            real, fakes = logits(batch.targets, 0), logits(fake, 1)
            # times length: a row has the weight of its tokens, which the gradient is divided by
            loss = length / 2 * jnp.sum(of_row * (jax.nn.softplus(-real) + jax.nn.softplus(fakes)))
            right = (real > 0).astype(jnp.float32) + (fakes <= 0)
            own = {
                "loss": nll_of_data(False),
                "loss/discriminator": loss,
                "accuracy/discriminator": length / 2 * jnp.sum(of_row * right),
                "tokens/discriminator": tokens,
            }
            return loss, none | own

        def policy() -> tuple[jax.Array, Sums]:
            fake = self.complete(params, keys, start)
            values = self._values(params, keys, start, fake, num_rollouts)  # [B, T + 1]
            advantages = values[:, 1:] - (values[:, :-1] if subtract_prefix else 0)
            inputs = dataclasses.replace(batch.inputs, ids=shifted(fake, start))
            nll = self._nll(params, inputs, fake)
            loss = jnp.sum(weights * jax.lax.stop_gradient(advantages) * nll)
            own = {
                "loss": nll_of_data(False),
                "loss/policy": loss,
                "reward/policy": length * jnp.sum(of_row * values[:, -1]),
                "tokens/policy": tokens,
            }
            return loss, none | own

        loss, sums = jax.lax.switch(phase, (likelihood, discriminator, policy))
        return loss, {"tokens": tokens, **jax.lax.stop_gradient(sums)}

    @nn.nowrap
    def figures(
        self, params: Params, batch: Batch, *, temperatures: tuple[float, ...]
    ) -> tuple[jax.Array, Sums]:
        """(the nll of the data, additive sums) of an evaluation."""
        keys, start, weights = row_keys(batch), batch.inputs.ids[:, 0], batch.weights
        logits = self._logits(params, batch.inputs)
        real = self._apply(params, batch.targets, method="discriminate")

        def nll(temperature: float) -> jax.Array:
            return jnp.sum(weights * token_nll(logits / temperature, batch.targets)[0])

        def of_oracle(ids: Array) -> jax.Array:
            found = oracle_nll(self.config.vocab_size, shifted(ids, start), ids)
            return jnp.sum(weights * found)

        fake = self.complete(params, keys, start)
        fakes = self._apply(params, fake, method="discriminate")
        right = ((real > 0).astype(jnp.float32) + (fakes <= 0)) / 2
        sums = {
            "tokens": jnp.sum(weights),
            "loss": nll(1.0),
            "entropy": of_oracle(batch.targets),
            "oracle_nll": of_oracle(fake),
            "discriminator_accuracy": jnp.sum(weights * right[:, None]),
        }
        for temperature in temperatures:
            drawn = self.complete(params, keys, start, temperature=temperature)
            sums[f"oracle_nll/{temperature:g}"] = of_oracle(drawn)
            sums[f"loss/{temperature:g}"] = nll(temperature)
        return sums["loss"], sums

    @nn.nowrap
    def complete(
        self,
        params: Params,
        keys: Array,
        start: Array,
        given: Array | None = None,
        prefix: Array | None = None,
        temperature: float = 1.0,
    ) -> jax.Array:
        """Sequences of the generator, int32 [B, T], by keys [B], after the ids start: int32 [B].

        Their first `prefix`, int32 [B], tokens are those of given: [B, T]; unset: none is.
        """
        size, length = start.shape[0], self.config.max_length
        given = jnp.zeros((size, length), jnp.int32) if given is None else given
        prefix = jnp.zeros((size,), jnp.int32) if prefix is None else prefix
        ones = jnp.ones((size, 1), jnp.int32)
        draws = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)

        def step(
            carry: tuple[Cache, Array], x: tuple[Array, Array, Array]
        ) -> tuple[tuple[Cache, Array], Array]:
            (cache, token), (i, draw, known) = carry, x
            logits, cache = self._next(params, token[:, None], ones, ones * i, cache)
            chances = jnp.cumsum(jax.nn.softmax(logits / temperature), axis=1)
            # the number of ids whose cumulated chances are below the draw
            below = chances[:, :-1] < draw[:, None] * chances[:, -1:]
            token = jnp.where(i < prefix, known, jnp.sum(below, axis=1, dtype=jnp.int32))
            return (cache, token), token

        cache = self._apply(params, size, 0, method="init_cache")
        xs = (jnp.arange(length), draws.T, given.T)
        ids: Any = jax.lax.scan(step, (cache, start), xs)[1]
        return ids.T

    @nn.nowrap
    def _values(
        self, params: Params, keys: Array, start: Array, fake: Array, num_rollouts: int
    ) -> jax.Array:
        """The mean probability to be data, float32 [B, T + 1], that the discriminator gives to
        `num_rollouts` completions of the first 0, 1, ... T tokens of fake: [B, T].
        """
        size, length = fake.shape
        prefixes = jnp.arange(length)

        def each(x: Array) -> jax.Array:  # [B, ...] -> [B * T, ...]
            return jnp.repeat(x, length, axis=0)

        def real(ids: Array) -> jax.Array:
            return jax.nn.sigmoid(self._apply(params, ids, method="discriminate"))

        def add(total: Array, number: Array) -> tuple[Array, None]:
            numbers = 1 + number * length + prefixes
            own = jax.vmap(lambda k: jax.vmap(lambda n: jax.random.fold_in(k, n))(numbers))(keys)
            args = own.reshape(-1), each(start), each(fake), jnp.tile(prefixes, size)
            return total + real(self.complete(params, *args)), None

        zeros = jnp.zeros((size * length,))
        total: Any = jax.lax.scan(add, zeros, jnp.arange(num_rollouts))[0]
        means = total.reshape(size, length) / num_rollouts
        return jnp.concatenate([means, real(fake)[:, None]], axis=1)

    @nn.nowrap
    def _next(
        self, params: Params, ids: Array, segments: Array, positions: Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """(logits [B, V] after one more token, the cache)."""
        tokens = Tokens(ids, segments, positions)
        output = self._apply(params, tokens, cache=cache)
        logits = self._apply(params, output.hidden, method="logits")
        return logits[:, 0], output.cache

    @nn.nowrap
    def _logits(self, params: Params, inputs: Tokens, rng: Array | None = None) -> jax.Array:
        """float32 [B, T, V]; with the dropout of training by `rng`, if given."""
        options: dict[str, Any] = {}
        if rng is not None:
            options = {"train": True, "rngs": {"dropout": rng}}
        hidden = self._apply(params, inputs, **options).hidden
        return self._apply(params, hidden, method="logits")

    @nn.nowrap
    def _nll(
        self, params: Params, inputs: Tokens, targets: Array, rng: Array | None = None
    ) -> jax.Array:
        """float32 [B, T] under the generator."""
        return token_nll(self._logits(params, inputs, rng), targets)[0]


def shifted(ids: Array, start: Array) -> jax.Array:
    """The inputs of ids: int32 [B, T]: each row begins with start: [B]."""
    return jnp.concatenate([start[:, None], ids[:, :-1]], axis=1)


def row_keys(batch: Batch) -> jax.Array:
    """PRNG keys [B], of the records of rows."""
    assert batch.records is not None, "of lm.objectives.seqgan"
    return jax.vmap(lambda record: jax.random.fold_in(jax.random.key(0), record))(batch.records)


def oracle_nll(vocab_size: int, inputs: Array, targets: Array) -> jax.Array:
    """float32 [B, T], of targets after inputs: int32 [B, T], under `lm.data.oracle`."""
    p = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), oracle.parameters(vocab_size))

    def step(
        carry: tuple[Array, Array], x: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        (hidden, memory), (token, target) = carry, x
        gates = jnp.tensordot(p.embedding[token], p.weight, 1)
        gates = gates + jnp.tensordot(hidden, p.recurrent, 1) + p.bias
        hidden, memory = recurrent.cell(gates, memory)
        nll = token_nll((hidden @ p.head + p.head_bias)[:, None], target[:, None])[0]
        return (hidden, memory), nll[:, 0]

    zeros = jnp.zeros((inputs.shape[0], oracle.WIDTH))
    found: Any = jax.lax.scan(step, (zeros, zeros), (inputs.T, targets.T))[1]
    return found.T


def build(config: Config, rules: Rules) -> SeqGan:
    """Raise ValueError where the mesh can't do what the config asks for."""
    check_unsharded(
        "seqgan",
        rules,
        length="a token's state waits for that of the token before",
        layers="its layers are few; use data, fsdp or tensor",
    )
    return SeqGan(config, rules)
