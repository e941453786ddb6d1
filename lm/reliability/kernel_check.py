"""Kernel check at the start of a run: its attention, its experts' products and its chunked loss
against plain equations.

Kernels have leaked: given only a causal mask, cuDNN's attends across packed documents, and the loss
falls all the same. On a small packed batch masked inputs must have a gradient of exactly zero and
change no bit of the output; all else agrees with the equations up to rounding.
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

import jax
import jax.numpy as jnp

from lm.config.schema import Config, MeshConfig
from lm.kernels.quantization import NO_QUANTIZATION
from lm.parallel import sharding
from lm.parallel.sharding import Rules
from lm.reliability import reference
from lm.reliability.attention_check import check_attention
from lm.reliability.experts_check import check_experts
from lm.reliability.loss_check import check_loss
from lm.storage.files import write_atomically
from lm.types import Device


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """A passed check."""

    checked: list[str]
    worst: float  # the largest difference to the reference, as a fraction of the allowed one
    seconds: float
    cached: bool = False  # from an earlier start

    def __str__(self) -> str:
        when = "at an earlier start" if self.cached else f"in {self.seconds:.1f} s"
        return f"self-check passed {when}: {'; '.join(self.checked)}"


def check(config: Config, rules: Rules, *, cache_dir: str | None = None) -> KernelReport:
    """Check on one device of the mesh, or return the cached report of the same check.

    cache_dir: folder of reports; None: ~/.cache/lm/selfcheck.

    Raises:
        SelfCheckFailed: names keys that are read although masked, or a difference and its size.
    """
    began = time.monotonic()
    device = rules.mesh.local_devices[0]
    one = Rules(sharding.make_mesh(MeshConfig(data=1), [device]), rules.table)
    # not part of the models' contract: one without attention or a soft cap has no such fields
    kinds = list(dict.fromkeys(s.heads for s in getattr(config.model, "attention_scores", ())))
    softcap = getattr(config.model, "logit_softcap", None)
    moe = getattr(config.model, "moe", None)
    grouped = moe is not None and moe.num_experts > 0 and moe.dispatch == "dropless"
    quantization = getattr(config.model, "quantization", NO_QUANTIZATION)
    dtype = jnp.dtype(config.model.dtype)

    key = _key([kinds, softcap, grouped, quantization, dtype.name, config.loss], device)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache_dir or f"{cache}/lm/selfcheck") / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):  # absent or damaged: check again
        return KernelReport(**{**json.loads(path.read_text()), "cached": True})

    with jax.default_device(device):
        found = [check_attention(heads, dtype, one) for heads in kinds]
        found += [check_experts(dtype, one, quantization)] if grouped else []
        worst = max([*found, check_loss(config.loss, softcap, dtype, one)])
    checked = [f"attention in {dtype.name}, {heads}" for heads in kinds]
    experts = dtype.name if quantization == NO_QUANTIZATION else quantization.format
    checked += [f"grouped products of experts in {experts}"] if grouped else []
    checked.append(f"loss in {dtype.name}, chunks of {config.loss.chunk_size} tokens")
    report = KernelReport(checked, worst, time.monotonic() - began)
    with contextlib.suppress(OSError):  # without a cache the next start checks again
        write_atomically(path, json.dumps(dataclasses.asdict(report)))
    return report


def _key(values: list[object], device: Device) -> str:
    """A hash of all that a report depends on: values of the config, code, compiler and device."""
    here = Path(__file__).parent
    own = [*here.glob("*_check.py"), here / "reference.py"]
    folders = (here.parent / "kernels", here.parent / "layers")
    files = sorted([*own, *(file for folder in folders for file in folder.rglob("*.py"))])
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    compiler = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    target = [device.platform, device.device_kind, reference.matmul_precision()]
    return hashlib.sha256(repr([values, code, compiler, target]).encode()).hexdigest()[:32]
