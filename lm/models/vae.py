"""A variational autoencoder of sentences (arXiv:1511.06349): an LSTM encoder, a Gaussian latent for
every segment of a row, and an LSTM decoder that sees it at every token.

The encoder's state after the last token of a segment gives mean and logarithm of the variance of
its latent. The decoder adds a linear map of the latent to its embeddings, which for its first layer
is the same as a latent beside them. Rows are packed: the segments of a row have one latent each.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.layers import recurrent
from lm.layers.cross_entropy import token_nll
from lm.layers.linear import Linear
from lm.layers.recurrent import State
from lm.layers.stack import run, stack
from lm.models import lstm
from lm.models.lstm import LanguageModel, Layer
from lm.models.vocabulary import check_left_to_right, check_unsharded
from lm.parallel.sharding import Rules
from lm.types import Array, Batch, Output, Sums, Tokens


@dataclasses.dataclass(frozen=True)
class Config(lstm.Config):
    takes_encoder = True

    latent_dim: int = field(32, "Numbers of the latent of a sentence.", ge=1)


@flax.struct.dataclass
class Cache:
    """The state of generation: of the decoder's layers, and the latent of each stream."""

    state: State  # [L, B, F]
    latent: Array  # float32 [B, Z]


class Encoder(nn.Module):
    """Embeddings to the posterior. Parameters: `layers`, `posterior`, and `up` where used."""

    config: Config
    rules: Rules

    @nn.compact
    def __call__(self, x: Array, tokens: Tokens, train: bool) -> jax.Array:
        """x: [B, S, D], of tokens [B, S] -> mean and log-variance float32 [B, S, 2, Z], after every
        token.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        inner = {"embed" if c.hidden_size == c.embed_dim else "mlp": c.hidden_size}
        if "mlp" in inner:
            embed = {"embed": c.embed_dim}
            up = Linear(embed, inner, self.rules, dtype=dtype, init_std=c.init_std, name="up")
            x = up(x)
        layers = stack(Layer, c.num_layers, unroll=c.unroll)(c, self.rules, name="layers")
        state = empty_state(c, self.rules, x.shape[0])
        shared = recurrent.marks(tokens, c.bptt), train
        x, _ = run(layers, Layer(c, self.rules, parent=None), x, state, shared)
        outputs = {"gates": 2, "channels": c.latent_dim}
        return Linear(
            inner,
            outputs,
            self.rules,
            bias=True,
            dtype=dtype,
            init_std=c.init_std,
            unrounded=True,
            name="posterior",
        )(x)


class Vae(LanguageModel):
    """The model. Parameters: those of `LanguageModel`, for the decoder; `encoder`; `latent` [Z, D].

    Called as any model with an encoder, it decodes the mean of the posterior; training samples, in
    `lm.objectives.vae`.
    """

    config: Config  # pyright: ignore

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.encoder = Encoder(c, self.rules)
        self.latent = Linear(
            {"channels": c.latent_dim},
            {"embed": c.embed_dim},
            self.rules,
            dtype=jnp.dtype(c.dtype),
            init_std=c.init_std,
        )

    def __call__(
        self,
        inputs: Tokens,
        *,
        encoder: Tokens | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Output:
        """Hidden states [B, T, D] of inputs [B, T], whose segments read the posterior's mean of
        the segment of the same number in `encoder`, [B, S].

        With a cache, of streams of one segment; the latent of `encoder`, if given, goes into it.
        """
        if cache is None and encoder is None:
            raise ValueError("config.model.name=vae needs encoder tokens, or a cache with latents")
        means = None if encoder is None else self.posterior(encoder, train=train)[0]
        if cache is None:
            assert means is not None and encoder is not None
            hidden = self.decode(inputs, taken(means, ends(encoder, inputs)), train=train)
            return Output(hidden=hidden)
        if means is not None and encoder is not None:
            one = jnp.ones((inputs.ids.shape[0], 1), jnp.int32)
            cache = Cache(cache.state, taken(means, ends(encoder, Tokens(one, one, one)))[:, 0])
        latents = jnp.broadcast_to(
            cache.latent[:, None], (*inputs.ids.shape, cache.latent.shape[-1])
        )
        # a cached call goes on somewhere in a row: where it would be cut isn't known, nor needed
        x, state = self._run(inputs, latents, cache.state, None, train)
        return Output(hidden=x, cache=Cache(state, cache.latent))

    def posterior(self, encoder: Tokens, *, train: bool = False) -> tuple[Array, Array]:
        """(means, log-variances) float32 [B, S, Z] after every token of encoder: [B, S]: those at
        the last token of a segment are its posterior's.
        """
        check_left_to_right("vae", encoder, None)
        both = self.encoder(self._embed(encoder, train), encoder, train)
        return both[..., 0, :], both[..., 1, :]

    def decode(self, inputs: Tokens, latents: Array, *, train: bool = False) -> jax.Array:
        """Hidden states [B, T, D] of inputs: [B, T] with latents: float32 [B, T, Z]."""
        state = empty_state(self.config, self.rules, inputs.ids.shape[0])
        return self._run(inputs, latents, state, self.config.bptt, train)[0]

    def losses(
        self,
        batch: Batch,
        *,
        train: bool,
        weight: Array | float,
        free_bits: float,
        num_samples: int,
    ) -> tuple[jax.Array, Sums]:
        """(SUM to differentiate, sums over tokens and sentences), as `lm.objectives.vae` documents
        them; an evaluation takes `num_samples` latents of a sentence, training takes one.
        """
        assert batch.encoder is not None and batch.records is not None, "of lm.objectives.vae"
        segments = batch.encoder.segments
        following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
        is_end = (segments != 0) & (segments != following)  # [B, S]
        means, log_variances = self.posterior(batch.encoder, train=train)
        kl = (jnp.square(means) + jnp.exp(log_variances) - log_variances - 1) / 2  # [B, S, Z]
        index = ends(batch.encoder, batch.inputs)
        keys = jax.vmap(lambda record: jax.random.fold_in(jax.random.key(0), record))(batch.records)

        def sample(i: Array | int) -> tuple[jax.Array, jax.Array]:
            """(nll [B, T] of the targets, log q(z | x) / p(z) [B, S]) with latents number i."""
            noise = jax.vmap(
                lambda key: jax.random.normal(jax.random.fold_in(key, i), means.shape[1:])
            )(keys)
            latents = means + jnp.exp(log_variances / 2) * noise
            hidden = self.decode(batch.inputs, taken(latents, index), train=train)
            nll = token_nll(self.logits(hidden), batch.targets)[0] * batch.weights
            ratio = (jnp.square(latents) - jnp.square(noise) - log_variances) / 2
            return nll, jnp.sum(ratio, axis=-1)

        def over_sentences(x: Array) -> jax.Array:
            return jnp.sum(jnp.where(is_end, x, 0.0))

        sums = {
            "tokens": jnp.sum(batch.weights),
            "sentences": jnp.sum(is_end, dtype=jnp.float32),
            "kl": over_sentences(jnp.sum(kl, axis=-1)),
        }
        if train:
            nll = jnp.sum(sample(0)[0])
            sums |= {"reconstruction": nll, "loss": nll + sums["kl"]}
            costly = over_sentences(jnp.sum(jnp.maximum(kl, free_bits), axis=-1))
            return nll + weight * costly, sums
        # sums over the tokens of each sentence, at its end
        owner = index[:, :, None] == jnp.arange(segments.shape[1])  # [B, T, S]

        def log_weight(i: Array) -> tuple[jax.Array, jax.Array]:
            nll, ratio = sample(i)
            of_sentence = jnp.sum(jnp.where(owner, nll[:, :, None], 0.0), axis=1)
            return -of_sentence - ratio, jnp.sum(nll)

        log_weights, nlls = jax.lax.map(log_weight, jnp.arange(num_samples))  # [n, B, S], [n]
        bound = jax.nn.logsumexp(log_weights, axis=0) - math.log(num_samples)
        nll = jnp.mean(nlls)
        sums |= {"reconstruction": nll, "loss": nll + sums["kl"]}
        sums["iw_bound"] = -over_sentences(bound)
        sums["latent_means"] = jnp.sum(jnp.where(is_end[..., None], means, 0.0), axis=(0, 1))
        squares = jnp.where(is_end[..., None], jnp.square(means), 0.0)
        sums["latent_squares"] = jnp.sum(squares, axis=(0, 1))
        return sums["loss"], sums

    def _embed(self, tokens: Tokens, train: bool) -> jax.Array:
        x = self.rules.constrain(self.embed(tokens), "act_batch", "length", "act_embed")
        return self.dropout(x, deterministic=not train)

    def _run(
        self, inputs: Tokens, latents: Array, state: State, bptt: int | None, train: bool
    ) -> tuple[jax.Array, State]:
        check_left_to_right("vae", inputs, None)
        c = self.config
        x = self._embed(inputs, train) + self.latent(latents.astype(c.dtype))
        x = x if c.hidden_size == c.embed_dim else self.up(x)
        shared = recurrent.marks(inputs, bptt), train
        x, state = run(self.layers, Layer(c, self.rules, parent=None), x, state, shared)
        return self.finish(x), state

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """Empty states, and latents of 0, of `batch_size` streams of any length."""
        del length
        zeros = jnp.zeros((batch_size, self.config.latent_dim))
        state = empty_state(self.config, self.rules, batch_size)
        return Cache(state, self.rules.constrain(zeros, "batch", None))


def empty_state(config: Config, rules: Rules, batch_size: int) -> State:
    """The state of all layers before the first token, [L, B, F]."""
    shape = config.num_layers, batch_size, config.hidden_size
    return recurrent.empty(shape, jnp.dtype(config.dtype), rules)


def ends(encoder: Tokens, inputs: Tokens) -> jax.Array:
    """int32 [B, T]: the last token in encoder, [B, S], of the segment of each token of inputs, by
    the number of the segment; S - 1 where there is none, as in padding.
    """
    same = inputs.segments[:, :, None] == encoder.segments[:, None, :]  # [B, T, S]
    return encoder.segments.shape[1] - 1 - jnp.argmax(same[:, :, ::-1], axis=-1).astype(jnp.int32)


def taken(x: Array, index: Array) -> jax.Array:
    """x: [B, S, Z] at index: [B, T] -> [B, T, Z]."""
    return jnp.take_along_axis(x, index[..., None], axis=1)


def build(config: Config, rules: Rules) -> Vae:
    """Raise ValueError where the mesh can't do what the config asks for."""
    check_unsharded(
        "vae",
        rules,
        length="a token's state waits for that of the token before",
        layers="its layers are few; use data, fsdp or tensor",
    )
    return Vae(config, rules)
