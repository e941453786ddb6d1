"""Kernels and raw speed of a GPU, for scripts/gpu_check.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.compiled.chips import CHIPS
from lm.config.schema import MeshConfig
from lm.kernels import attention_kernels
from lm.kernels.dot_product import self_mask
from lm.kernels.grouped_matmul import grouped_matmul
from lm.layers.attention_scores import Heads
from lm.parallel.sharding import Rules, make_rules
from lm.reliability import reference
from lm.reliability.attention_check import NAMES, Inputs
from lm.reliability.experts_check import check_experts
from lm.types import Array, HostTokens, Tokens
from scripts import bench
from scripts.gpu.rows import Check, Goal

KERNELS = ("xla", "flash", "cudnn")
CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "window": {"window": 256},
    "grouped heads": {"num_kv_heads": 2},
    "soft cap": {"softcap": 2.0},  # low enough to cap
    "both ways": {"causal": False},
}
ERROR = Goal("error_of_allowed", high=1)
# of a kernel that the compiler or the device refuses: the other kernels are measured all the same
REFUSALS = (jax.errors.JaxRuntimeError, NotImplementedError, ValueError)


def machine(check: Check) -> None:
    """Device, versions, and the memory that JAX gives beside the one that plans count on."""
    device, found = jax.devices()[0], bench.machine()
    stats = device.memory_stats() or {}
    figures = {"platform": device.platform, "devices": found["devices"], "cores": found["cores"]}
    chip = next((c for c in CHIPS.values() if c.kind == device.device_kind), None)
    if chip is not None and (limit := stats.get("bytes_limit")):
        figures |= {"usable_bytes": limit, "of_plans_percent": 100 * limit / chip.hbm}
    versions = {"platform_version": device.client.platform_version, "memory_stats": stats}
    goals = [] if device.platform == "cpu" else [Goal("of_plans_percent", 99, 101)]
    check.rows.add("", figures, goals, details=found | versions)


def kernels(check: Check) -> None:
    """Attention by kernel: its error and its leaks first, then its time on long rows."""
    rules = make_rules(MeshConfig(data=1), jax.devices()[:1])
    length, size, num_heads = (128, 32, 4) if check.small else (1024, 128, 8)
    for case, changes in CASES.items():
        for kernel in KERNELS:
            heads = _heads(num_heads, size, kernel, changes, length)
            tokens = _packed(1, length, length // 3)
            if reason := _refusal(heads, rules, length):
                check.rows.add(f"{case}, {kernel}", {}, skipped=reason)
                continue
            details = {}
            try:
                error = _attention_error(heads, tokens, rules)
            except reference.SelfCheckFailed as failure:
                error, details = float("nan"), {"failure": str(failure)}
            except REFUSALS as failure:
                check.rows.add(f"{case}, {kernel}", {}, failed=str(failure).partition("\n")[0])
                continue
            figures = {"error_of_allowed": error}
            check.rows.add(f"{case}, {kernel}", figures, [ERROR], details=details)
    rows, length, num_heads = (1, 128, 2) if check.small else (4, 4096, 16)
    for case, changes in list(CASES.items())[: 1 if check.small else None]:
        _time_attention(check, rules, case, changes, (rows, num_heads, length, size))


def _time_attention(
    check: Check, rules: Rules, case: str, changes: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """A row for each kernel, and one that compares the choice of `auto` with the fastest."""
    rows, num_heads, length, size = shape
    tokens, fastest = _packed(rows, length, length // 4), {}
    for kernel in KERNELS:
        heads = _heads(num_heads, size, kernel, changes, length)
        if _refusal(heads, rules, length):
            continue
        pairs = int(_seen(heads, tokens).sum())
        x = _inputs(heads, tokens, np.random.default_rng(0))
        run, arrays = _attention(heads, rules), [jnp.asarray(a) for a in (*x[:3], x.cotangent)]
        try:
            seconds = min(bench.seconds_of(lambda r=run, a=arrays: r(tokens, *a)))
        except REFUSALS as failure:
            check.rows.add(f"{case}, {kernel}, time", {}, failed=str(failure).partition("\n")[0])
            continue
        fastest[kernel] = seconds
        # two products forward, five backward
        rate = 7 * 2 * pairs * num_heads * size / seconds
        figures = {"forward_and_backward_ms": 1e3 * seconds, "useful_flop_per_s": rate}
        check.rows.add(f"{case}, {kernel}, time", figures)
    chosen = _choose(_heads(num_heads, size, "auto", changes, length), rules, length)
    best = min(fastest.values(), default=0.0)
    figures = {"auto": chosen, "of_fastest": fastest[chosen] / best if chosen in fastest else None}
    goals = [] if rules.platform == "cpu" else [Goal("of_fastest", high=1.05)]
    check.rows.add(f"{case}, choice", figures, goals)


def _heads(num_heads: int, size: int, kernel: str, changes: dict[str, Any], length: int) -> Heads:
    heads = Heads(num_heads, num_heads, size, size**-0.5, None, None, False, kernel)
    heads = dataclasses.replace(heads, **changes)
    # shorter than a document
    window = None if heads.window is None else min(heads.window, length // 8)
    return dataclasses.replace(heads, window=window)


def _choose(heads: Heads, rules: Rules, length: int) -> str:
    segments = jnp.ones((1, length), jnp.int32)
    mask = self_mask(Tokens(segments, segments, segments), heads.causal, window=heads.window)
    q = jax.ShapeDtypeStruct((1, heads.num_heads, length, heads.head_dim), jnp.bfloat16)
    softcap = heads.softcap is not None
    return attention_kernels.choose(heads.kernel, rules, mask, q, softcap=softcap)


def _refusal(heads: Heads, rules: Rules, length: int) -> str:
    try:
        _choose(heads, rules, length)
    except ValueError as error:
        return str(error)
    return ""


def _packed(rows: int, length: int, document: int) -> HostTokens:
    """Tokens [rows, length]: documents of `document` tokens, another one in each row first, and
    padding at the end.
    """
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        ends = [document * (row + 1) // (rows + 1), *range(document, length, document)]
        starts = [0, *ends[:-1]]
        for n, (start, end) in enumerate(zip(starts, ends, strict=True), start=1):
            segments[row, start:end] = n
            positions[row, start:end] = np.arange(end - start)
    ids = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Tokens(ids, segments, positions)


def _seen(heads: Heads, tokens: HostTokens) -> np.ndarray:
    """Keys that each query sees: [B, T]."""
    position = tokens.positions
    sizes = np.zeros_like(position)
    for row, segments in enumerate(tokens.segments):
        sizes[row] = np.bincount(segments)[segments]
    window = sizes if heads.window is None else np.full_like(sizes, heads.window)
    before = np.minimum(position + 1, window)
    after = 0 if heads.causal else np.minimum(sizes - position - 1, window - 1)
    return np.where(tokens.segments > 0, before + after, 0)


def _inputs(heads: Heads, tokens: HostTokens, rng: np.random.Generator) -> Inputs[np.ndarray]:
    """Normal inputs in bfloat16; the cotangent is 0 at padding, of which nothing is asked."""
    rows, length = tokens.segments.shape

    def normal(num_heads: int) -> np.ndarray:
        shape = (rows, num_heads, length, heads.head_dim)
        return rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    q, k, v = (normal(n) for n in (heads.num_heads, *[heads.num_kv_heads] * 2))
    own = (tokens.segments > 0)[:, None, :, None].astype(jnp.bfloat16)
    return Inputs(q, k, v, None, normal(heads.num_heads) * own)


def _attention(heads: Heads, rules: Rules) -> Callable[..., Any]:
    """(tokens, q, k, v, cotangent) -> the output and the gradients of q, k and v."""

    def run(tokens: Tokens, q: Array, k: Array, v: Array, cotangent: Array) -> list[Array]:
        mask = self_mask(tokens, heads.causal, window=heads.window)

        def attend(q: Array, k: Array, v: Array) -> jax.Array:
            options: dict[str, Any] = {"kernel": heads.kernel, "softcap": heads.softcap}
            return attention_kernels.attend(
                q, k, v, mask, rules=rules, scale=heads.scale, **options
            )

        out, pullback = jax.vjp(attend, q, k, v)
        return [out, *pullback(cotangent)]

    return jax.jit(run)


def _attention_error(heads: Heads, tokens: HostTokens, rules: Rules) -> float:
    """The largest difference to float64, as a part of what rounding explains."""
    x = _inputs(heads, tokens, np.random.default_rng(0))
    out, *gradients = jax.device_get(_attention(heads, rules)(tokens, *x[:3], x.cotangent))
    q, k, v, cotangent = (a[0].astype(np.float64) for a in (*x[:3], x.cotangent))
    expected = reference.attention(heads, Inputs(q, k, v, None, cotangent), tokens)
    own = tokens.segments[0] > 0
    actual = [np.where(own[:, None], out[0], 0), *(g[0] for g in gradients)]
    dtype = jnp.dtype(jnp.bfloat16)
    return max(
        reference.compare(name, a, b, dtype, rules.platform)
        for name, a, b in zip(NAMES, actual, expected, strict=True)
    )


def experts(check: Check) -> None:
    """Grouped products of experts: error and time, forward and backward."""
    rules = make_rules(MeshConfig(data=1), jax.devices()[:1])
    dtype, details = jnp.dtype(jnp.bfloat16), {}
    try:
        error = check_experts(dtype, rules)
    except reference.SelfCheckFailed as failure:
        error, details = float("nan"), {"failure": str(failure)}
    check.rows.add("grouped products", {"error_of_allowed": error}, [ERROR], details=details)
    rows, width, out, groups = (256, 64, 32, 4) if check.small else (65536, 2048, 1024, 64)
    rng = np.random.default_rng(0)
    sizes = jnp.asarray(rng.multinomial(rows, [1 / groups] * groups), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    x, weights, dy = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, ((rows, width), (groups, width, out), (rows, out)), strict=True)
    )

    @jax.jit
    def run(x: Array, weights: Array, dy: Array) -> Any:
        product = lambda x, w: grouped_matmul(rules.platform, 1.0, x, w, sizes)  # noqa: E731
        y, pullback = jax.vjp(product, x, weights)
        return y, pullback(dy)

    seconds = min(bench.seconds_of(lambda: run(x, weights, dy)))
    rate = 3 * 2 * rows * width * out / seconds
    figures = {"forward_and_backward_ms": 1e3 * seconds, "useful_flop_per_s": rate}
    check.rows.add(f"{groups} groups", figures)


def matmul(check: Check) -> None:
    """Products of square matrices in bfloat16, and a copy in HBM."""
    product = jax.jit(jnp.matmul)
    for n in (256, 512) if check.small else (4096, 8192, 16384):
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
        seconds = min(bench.seconds_of(lambda a=a, b=b: product(a, b)))
        check.rows.add(
            f"square {n}", {"time_ms": 1e3 * seconds, "best_flop_per_s": 2 * n**3 / seconds}
        )
    x = jnp.ones(2**20 if check.small else 2**30, jnp.float32)
    double = jax.jit(lambda x: 2 * x)
    seconds = min(bench.seconds_of(lambda: double(x)))
    check.rows.add("read and write", {"hbm_bytes_per_s": 2 * x.nbytes / seconds})
