"""Before a run trains: do its attention and its chunked loss compute what they should?

Kernels have leaked: given a causal mask alone, cuDNN's attends across packed documents, and the
loss falls all the same. So what the run is about to use, with its own heads, dtype, windows and
chunks, is compared with the plain equations on a small packed batch. What must not be read has a
gradient of exactly zero and changes no bit of the output; all else agrees up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.config.schema import Config, LossConfig, MeshConfig
from lm.exit_codes import Exit, RunError
from lm.layers import cross_entropy
from lm.layers.attention.dot_product import self_mask
from lm.layers.attention.kernels import attend
from lm.layers.linear import float32_product
from lm.parallel import sharding
from lm.parallel.sharding import Rules
from lm.reliability import reference
from lm.types import Array, Batch, HostTokens, Output, Tokens

VOCAB, WIDTH = 97, 32  # of the loss that is checked: its chunks are pieces of the length alone
MAX_CHUNK = 4096  # tokens; larger chunks are checked at this size


class SelfCheckFailed(RunError):
    """What the run would train with computes something else than it should."""

    code = Exit.SELF_CHECK


@dataclasses.dataclass(frozen=True)
class Heads:
    """What the layers of one kind call `attend` with. The Config of a model with attention lists
    its kinds as `attention_kinds`, dicts of these fields.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    bias: bool
    kernel: str
    causal: bool = True

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}

    def __str__(self) -> str:
        parts = [f"{self.num_heads} heads of {self.head_dim} over {self.num_kv_heads}"]
        parts += [] if self.window is None else [f"window {self.window}"]
        parts += [] if self.softcap is None else [f"softcap {self.softcap:g}"]
        parts += ["bias"] if self.bias else []
        parts += [] if self.causal else ["both ways"]
        return ", ".join([*parts, *([] if self.kernel == "auto" else [self.kernel])])


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """A check that passed."""

    checked: tuple[str, ...]
    worst: float  # the largest difference to the reference, as a fraction of the one allowed
    seconds: float
    cached: bool = False  # it was an earlier start that took the seconds

    def __str__(self) -> str:
        when = "at an earlier start" if self.cached else f"in {self.seconds:.1f} s"
        return f"self-check passed {when}: {'; '.join(self.checked)}"


def check(config: Config, rules: Rules, *, cache_dir: str | None = None) -> KernelReport:
    """The report of a check on one device of the mesh, or that of an earlier one of the same.

    cache_dir: where reports are kept; None: ~/.cache/lm/selfcheck.

    Raises:
        SelfCheckFailed: naming what is read that must not be, or what differs and by how much.
    """
    began = time.monotonic()
    device = rules.mesh.local_devices[0]
    one = Rules(sharding.make_mesh(MeshConfig(data=1), [device]), rules.table)
    # neither is part of the contract: a model without attention or a soft cap has no such fields
    kinds = tuple(Heads(**kind) for kind in getattr(config.model, "attention_kinds", ()))
    softcap = getattr(config.model, "logit_softcap", None)
    dtype = jnp.dtype(config.model.dtype)

    key = _key([kinds, softcap, dtype.name, config.loss], device)
    kept = Path(cache_dir or _default_cache_dir()) / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):  # absent or damaged: check again
        found = json.loads(kept.read_text())
        return KernelReport(tuple(found["checked"]), found["worst"], found["seconds"], cached=True)

    with jax.default_device(device):
        worst = check_attention(kinds, dtype, one) if kinds else 0.0
        worst = max(worst, check_loss(config.loss, softcap, dtype, one))
    checked = [f"attention in {dtype.name}, {heads}" for heads in kinds]
    checked.append(f"loss in {dtype.name}, chunks of {config.loss.chunk_size} tokens")
    report = KernelReport(tuple(checked), worst, time.monotonic() - began)
    with contextlib.suppress(OSError):  # nowhere to keep it costs a second at the next start
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(dataclasses.asdict(report)))
        new.replace(kept)
    return report


def _default_cache_dir() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "lm", "selfcheck")


def _key(relevant: list[Any], device: Any) -> str:
    """A hash of all that a report depends on: values of the config, code, compiler and device."""
    here = Path(__file__).parent
    own = [here / Path(__file__).name, here / "reference.py"]
    files = [*own, *sorted(here.parent.glob("layers/**/*.py"))]
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    compiler = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    where = [device.platform, device.device_kind, _precision()]
    return hashlib.sha256(repr([relevant, code, compiler, where]).encode()).hexdigest()[:32]


def _precision() -> str | None:
    config: Any = jax.config
    return config.jax_default_matmul_precision


def _compare(what: str, got: np.ndarray, expected: np.ndarray, dtype: Any, platform: str) -> float:
    """Their largest difference, as a fraction of the one that rounding explains.

    That is four spacings of the numbers that are multiplied and 32 of float32, in which sums are
    kept, relative to the largest number expected. Of float32 numbers, TPUs multiply bfloat16's and
    GPUs TensorFloat-32's, unless jax_default_matmul_precision says otherwise.

    Raises:
        SelfCheckFailed: it is more than that.
    """
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    exact = float(jnp.finfo(jnp.float32).eps)
    spacing = float(jnp.finfo(dtype).eps)
    if dtype == jnp.float32 and _precision() is None:
        spacing = {"tpu": 2.0**-7, "gpu": 2.0**-10}.get(platform, spacing)
    allowed = (4 * spacing + 32 * exact) * float(np.max(np.abs(expected)))
    difference = float(np.max(np.abs(got - expected)))
    if not difference <= allowed:  # nan is not
        raise SelfCheckFailed(
            f"self-check: {what} differs from the reference by {difference:.3g}, where rounding in "
            f"{jnp.dtype(dtype).name} explains {allowed:.3g}"
        )
    return difference / allowed


# ---- attention ----

NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")


@dataclasses.dataclass(frozen=True)
class Probe:
    """One row of the batch: outputs of the queries `asked` must not depend on the keys `hidden`."""

    secret: str  # what these keys are
    asked: np.ndarray  # bool [T]
    hidden: np.ndarray  # bool [S]


def _row(length: int) -> tuple[HostTokens, np.ndarray]:
    """Three documents and padding as Tokens [1, T], and where each document ends."""
    sizes = [3 * length // 8, 1, length // 4]
    sizes.append(length - sum(sizes))
    segments = np.repeat([1, 2, 3, 0], sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    row = [x[None].astype(np.int32) for x in (np.arange(length), segments, positions)]
    return Tokens(*row), np.cumsum(sizes)[:3]


def _probes(heads: Heads, tokens: HostTokens, ends: np.ndarray) -> list[Probe]:
    """What must not be read; the last one asks for all outputs that are no padding."""
    window = heads.window
    segments, place = tokens.segments[0], tokens.ids[0]
    real = segments > 0
    probes = [Probe("other documents", segments == n, real & (segments != n)) for n in (1, 2, 3)]
    for last in (0, ends[0] // 2, ends[2] - 2) if heads.causal else ():
        probes.append(Probe("the future", place <= last, real & (place > last)))
    if window is not None:
        for query in (ends[0] - 1,) if heads.causal else (0, ends[0] // 2, ends[0] - 1):
            outside = (segments == 1) & (np.abs(place - query) >= window)
            probes.append(Probe(f"beyond its window of {window}", place == query, outside))
    return [*probes, Probe("padding", real, ~real)]


def _make_inputs(heads: Heads, probes: list[Probe], dtype: Any) -> tuple[Any, Any]:
    """(q, k, v, bias, cotangent of the output), a row for each probe, and the same with other
    numbers in all that the probe must not read.
    """
    rng, length = np.random.default_rng(0), len(probes[0].asked)
    asked = np.stack([p.asked for p in probes])[:, None, :, None]  # [B, 1, T, 1]
    hidden = np.stack([p.hidden for p in probes])[:, None, :, None]

    def normal(num_heads: int, size: int) -> np.ndarray:
        return rng.standard_normal((1, num_heads, length, size), np.float32)

    # scores of deviation 1, whatever the scale: weights that are neither even nor one-hot
    q = normal(heads.num_heads, heads.head_dim) / np.float32(heads.scale * heads.head_dim**0.5)
    k, v = (normal(heads.num_kv_heads, heads.head_dim) for _ in range(2))
    bias = normal(heads.num_heads, length) if heads.bias else None
    given = (normal(heads.num_heads, heads.head_dim) * asked).astype(dtype)

    def inputs(factor: float) -> Any:
        pairs = ((q, ~asked), (k, hidden), (v, hidden))
        factors = ((x, np.where(where, np.float32(factor), 1)) for x, where in pairs)
        return (*((x * f).astype(dtype) for x, f in factors), bias, given)

    return inputs(1), inputs(-2)


def check_attention(kinds: tuple[Heads, ...], dtype: Any, rules: Rules) -> float:
    """The largest difference between `attend` and the reference, as a fraction of that allowed.

    Raises:
        SelfCheckFailed: it reads what it must not, or a difference is too large.
    """
    plain = rules.platform == "cpu" and all(heads.kernel in ("auto", "xla") for heads in kinds)
    length = 64 if plain else 384  # kernels work on blocks of 128
    tokens, ends = _row(length)
    # in so few tokens a wide window hides nothing, and a high cap cuts nothing
    kinds = tuple(
        dataclasses.replace(
            heads,
            window=None if heads.window is None else min(heads.window, length // 8),
            softcap=None if heads.softcap is None else min(heads.softcap, 2.0),
        )
        for heads in kinds
    )
    probes = [_probes(heads, tokens, ends) for heads in kinds]
    inputs = [_make_inputs(heads, p, dtype) for heads, p in zip(kinds, probes, strict=True)]

    def ours(heads: Heads, q: Array, k: Array, v: Array, bias: Array | None, given: Array) -> Any:
        rows = jax.tree.map(lambda x: jnp.repeat(x, len(q), axis=0), tokens)
        mask = self_mask(rows, heads.causal)

        def run(q: Array, k: Array, v: Array) -> jax.Array:
            kernel = {"rules": rules, "kernel": heads.kernel}
            return attend(q, k, v, mask, bias=bias, **kernel, **heads.options)

        vjp: Any = jax.vjp(run, q, k, v)
        out, pull = vjp
        return [out, *pull(given)]

    @jax.jit
    def run(inputs: Any) -> Any:
        return [ours(heads, *each) for heads, each in zip(kinds, inputs, strict=True)]

    results = jax.device_get(run([same for same, _ in inputs]))
    changed = jax.device_get(run([other for _, other in inputs]))
    worst = 0.0
    for i, heads in enumerate(kinds):
        for row, probe in enumerate(probes[i]):
            _check_secret(heads, probe, [x[row] for x in results[i]], changed[i][0][row])
        row: Any = [None if x is None else x[-1].astype(np.float32) for x in inputs[i][0]]
        q, k, v, bias, given = row
        options = {"causal": heads.causal, "bias": bias, **heads.options}
        expected = reference.attention(q, k, v, given, tokens, **options)
        got = [np.where(probes[i][-1].asked[:, None], x[-1], 0) for x in results[i]]
        for name, a, b in zip(NAMES, got, expected, strict=True):
            what = f"the {name} of attention ({heads})"
            worst = max(worst, _compare(what, a, b, dtype, rules.platform))
    return worst


def _check_secret(heads: Heads, probe: Probe, got: list[np.ndarray], changed: np.ndarray) -> None:
    """Raises SelfCheckFailed if hidden keys reach what was asked.

    got: the output [N, T, H] and the gradients of q, k and v; changed: the output with other
    numbers in all that is hidden.
    """
    out, _, dk, dv = got
    before, after = (x[:, probe.asked].astype(np.float32) for x in (out, changed))
    gradients = np.stack([dk, dv])[:, :, probe.hidden]
    moved, leaking = before != after, gradients != 0
    if moved.any() or leaking.any():
        raise SelfCheckFailed(
            f"self-check: attention ({heads}) reads {probe.secret}: other numbers there change "
            f"{moved.sum()} of {moved.size} outputs, by up to {np.abs(before - after).max():.3g}; "
            f"{leaking.sum()} of {leaking.size} gradients that must be zero are not"
        )


# ---- loss ----


class _Given(nn.Module):
    """A model by the contract, whose hidden states are parameters, so that they get gradients."""

    config: float | None  # the soft cap of its logits
    rules: Rules
    dtype: Any
    head_params = ("table",)

    def __call__(
        self, inputs: Tokens, *, encoder: Tokens | None = None, train: bool = False
    ) -> Output:
        del inputs, encoder, train
        hidden: Any = self.get_variable("params", "hidden")
        return Output(hidden=hidden.astype(self.dtype))

    def logits(self, hidden: Array) -> jax.Array:
        table: Any = self.get_variable("params", "table")
        return _cap(float32_product(1, hidden, table.astype(self.dtype)), self.config)


def _cap(x: Array, softcap: float | None) -> Array:
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def check_loss(config: LossConfig, softcap: float | None, dtype: Any, rules: Rules) -> float:
    """The largest difference between `lm_loss` and the reference, as a fraction of that allowed.

    Raises:
        SelfCheckFailed: it reads tokens without weight, or a difference is too large.
    """
    config = dataclasses.replace(config, chunk_size=min(config.chunk_size, MAX_CHUNK))
    length = max(48, 3 * -(-config.chunk_size // 2))  # two rows of it make three chunks or more
    rng = np.random.default_rng(0)
    weights = rng.choice(np.asarray([0, 0.5, 1], np.float32), (2, length))
    targets = rng.integers(0, VOCAB, (2, length)).astype(np.int32)
    batch = Batch(Tokens(targets, np.ones_like(targets), targets), targets, weights)
    hidden = rng.standard_normal((2, length, WIDTH), np.float32)
    table = rng.standard_normal((VOCAB, WIDTH), np.float32) / np.float32(WIDTH**0.5)
    hidden, table = (x.astype(dtype).astype(np.float32) for x in (hidden, table))
    model: Any = _Given(None if softcap is None else min(softcap, 2.0), rules, dtype)

    @jax.jit
    def run(params: Any, batch: Batch) -> dict[str, Any]:
        def of(params: Any) -> Any:
            rng = jax.random.key(0)  # unused
            return cross_entropy.lm_loss(model, params, batch, rng, train=False, config=config)

        (objective, sums), gradients = jax.value_and_grad(of, has_aux=True)(params)
        named = {f"gradient of {name}": gradients[name] for name in gradients}
        return {**sums, **named, "objective": objective}

    got = jax.device_get(run({"hidden": hidden, "table": table}, batch))
    unscored = np.where(weights[..., None] == 0, np.float32(-2), 1)
    changed = jax.device_get(run({"hidden": hidden * unscored, "table": table}, batch))
    leaking = got["gradient of hidden"][weights == 0] != 0
    if leaking.any() or got["objective"] != changed["objective"]:
        raise SelfCheckFailed(
            "self-check: the loss reads tokens of weight 0: other states there change it from "
            f"{got['objective']:.9g} to {changed['objective']:.9g}; {leaking.sum()} of "
            f"{leaking.size} gradients that must be zero are not"
        )
    what = f"of the loss in chunks of {config.chunk_size} tokens"
    expected = reference.loss(hidden, table, batch, config, model.config)
    return max(
        _compare(f"the {name} {what}", got[name], value, dtype, rules.platform)
        for name, value in expected.items()
    )
