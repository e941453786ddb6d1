"""Prove that a config trains on a mesh as on one device: three steps on fake devices, compared.

    python scripts/verify_sharding.py --config=configs/llama3.py:8b --mesh=data=2,fsdp=2,tensor=2
    python scripts/verify_sharding.py --config=configs/mixtral.py --mesh=expert=4,fsdp=2

The config is made small, keeping its structure (--noshrink: not), and run in float32 on packed,
uneven rows with dropout. Loss, every gradient, every updated parameter and the layout are compared;
the exit code is 1 where anything differs by more than rounding.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags
from ml_collections import config_flags

from lm import runtime

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(arg), as FILE or FILE:ARG."
)
_MESH = flags.DEFINE_list(
    "mesh", ["data=2", "fsdp=2", "tensor=2"], "Sizes of mesh axes, and of slices: data=2,fsdp=4."
)
_SHRINK = flags.DEFINE_bool("shrink", True, "Make the model small, keeping its structure.")
_MICROBATCHES = flags.DEFINE_integer("num_microbatches", 1, "Micro-batches on the mesh.")


def _sizes(entries: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for entry in entries:
        name, _, size = entry.partition("=")
        if not size.isdecimal():
            raise app.UsageError(f"--mesh: {entry!r} is not like fsdp=4")
        sizes[name] = int(size)
    return sizes


def main(argv: Sequence[str]) -> int:
    del argv
    if _CONFIG.value is None:
        raise app.UsageError("--config=configs/NAME.py is needed")
    sizes = _sizes(_MESH.value)
    number = math.prod(size for name, size in sizes.items() if name != "slices")
    os.environ["JAX_PLATFORMS"] = "cpu"
    flag = f"--xla_force_host_platform_device_count={number}"
    # collectives of fake devices wait in threads of XLA's pool, as many as it believes cores to be
    os.environ.setdefault("NPROC", "64")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    import jax

    from lm import verify

    jax.config.update("jax_platforms", "cpu")
    config = verify.shrink(_CONFIG.value) if _SHRINK.value else _CONFIG.value
    print(f"{_MESH.value} against one device, float32, {verify.STEPS} steps", flush=True)
    report = verify.verify(config, sizes, jax.devices(), num_microbatches=_MICROBATCHES.value)
    print(verify.describe(report))
    if report.ok:
        worst = max(d.value for d in report.differences)
        print(f"the same: nothing differs by more than {worst:.1e} of an array's largest entry")
    return 0 if report.ok else 1


if __name__ == "__main__":
    runtime.run_with_config(main)
