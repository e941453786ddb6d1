"""Prove that a config trains on a mesh as on one device: three steps on fake devices, compared.

    python scripts/verify_sharding.py --config=configs/llama3.py:8b --mesh=data=2,fsdp=2,tensor=2
    python scripts/verify_sharding.py --config=configs/mixtral.py --mesh=expert=4,fsdp=2
    ... --processes=2

With --processes the devices are those of real processes, in an order in which every axis of the
mesh crosses them (with slices, a slice is a run of processes).

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
from typing import Any

from absl import app, flags

from lm import cli
from lm.config import command_line
from lm.parallel import process_group

_CONFIG = command_line.ConfigFlag()
_MESH = flags.DEFINE_list(
    "mesh", ["data=2", "fsdp=2", "tensor=2"], "Sizes of mesh axes, and of slices: data=2,fsdp=4."
)
_SHRINK = flags.DEFINE_bool("shrink", True, "Make the model small, keeping its structure.")
_MICROBATCHES = flags.DEFINE_integer("num-microbatches", 1, "Micro-batches on the mesh.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes to start, which share the devices.")
_INITIALIZE = process_group.define_flags()

# Without LLVM's optimisations compiling takes half the time, and running small programs no more;
# XLA's own passes, partitioning among them, stay as they are.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def _sizes(entries: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for entry in entries:
        name, _, size = entry.partition("=")
        if not size.isdecimal():
            raise app.UsageError(f"--mesh: {entry!r} is not like fsdp=4")
        sizes[name] = int(size)
    return sizes


def _shrunk(config: Any) -> str:
    """The sizes of the model that are others than in the config that was given."""
    whole, small = _CONFIG.value.model, config.model
    changed = {n: (whole[n], small[n]) for n in small if n in whole and whole[n] != small[n]}
    return ", ".join(
        f"{name} {old} -> {new}" for name, (old, new) in changed.items() if isinstance(new, int)
    )


def _launch(processes: int, number: int) -> None:
    """Goes on as scripts/launch/local.py, which starts this command in every process."""
    if number % processes:
        raise app.UsageError(f"--processes={processes} must divide the devices ({number})")
    launcher = str(Path(__file__).parent / "launch" / "local.py")
    sizes = [f"--processes={processes}", f"--devices-per-process={number // processes}"]
    # the last one given counts
    command = [launcher, *sizes, "--", *sys.argv, "--processes=1"]
    os.execv(sys.executable, [sys.executable, *command])


def main(argv: Sequence[str]) -> int:
    del argv
    config = _CONFIG.value
    sizes = _sizes(_MESH.value)
    number = math.prod(size for name, size in sizes.items() if name != "slices")
    if _PROCESSES.value > 1:
        _launch(_PROCESSES.value, number)
    processes = flags.FLAGS["num-processes"].value or 1
    os.environ["JAX_PLATFORMS"] = "cpu"
    # collectives of fake devices wait in threads of XLA's pool, as many as it believes cores to be
    os.environ.setdefault("NPROC", "64")
    given = os.environ.get("XLA_FLAGS", "")
    devices = f"--xla_force_host_platform_device_count={number // processes}"
    os.environ["XLA_FLAGS"] = f"{QUICK} {given} {devices}"
    if processes > 1:  # never those of a cluster that this machine is part of
        _INITIALIZE()
    import jax

    from lm.planning import mesh_equivalence

    jax.config.update("jax_platforms", "cpu")
    config = mesh_equivalence.shrink(config) if _SHRINK.value else config
    lead = jax.process_index() == 0
    if lead and _SHRINK.value:
        print(f"model resized, its structure kept (--noshrink: as it is): {_shrunk(config)}")
    if lead:
        print(
            f"{_MESH.value} against one device, float32, {mesh_equivalence.STEPS} steps", flush=True
        )
    report = mesh_equivalence.verify(
        config, sizes, jax.devices(), num_microbatches=_MICROBATCHES.value
    )
    if lead:
        print(mesh_equivalence.describe(report))
    if lead and report.ok:
        worst = max(d.value for d in report.differences)
        print(f"the same: nothing differs by more than {worst:.1e} of an array's largest entry")
    return 0 if report.ok else 1


if __name__ == "__main__":
    cli.run_with_config(main, _CONFIG)
