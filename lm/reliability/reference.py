"""Reference of the kernel check: attention and token loss with gradients, by their equations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lm.config.schema import LossConfig
from lm.exit_codes import Exit, RunError
from lm.types import HostBatch, HostTokens

if TYPE_CHECKING:
    from lm.layers.attention_scores import Heads
    from lm.reliability.attention_check import Inputs


class SelfCheckFailed(RunError):
    """A kernel of the run computes something else than its equations."""

    code = Exit.SELF_CHECK


def matmul_precision() -> str | None:
    return getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  (not in its stub)


def compare(
    name: str, actual: np.ndarray, expected: np.ndarray, dtype: jnp.dtype, platform: str
) -> float:
    """The largest difference, as a fraction of the one that rounding explains.

    That is four spacings of the dtype that is multiplied and 32 of float32, the dtype of sums,
    relative to the largest expected number. TPUs multiply float32 numbers as bfloat16 and GPUs as
    TensorFloat-32, unless jax_default_matmul_precision is set.

    Raises:
        SelfCheckFailed: it is more than that.
    """
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    exact = float(jnp.finfo(jnp.float32).eps)
    spacing = float(jnp.finfo(dtype).eps)
    if dtype == jnp.float32 and matmul_precision() is None:
        spacing = {"tpu": 2.0**-7, "gpu": 2.0**-10}.get(platform, spacing)
    allowed = (4 * spacing + 32 * exact) * float(np.max(np.abs(expected)))
    difference = float(np.max(np.abs(actual - expected)))
    if not difference <= allowed:  # nan is not
        raise SelfCheckFailed(
            f"self-check: {name} differs from the reference by {difference:.3g}, where rounding in "
            f"{jnp.dtype(dtype).name} explains {allowed:.3g}"
        )
    return difference / allowed


def attention(
    heads: Heads, x: Inputs[np.ndarray], tokens: HostTokens
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(output, gradients of q, k and v) of attention over one row of packed tokens [1, T].

    q and the cotangent of the output: [N, T, H]; k, v: [K, T, H]; bias: [N, T, T]; all
    float32.
    """
    q, cotangent, group = x.q, x.cotangent, len(x.q) // len(x.k)
    shared = (len(x.k), group, *x.k.shape[1:])
    k, v = (np.repeat(own, group, axis=0) for own in (x.k, x.v))
    scores, slope = _cap(heads.scale * q @ k.swapaxes(1, 2), heads.softcap)  # [N, T, S]
    scores = scores if x.bias is None else scores + x.bias
    segments, positions = tokens.segments[0], tokens.positions[0]
    distance = positions[:, None] - positions[None, :]
    seen = (segments[:, None] == segments[None, :]) & (segments[None, :] > 0)
    if heads.causal:
        seen &= distance >= 0
    if heads.window is not None:
        seen &= np.abs(distance) < heads.window
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)  # padding attends to nothing
    out = weights @ v
    d_scores = weights * (cotangent @ v.swapaxes(1, 2) - np.sum(cotangent * out, -1, keepdims=True))
    d_scores *= heads.scale * slope
    dk, dv = d_scores.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ cotangent
    return out, d_scores @ k, dk.reshape(shared).sum(1), dv.reshape(shared).sum(1)


def loss(
    hidden: np.ndarray,
    table: np.ndarray,
    batch: HostBatch,
    config: LossConfig,
    softcap: float | None,
) -> dict[str, np.ndarray]:
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


def _cap(x: np.ndarray, softcap: float | None) -> tuple[np.ndarray, np.ndarray | float]:
    """(x with the soft cap, its derivative)."""
    if softcap is None:
        return x, 1.0
    tanh = np.tanh(x / softcap)
    return softcap * tanh, 1 - tanh**2
