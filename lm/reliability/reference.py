"""Attention and token loss by their equations in numpy, with gradients: what the start-up check
compares with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lm.config.schema import LossConfig
from lm.types import HostBatch, HostTokens


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    given: np.ndarray,
    tokens: HostTokens,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: np.ndarray | None,
    causal: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(output, gradients of q, k and v) of attention over one row of packed tokens [1, T].

    q and `given`, the gradient of the output: [N, T, H]; k, v: [K, T, H]; bias: [N, T, T]; all
    float32.
    """
    group = len(q) // len(k)
    shared = (len(k), group, *k.shape[1:])
    k, v = (np.repeat(x, group, axis=0) for x in (k, v))
    scores, slope = _cap(scale * q @ k.swapaxes(1, 2), softcap)  # [N, T, S]
    scores = scores if bias is None else scores + bias
    segments, positions = tokens.segments[0], tokens.positions[0]
    distance = positions[:, None] - positions[None, :]
    seen = (segments[:, None] == segments[None, :]) & (segments[None, :] > 0)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= np.abs(distance) < window
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)  # padding sees nothing
    out = weights @ v
    d_scores = weights * (given @ v.swapaxes(1, 2) - np.sum(given * out, -1, keepdims=True))
    d_scores *= scale * slope
    dk, dv = d_scores.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ given
    return out, d_scores @ k, dk.reshape(shared).sum(1), dv.reshape(shared).sum(1)


def loss(
    hidden: np.ndarray,
    table: np.ndarray,
    batch: HostBatch,
    config: LossConfig,
    softcap: float | None,
) -> dict[str, Any]:
    """The sums of the token loss, and the gradients of its objective, from all logits at once.

    hidden: float32 [B, T, D]; table: float32 [V, D].
    """
    logits, slope = _cap(hidden @ table.T, softcap)  # [B, T, V]
    log_z = np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))  # [B, T, 1]
    hit = np.eye(len(table), dtype=np.float32)[batch.targets]
    weights = batch.weights[..., None]
    wanted = (1 - config.label_smoothing) * hit + config.label_smoothing / len(table)
    objective = np.sum(wanted * (log_z - logits), -1, keepdims=True) + config.z_loss * log_z**2
    d_logits = np.exp(logits - log_z) * (1 + 2 * config.z_loss * log_z) - wanted
    d_logits *= weights * slope
    return {
        "objective": np.sum(weights * objective),
        "loss": np.sum(weights * hit * (log_z - logits)),
        "tokens": np.sum(weights),
        "gradient of hidden": d_logits @ table,
        "gradient of table": np.einsum("btv,btd->vd", d_logits, hidden),
    }


def _cap(x: np.ndarray, softcap: float | None) -> tuple[np.ndarray, Any]:
    """(x below the soft cap, the slope of that)."""
    if softcap is None:
        return x, 1.0
    tanh = np.tanh(x / softcap)
    return softcap * tanh, 1 - tanh**2
