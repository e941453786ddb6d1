"""Contrastive loss over all pairs of the pictures and texts of a global batch.

softmax  CLIP (arXiv:2103.00020): a picture chooses its text among those of the batch, and a text
         its picture; the mean of both cross-entropies.
sigmoid  SigLIP (arXiv:2303.15343): every picture with every text is a decision of its own.

Rows that share a caption or a picture are no negatives of each other. softmax leaves them out of
each other's denominators, since it has one right answer for a row. sigmoid counts them as
positives: its answer to "does this text belong to this picture" is yes.

Sums are over pictures: `tokens` is their weight. The matrix of pairs, [B, B], is sharded over the
rows of the batch, as they are, and over `tensor`; what devices exchange is embeddings, [B, E].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.types import Array, Batch, CoupledLoss, Model, Params, Sums

_MASKED = jnp.finfo(jnp.float32).min


def make(model: Model, kind: str, *, train: bool) -> CoupledLoss:
    """The loss of a model with two towers, lm.models.clip.

    Raises:
        ValueError: the model has no two towers, or no bias for `sigmoid`, or one for `softmax`.
    """
    if not hasattr(model, "scale_and_bias"):
        raise ValueError(
            "config.objective.name=contrastive needs a model of pictures and texts: "
            "config.model.name=clip"
        )
    if model.config.has_logit_bias != (kind == "sigmoid"):
        raise ValueError(
            f"config.model.has_logit_bias ({model.config.has_logit_bias}) must be "
            f"{kind == 'sigmoid'} for config.objective.loss={kind}: "
            + ("it subtracts a bias" if kind == "sigmoid" else "a softmax has no use for a bias")
        )
    return CoupledLoss(
        functools.partial(embed, model, train=train), functools.partial(loss, model, kind=kind)
    )


def embed(model: Model, params: Params, batch: Batch, rng: Array, *, train: bool) -> Array:
    """Embeddings of pictures and texts of length 1, float32 [B, 2, E]."""
    rngs = {"dropout": rng} if train else {}
    options: dict[str, Any] = {"images": batch.images, "train": train, "rngs": rngs}
    output = model.apply({"params": params}, batch.inputs, **options)
    assert not output.aux, "two towers have no auxiliary losses"
    return model.rules.constrain(output.hidden, "act_batch", None, None)


def loss(
    model: Model, params: Params, embeddings: Array, batch: Batch, *, kind: str
) -> tuple[Array, Sums]:
    """(SUM to differentiate, sums) of embeddings [B, 2, E] of all rows.

    batch.targets: int32 [B, 5], the hashes of captions and of pictures, two words each, and classes
    that are not read here; batch.weights: float32 [B, 1], 0 for rows that are none.
    """
    rules, variables = model.rules, {"params": params}
    size, weights = embeddings.shape[0], batch.weights[:, 0]
    # texts lie as a vocabulary does, where that divides them
    columns = "vocab" if size % rules.size("vocab") == 0 else None
    embeddings = rules.constrain(embeddings, "act_batch", None, None)
    logits = model.apply(variables, embeddings, method="logits")
    logits = rules.constrain(logits, "act_batch", columns)  # [B, B]

    own = jnp.arange(size)[:, None] == jnp.arange(size)
    present = (weights[:, None] > 0) & (weights > 0)
    shared = _equal(batch.targets[:, :2]) | _equal(batch.targets[:, 2:4])
    # never empty: a row that is none has itself, and no loss
    masked = jnp.where(own | (present & ~shared), logits, _MASKED)
    target = jnp.sum(jnp.where(own, logits, 0.0), axis=1)  # [B]
    if kind == "softmax":
        nll = sum(jax.nn.logsumexp(masked, axis=axis) - target for axis in (0, 1)) / 2
        total = jnp.sum(weights * nll)
    else:
        nll = jax.nn.softplus(jnp.where(shared, -logits, logits))
        total = jnp.sum(jnp.where(present, weights[:, None] * weights, 0.0) * nll)
    # a text that ties with another one has not been told from it
    correct = ~jnp.any((masked >= target[:, None]) & ~own, axis=1)
    scale, bias = model.apply(variables, method="scale_and_bias")
    means = {"accuracy": correct.astype(jnp.float32), "scale": scale}
    means |= {"bias": bias} if kind == "sigmoid" else {}
    sums = {name: jnp.sum(weights * x) for name, x in means.items()}
    return total, {**sums, "loss": total, "tokens": jnp.sum(weights), "objective": total}


def _equal(words: Array) -> Array:
    """bool [B, B], True where rows of words, int32 [B, 2], are equal."""
    return jnp.all(words[:, None] == words, axis=-1)
