"""Sentences of the latents of `lm.models.vae`: samples from the prior, reconstructions,
interpolation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.generation.buckets import batch_size, bucket, encode, pad
from lm.generation.decode import State, decode
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Model, Params


def sentence_latents(
    model: Model, params: Params, tokenizer: Tokenizer, texts: Sequence[str]
) -> np.ndarray:
    """The posterior's means of texts, float32 [n, Z]."""
    size = min(tokenizer.vocab_size, model.config.vocab_size)
    streams = [np.append(encode(tokenizer, text, size), tokenizer.eos_id) for text in texts]
    rows = batch_size(len(streams), model.rules.size("batch"))
    tokens: Any = pad(streams, rows, bucket(max(map(len, streams))))
    posterior = jax.jit(lambda p, x: model.apply({"params": p}, x, method="posterior"))
    means, _ = posterior(params, tokens)
    return np.asarray(means)[: len(streams), -1]  # streams end with the row


def interpolate(first: np.ndarray, last: np.ndarray, count: int) -> np.ndarray:
    """`count` latents on the line from first to last: [Z] each -> [count, Z]."""
    return np.linspace(first, last, count, dtype=np.float32)


def decode_latents(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    latents: np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """The sentence of each latent, [n, Z]: greedy, or sampled at a temperature.

    Raises:
        ValueError: the latents are not those of the model.
    """
    if latents.shape[1:] != (model.config.latent_dim,):
        raise ValueError(
            f"latents {latents.shape} must be [n, config.model.latent_dim "
            f"({model.config.latent_dim})]"
        )
    rows = batch_size(len(latents), model.rules.size("batch"))
    padded = np.zeros((rows, latents.shape[1]), np.float32)
    padded[: len(latents)] = latents
    key = jax.random.key(np.uint32(seed))
    state = State(
        cache=model.init_cache(rows, max_new_tokens).replace(latent=jnp.asarray(padded)),
        token=jnp.full(rows, tokenizer.bos_id, jnp.int32),
        position=jnp.zeros(rows, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        keys=jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows)),
        seen=None,
    )
    _, ids, _ = decode(
        model,
        params,
        state,
        np.arange(rows) >= len(latents),
        np.int32(max_new_tokens),
        np.array([temperature or 1.0, 1.0, 0.0], np.float32),
        np.float32(1),
        chunk=bucket(max_new_tokens),
        top_k=0 if temperature else 1,
        nucleus=False,
        stop_ids=(tokenizer.eos_id,),
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
    )
    found = np.asarray(ids)[: len(latents), :max_new_tokens]
    stops = [np.append(np.flatnonzero(row == tokenizer.eos_id), len(row))[0] for row in found]
    return [tokenizer.decode(row[:stop].tolist()) for row, stop in zip(found, stops, strict=True)]
