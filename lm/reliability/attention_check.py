"""Check of attention kernels: masked keys have no effect, all else agrees with the equations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels.attention_kernels import attend
from lm.kernels.dot_product import self_mask
from lm.layers.attention_scores import Heads
from lm.parallel.sharding import Rules
from lm.reliability import reference
from lm.reliability.reference import SelfCheckFailed, compare
from lm.types import ArrayT, HostTokens, Tokens

NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")


class Inputs(NamedTuple, Generic[ArrayT]):
    """Inputs of attention, and the cotangent of its output; a row for each probe."""

    q: ArrayT  # [B, N, T, H]
    k: ArrayT  # [B, K, T, H]
    v: ArrayT
    bias: ArrayT | None  # [1, N, T, T]
    cotangent: ArrayT


@dataclasses.dataclass(frozen=True)
class Probe:
    """One row of the batch: outputs of `queries` must not depend on the masked `keys`."""

    description: str  # of the keys
    queries: np.ndarray  # bool [T]
    keys: np.ndarray  # bool [S]


def _row(length: int) -> tuple[HostTokens, np.ndarray]:
    """Three documents and padding as Tokens [1, T], and the end of each document."""
    sizes = [3 * length // 8, 1, length // 4]
    sizes.append(length - sum(sizes))
    segments = np.repeat([1, 2, 3, 0], sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    row = [x[None].astype(np.int32) for x in (np.arange(length), segments, positions)]
    return Tokens(*row), np.cumsum(sizes)[:3]


def _probes(heads: Heads, tokens: HostTokens, ends: np.ndarray) -> list[Probe]:
    """Probes of all masks; the last one has all queries that are no padding."""
    window = heads.window
    segments, index = tokens.segments[0], tokens.ids[0]
    tokens_only = segments > 0
    probes = [
        Probe("other documents", segments == n, tokens_only & (segments != n)) for n in (1, 2, 3)
    ]
    for last in (0, ends[0] // 2, ends[2] - 2) if heads.causal else ():
        probes.append(Probe("the future", index <= last, tokens_only & (index > last)))
    if window is not None:
        for query in (ends[0] - 1,) if heads.causal else (0, ends[0] // 2, ends[0] - 1):
            outside = (segments == 1) & (np.abs(index - query) >= window)
            probes.append(Probe(f"beyond its window of {window}", index == query, outside))
    return [*probes, Probe("padding", tokens_only, ~tokens_only)]


def _make_inputs(
    heads: Heads, probes: list[Probe], dtype: jnp.dtype
) -> tuple[Inputs[np.ndarray], Inputs[np.ndarray]]:
    """Inputs with a row for each probe, and the same with other numbers where they are masked."""
    rng, length = np.random.default_rng(0), len(probes[0].queries)
    queries = np.stack([p.queries for p in probes])[:, None, :, None]  # [B, 1, T, 1]
    masked = np.stack([p.keys for p in probes])[:, None, :, None]

    def normal(num_heads: int, size: int) -> np.ndarray:
        return rng.standard_normal((1, num_heads, length, size), np.float32)

    # scores of deviation 1, whatever the scale: weights neither even nor one-hot
    q = normal(heads.num_heads, heads.head_dim) / np.float32(heads.scale * heads.head_dim**0.5)
    k, v = (normal(heads.num_kv_heads, heads.head_dim) for _ in range(2))
    bias = normal(heads.num_heads, length) if heads.bias else None
    cotangent = (normal(heads.num_heads, heads.head_dim) * queries).astype(dtype)

    def inputs(factor: float) -> Inputs[np.ndarray]:
        def scale(x: np.ndarray, where: np.ndarray) -> np.ndarray:
            return (x * np.where(where, np.float32(factor), 1)).astype(dtype)

        return Inputs(scale(q, ~queries), scale(k, masked), scale(v, masked), bias, cotangent)

    return inputs(1), inputs(-2)


def check_attention(heads: Heads, dtype: jnp.dtype, rules: Rules) -> float:
    """The largest difference between `attend` and the reference, as a fraction of the allowed one.

    Raises:
        SelfCheckFailed: it reads masked keys, or a difference is too large.
    """
    plain = rules.platform == "cpu" and heads.kernel in ("auto", "xla")
    length = 64 if plain else 384  # kernels work on blocks of 128
    tokens, ends = _row(length)
    # with so few tokens a wide window masks nothing, and a high cap caps nothing
    window = None if heads.window is None else min(heads.window, length // 8)
    softcap = None if heads.softcap is None else min(heads.softcap, 2.0)
    heads = dataclasses.replace(heads, window=window, softcap=softcap)
    probes = _probes(heads, tokens, ends)
    inputs, others = _make_inputs(heads, probes, dtype)

    @jax.jit
    def run(x: Inputs) -> list[jax.Array]:
        rows = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(probes), axis=0), tokens)
        mask = self_mask(rows, heads.causal, window=window)
        kernel = functools.partial(attend, rules=rules, kernel=heads.kernel, scale=heads.scale)

        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return kernel(q, k, v, mask, softcap=softcap, bias=x.bias)

        out, pullback = jax.vjp(attention, x.q, x.k, x.v)
        return [out, *pullback(x.cotangent)]

    results, (changed, *_) = jax.device_get((run(inputs), run(others)))
    for row, probe in enumerate(probes):
        _check_probe(heads, probe, [x[row] for x in results], changed[row])
    last = jax.tree.map(lambda x: x[-1].astype(np.float32), inputs)
    expected = reference.attention(heads, last, tokens)
    actual = [np.where(probes[-1].queries[:, None], x[-1], 0) for x in results]
    return max(
        compare(f"the {name} of attention ({heads})", a, b, dtype, rules.platform)
        for name, a, b in zip(NAMES, actual, expected, strict=True)
    )


def _check_probe(
    heads: Heads, probe: Probe, results: list[np.ndarray], changed: np.ndarray
) -> None:
    """Raises SelfCheckFailed if masked keys reach the outputs of the queries.

    changed: the output with other numbers in the masked keys.
    """
    out, _, dk, dv = results
    before, after = (x[:, probe.queries].astype(np.float32) for x in (out, changed))
    gradients = np.stack([dk, dv])[:, :, probe.keys]
    moved, leaking = before != after, gradients != 0
    if moved.any() or leaking.any():
        raise SelfCheckFailed(
            f"self-check: attention ({heads}) reads {probe.description}: other numbers there "
            f"change {moved.sum()} of {moved.size} outputs, by up to "
            f"{np.abs(before - after).max():.3g}; "
            f"{leaking.sum()} of {leaking.size} gradients that must be zero are not"
        )
