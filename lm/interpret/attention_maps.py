"""Attention weights and losses of a run, token by token, as arrays.

`lm.interpret.run_report` draws them.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.module import InterceptorContext

from lm.data.pipeline import Pipeline, evaluation_batches
from lm.data.tokenizer import Tokenizer
from lm.layers.attention.attention import Attention, LayerInputs
from lm.layers.attention.dot_product import attention_scores
from lm.layers.cross_entropy import token_nll
from lm.training.experiment import Experiment
from lm.types import Array, Batch, Model, Params, Tokens


class TokenLosses(NamedTuple):
    """A model's predictions for every target, [B, T] each; of several layers, [L, B, T]."""

    nll: np.ndarray | jax.Array  # float32: -log p(target)
    guesses: np.ndarray | jax.Array  # int32: the most likely id
    confidence: np.ndarray | jax.Array  # float32: the probability of the guess


@functools.partial(jax.jit, static_argnames="model")
def attention_maps(model: Model, params: Params, tokens: Tokens) -> jax.Array:
    """Attention weights of every layer and head, float32 [L, B, N, T, S]; padding has none."""

    def keep_weights(
        call: Callable[..., object], args: tuple, kwargs: dict, context: InterceptorContext
    ) -> object:
        result, layer = call(*args, **kwargs), context.module
        if isinstance(layer, Attention) and context.method_name == "__call__":
            weights = _weights(layer, args[1], kwargs["kind"])
            layer.sow("intermediates", "weights", weights)
        return result

    # Masks, windows and biases are known only while the layer runs, so its call is intercepted.
    with nn.intercept_methods(keep_weights):
        _, kept = model.apply({"params": params}, tokens, mutable=["intermediates"])
    [weights] = kept["intermediates"]["layers"]["attention"]["weights"]
    return weights


def _weights(layer: Attention, context: LayerInputs, kind: Array | None) -> jax.Array:
    """[B, N, T, S] of an attention layer that has just sown its queries and keys."""
    q, k = (layer.get_variable("intermediates", name)[-1] for name in ("queries", "keys"))

    def of_kind(i: int) -> jax.Array:
        mask, window, bias = context.masks[i], layer.windows[i], context.biases[i]
        scores = attention_scores(
            q,
            k,
            mask,
            scale=layer.score_scale,
            window=window,
            softcap=layer.softcap,
            bias=bias,
        )
        return jnp.where(mask.allowed(window)[:, None], jax.nn.softmax(scores), 0.0)

    weights = [of_kind(i) for i in range(len(layer.windows))]
    return weights[0] if kind is None else jnp.stack(weights)[kind]


def losses_of_logits(logits: jax.Array, targets: jax.Array) -> TokenLosses:
    """The predictions of logits [..., V] for targets [...]."""
    nll, log_z = token_nll(logits, targets)
    guesses = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return TokenLosses(nll, guesses, jnp.exp(jnp.max(logits, axis=-1) - log_z))


def token_losses(model: Model, params: Params, batch: Batch) -> TokenLosses:
    """The predictions for the targets of a batch, [B, T]."""
    return jax.device_get(_token_losses(model, params, batch))


@functools.partial(jax.jit, static_argnames="model")
def _token_losses(model: Model, params: Params, batch: Batch) -> TokenLosses:
    variables = {"params": params}
    hidden = model.apply(variables, batch.inputs, encoder=batch.encoder).hidden

    def column(x: tuple[jax.Array, jax.Array]) -> TokenLosses:
        h, targets = x  # [B, 1, D], [B, 1]
        return losses_of_logits(model.apply(variables, h, method="logits"), targets)

    # one column after the other, so that [B, T, V] logits never exist
    columns = (jnp.moveaxis(x, 1, 0)[:, :, None] for x in (hidden, jnp.asarray(batch.targets)))
    return TokenLosses(*(x[..., 0].T for x in jax.lax.map(column, tuple(columns))))


def held_out(
    experiment: Experiment, params: Params, *, num_batches: int = 8
) -> tuple[Batch, TokenLosses]:
    """The first `num_batches` batches of the first validation source, joined, and their losses.

    Raises:
        ValueError: the run has no validation source.
    """
    if not experiment.validation:
        raise ValueError("config.data.validation is empty: name a token store that was held out")
    name, source = next(iter(experiment.validation.items()))
    batches, losses = [], []
    size = experiment.batch_size
    for _, batch in zip(
        range(num_batches),
        evaluation_batches(source, experiment.objective.for_source(name), batch_size=size),
        strict=False,
    ):
        batches.append(batch)
        losses.append(token_losses(experiment.model, params, experiment.make_global_batch(batch)))
    join = functools.partial(jax.tree.map, lambda *x: np.concatenate(x))
    return join(*batches), join(*losses)


def cut(tokens: Tokens, row: int, length: int) -> Tokens:
    """The first `length` tokens of a row, as a stream of its own: [1, length]."""
    return jax.tree.map(lambda x: x[row : row + 1, :length], tokens)


def most_packed(pipeline: Pipeline, num_steps: int = 100) -> tuple[int, int]:
    """(step, row) of the row with the most documents among the first `num_steps` batches."""
    counts = [pipeline.batch_at(step).inputs.segments.max(axis=1) for step in range(num_steps)]
    step, row = np.unravel_index(np.argmax(counts), np.shape(counts))
    return int(step), int(row)


def mean_distances(maps: Array) -> np.ndarray:
    """Mean distance in tokens of each head's keys, [L, N], of one document's maps [L, N, T, S]."""
    positions = np.arange(maps.shape[-1])
    back = np.abs(positions[:, None] - positions)
    return (np.asarray(maps) * back).sum(-1).mean(-1)


def nearest_to_farthest(maps: Array, count: int = 4) -> list[tuple[int, int]]:
    """`count` heads (layer, head), spread evenly over the ranks of their mean distances."""
    distances = mean_distances(maps)
    order = np.argsort(distances, axis=None)
    chosen = order[np.linspace(0, order.size - 1, min(count, order.size)).round().astype(int)]
    return [(int(i // maps.shape[1]), int(i % maps.shape[1])) for i in chosen]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token: special ids show their name, parts of characters U+FFFD."""
    names = {tokenizer.pad_id: "⟨pad⟩", tokenizer.bos_id: "⟨bos⟩", tokenizer.eos_id: "⟨eos⟩"}
    return names.get(token) or tokenizer.decode([token])


def token_texts(tokenizer: Tokenizer, ids: Array | np.ndarray) -> list[str]:
    """The texts of a stream's tokens; a character of several tokens is in the text of the last."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for token in np.asarray(ids).tolist():
        data = tokenizer.decode_bytes([token])
        texts.append(decoder.decode(data) if data else token_text(tokenizer, token))
    return texts
