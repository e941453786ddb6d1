"""Statistics of activations, sown into the collection `statistics` where its caller asks for it.

Sown values are float32 sums and maxima over the global batch, without gradients; the end of a name
says how those of several micro-batches are joined: `_sum` or `_max`. No model computes them unless
the collection is mutable, so that the train step has nothing of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.dot_product import Mask, attention_scores
from lm.types import Array

COLLECTION = "statistics"
MAX_QUERIES = 128  # of a row, at equal distances, whose attention is measured
DEAD = 0.01  # a unit is dead if it never gets as far from 0 as this share of the layer's RMS


def is_measured(module: nn.Module) -> bool:
    """True if what `module` sows is kept."""
    return module.is_mutable_collection(COLLECTION) and not module.is_initializing()


def sow(module: nn.Module, **values: Array) -> None:
    for name, value in values.items():
        module.sow(COLLECTION, name, jax.lax.stop_gradient(value))


def sow_hidden(module: nn.Module, x: Array, non_padding: Array) -> None:
    """Size of hidden states x: [B, T, D] at the tokens of non_padding: bool [B, T]."""
    if not is_measured(module):
        return
    x = jnp.where(non_padding[..., None], x.astype(jnp.float32), 0.0)
    count = jnp.sum(non_padding, dtype=jnp.float32) * x.shape[-1]
    sow(module, square_sum=jnp.sum(jnp.square(x)), entry_max=jnp.max(jnp.abs(x)), entries_sum=count)


def sow_units(module: nn.Module, h: Array) -> None:
    """The units h: [B, T, F] of an MLP, at all positions."""
    if not is_measured(module):
        return
    h, count = h.astype(jnp.float32), jnp.float32(h.shape[0] * h.shape[1])
    largest, mean = jnp.max(jnp.abs(h), axis=(0, 1)), jnp.mean(jnp.square(h), axis=2)
    sow(module, unit_max=largest, unit_square_sum=jnp.sum(mean), positions_sum=count)


def sow_routing(module: nn.Module, scores: Array, chosen: Array, non_padding: Array) -> None:
    """Routers' scores: float32 [B, T, E], and choices: int32 [B, T, k], E at padding."""
    if not is_measured(module):
        return
    experts = jnp.arange(scores.shape[-1])
    load = jnp.sum(chosen[..., None] == experts, axis=(0, 1, 2), dtype=jnp.float32)  # [E]
    share = scores / jnp.sum(scores, axis=-1, keepdims=True)
    entropy = jnp.sum(jax.scipy.special.entr(share), axis=-1)
    entropy = jnp.sum(jnp.where(non_padding, entropy, 0.0))
    tokens = jnp.sum(non_padding, dtype=jnp.float32)
    sow(module, load_sum=load, router_entropy_sum=entropy, tokens_sum=tokens)


def attention(
    q: Array, k: Array, *, mask: Mask, bias: Array | None, scale: float, softcap: float | None
) -> dict[str, Array]:
    """Sums over heads and up to MAX_QUERIES queries of a row of the entropy of their weights, in
    nats, and the largest logit, of q: [B, N, T, H] over k: [B, K, S, H].
    """
    stride = -(-q.shape[2] // MAX_QUERIES)
    last = slice(stride - 1, None, stride)  # of every interval, whose keys are the most
    segments = mask.query_segments[:, last]
    positions = mask.query_positions[:, last]
    mask = dataclasses.replace(mask, query_segments=segments, query_positions=positions)
    bias = None if bias is None else bias[:, :, last]
    scores = attention_scores(q[:, :, last], k, mask, scale=scale, softcap=softcap, bias=bias)
    valid = (jnp.any(mask.allowed(), axis=-1) & (segments != 0))[:, None]  # [B, 1, t]
    log_z = jax.nn.logsumexp(scores, axis=-1)
    entropy = log_z - jnp.sum(jnp.exp(scores - log_z[..., None]) * scores, axis=-1)
    return {
        "entropy_sum": jnp.sum(jnp.where(valid, entropy, 0.0)),
        "logit_max": jnp.max(jnp.where(valid, jnp.max(scores, axis=-1), -jnp.inf)),
        "queries_sum": jnp.sum(valid, dtype=jnp.float32) * q.shape[1],
    }


def summarize(sown: Mapping[str, Array]) -> dict[str, Array]:
    """{statistic: float32 [...]} of the values that one module has sown, joined over micro-batches;
    [...] is [L] for a stack of layers.
    """
    found = {}
    if "square_sum" in sown:
        found["activation_rms"] = jnp.sqrt(sown["square_sum"] / sown["entries_sum"])
        found["activation_max"] = sown["entry_max"]
    if "entropy_sum" in sown:
        found["attention_entropy"] = sown["entropy_sum"] / sown["queries_sum"]
        found["attention_logit_max"] = sown["logit_max"]
    if "unit_max" in sown:
        rms = jnp.sqrt(sown["unit_square_sum"] / sown["positions_sum"])
        found["dead_units"] = jnp.mean(sown["unit_max"] <= DEAD * rms[..., None], axis=-1)
    if "load_sum" in sown:
        mean = jnp.mean(sown["load_sum"], axis=-1)
        found["router_load_max"] = jnp.max(sown["load_sum"], axis=-1) / mean
        found["router_load_min"] = jnp.min(sown["load_sum"], axis=-1) / mean
        found["router_entropy"] = sown["router_entropy_sum"] / sown["tokens_sum"]
    return found
