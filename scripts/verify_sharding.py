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

import argparse
import math
import os
import sys
from pathlib import Path

from lm import cli
from lm.config.tree import ConfigTree
from lm.parallel import process_group

# Without LLVM's optimisations compiling takes half the time, and running small programs no more;
# XLA's own passes, partitioning among them, stay as they are.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def _sizes(text: str) -> dict[str, int]:
    sizes = {}
    for entry in text.split(","):
        name, _, size = entry.partition("=")
        if not size.isdecimal():
            raise argparse.ArgumentTypeError(f"{entry!r} is not like fsdp=4")
        sizes[name] = int(size)
    return sizes


def _shrunk(given: ConfigTree, config: ConfigTree) -> str:
    """The sizes of the model that are others than in the config that was given."""
    whole, small = given.model, config.model
    changed = {n: (whole[n], small[n]) for n in small if n in whole and whole[n] != small[n]}
    return ", ".join(
        f"{name} {old} -> {new}" for name, (old, new) in changed.items() if isinstance(new, int)
    )


def _launch(processes: int, number: int) -> None:
    """Goes on as scripts/launch/local.py, which starts this command in every process."""
    launcher = str(Path(__file__).parent / "launch" / "local.py")
    sizes = [f"--processes={processes}", f"--devices-per-process={number // processes}"]
    # the last one given counts
    command = [launcher, *sizes, "--", *sys.argv, "--processes=1"]
    os.execv(sys.executable, [sys.executable, *command])


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config()
    add = parser.add_argument
    add(
        "--mesh",
        type=_sizes,
        default="data=2,fsdp=2,tensor=2",
        help="sizes of mesh axes, and of slices: data=2,fsdp=4",
    )
    add("--noshrink", "--no-shrink", action="store_true", help="keep the size of the model")
    add("--num-microbatches", type=int, default=1, help="micro-batches on the mesh")
    add("--processes", type=int, default=1, help="processes to start, which share the devices")
    process_group.add_flags(parser)
    args = parser.parse_args()
    number = math.prod(size for name, size in args.mesh.items() if name != "slices")
    if number % args.processes:
        parser.error(f"--processes={args.processes} must divide the devices ({number})")
    if args.processes > 1:
        _launch(args.processes, number)
    processes = args.num_processes or 1
    os.environ["JAX_PLATFORMS"] = "cpu"
    # collectives of fake devices wait in threads of XLA's pool, as many as it believes cores to be
    os.environ.setdefault("NPROC", "64")
    given = os.environ.get("XLA_FLAGS", "")
    devices = f"--xla_force_host_platform_device_count={number // processes}"
    os.environ["XLA_FLAGS"] = f"{QUICK} {given} {devices}"
    if processes > 1:  # never those of a cluster that this machine is part of
        process_group.initialize_from(args)
    import jax

    from lm.planning import mesh_equivalence

    jax.config.update("jax_platforms", "cpu")
    config = args.config if args.noshrink else mesh_equivalence.shrink(args.config)
    lead = jax.process_index() == 0
    if lead and not args.noshrink:
        sizes = _shrunk(args.config, config)
        print(f"model resized, its structure kept (--noshrink: as it is): {sizes}")
    if lead:
        mesh = [f"{name}={size}" for name, size in args.mesh.items()]
        print(f"{mesh} against one device, float32, {mesh_equivalence.STEPS} steps", flush=True)
    report = mesh_equivalence.verify(
        config, args.mesh, jax.devices(), num_microbatches=args.num_microbatches
    )
    if lead:
        print(mesh_equivalence.describe(report))
    if lead and report.ok:
        worst = max(d.value for d in report.differences)
        print(f"the same: nothing differs by more than {worst:.1e} of an array's largest entry")
    return 0 if report.ok else 1


if __name__ == "__main__":
    cli.run(main)
