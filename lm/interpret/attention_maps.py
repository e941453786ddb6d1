"""Attention weights of a model as arrays; `lm.interpret.notebook_views` draws them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.module import InterceptorContext

from lm.data.pipeline import Pipeline
from lm.kernels.dot_product import attention_scores
from lm.layers.attention import Attention, LayerInputs
from lm.types import Array, Model, Params, Tokens


@functools.partial(jax.jit, static_argnames="model")
def attention_maps(model: Model, params: Params, tokens: Tokens) -> jax.Array:
    """Attention weights of every layer and head, float32 [L, B, N, T, S]; padding has none."""

    def keep_weights(
        call: Callable[..., object], args: tuple, kwargs: dict, context: InterceptorContext
    ) -> object:
        result, layer = call(*args, **kwargs), context.module
        if isinstance(layer, Attention) and context.method_name == "__call__":
            weights = _weights(layer, args[1], args[2].kind)
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
        mask = context.masks[i]
        scores = attention_scores(
            q,
            k,
            mask,
            scale=layer.config.score_scale,
            softcap=layer.config.attention_softcap,
            bias=context.biases[i],
        )
        return jnp.where(mask.allowed()[:, None], jax.nn.softmax(scores), 0.0)

    weights = [of_kind(i) for i in range(len(context.masks))]
    return weights[0] if kind is None else jnp.stack(weights)[kind]


def cut(tokens: Tokens, row: int, length: int | None = None) -> Tokens:
    """The first `length` tokens of a row, or all, as a stream of its own: [1, length]."""
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
