"""The residual stream between layers: its predictions and norms, and attributions to inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext

from lm.interpret.token_losses import TokenLosses, losses_of_logits
from lm.layers.cross_entropy import token_nll
from lm.layers.embedding import Embedding
from lm.types import Array, Model, Params, Tokens


class Norms(NamedTuple):
    """Root mean squares over the width, float32 [L, B, T]."""

    stream: jax.Array  # of the residual stream after each layer
    update: jax.Array  # of what each layer adds to it


@functools.partial(jax.jit, static_argnames="model")
def residual_streams(model: Model, params: Params, tokens: Tokens) -> jax.Array:
    """The residual stream after each layer: [L, B, T, D]."""
    _, kept = model.apply({"params": params}, tokens, mutable=["intermediates"])
    [hidden] = kept["intermediates"]["layers"]["hidden"]
    return hidden


@functools.partial(jax.jit, static_argnames="model")
def logit_lens(model: Model, params: Params, tokens: Tokens, targets: Array) -> TokenLosses:
    """The model's final norm and vocabulary projection, applied after every layer: [L, B, T].

    nostalgebraist 2020, "interpreting GPT: the logit lens". targets: int32 [B, T]. One layer at a
    time, so that [L, B, T, V] logits never exist; the last layer's are the model's answer.
    """

    def of_layer(hidden: Array) -> TokenLosses:
        logits = model.apply({"params": params}, hidden, method=lambda m, h: m.logits(m.finish(h)))
        return losses_of_logits(logits, jnp.asarray(targets))

    return jax.lax.map(of_layer, residual_streams(model, params, tokens))


@functools.partial(jax.jit, static_argnames="model")
def residual_norms(model: Model, params: Params, tokens: Tokens) -> Norms:
    """Norms of the residual stream and of the update of each layer but the first."""
    hidden = residual_streams(model, params, tokens).astype(jnp.float32)
    before = jnp.concatenate([jnp.full_like(hidden[:1], jnp.nan), hidden[:-1]])

    def size(x: Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(x), axis=-1))

    return Norms(size(hidden), size(hidden - before))


@functools.partial(jax.jit, static_argnames=("model", "num_steps"))
def attributions(
    model: Model,
    params: Params,
    tokens: Tokens,
    target: Array,
    baseline: Array,
    *,
    num_steps: int = 64,
) -> jax.Array:
    """The share of each input token in log p(target) at the last position: float32 [B, T], in nats.

    Integrated gradients (arXiv:1703.01365) on the straight line from the embeddings of the ids
    `baseline`, int32 [B, T], to those of the tokens: the sum over a row is what log p(target)
    gains by the exchange, up to the error of `num_steps` midpoints. Zero vectors are no baseline:
    a norm that only sees directions leaves them in one jump. target: int32 [B].
    """

    def rows(ids: Array) -> jax.Array:
        found = model.apply({"params": params}, method=lambda m: m.embedding(ids))
        return found.astype(jnp.float32)

    start, end = rows(baseline), rows(tokens.ids)

    def log_p(embedded: Array) -> jax.Array:
        def exchange(
            call: Callable[..., jax.Array], args: tuple, kwargs: dict, context: InterceptorContext
        ) -> jax.Array:
            result, table = call(*args, **kwargs), context.module
            is_lookup = isinstance(table, Embedding) and context.method_name == "__call__"
            exchanged = is_lookup and table.name == "embedding"
            return embedded.astype(result.dtype) if exchanged else result

        with nn.intercept_methods(exchange):
            hidden = model.apply({"params": params}, tokens).hidden[:, -1:]
        logits = model.apply({"params": params}, hidden, method="logits")[:, 0]
        return -jnp.sum(token_nll(logits, jnp.asarray(target))[0])

    shares = (jnp.arange(num_steps) + 0.5) / num_steps
    slopes = jax.lax.map(lambda share: jax.grad(log_p)(start + share * (end - start)), shares)
    return jnp.sum(jnp.mean(slopes, axis=0) * (end - start), axis=-1)
