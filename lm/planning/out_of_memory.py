"""Advice for a run that was out of memory: changes that its config allows, and the plan to make."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Iterator, Sequence

import jax

from lm.compiled.chips import CHIPS
from lm.compiled.topology import GPUS_PER_NODE, SLICES
from lm.config.tree import ConfigTree
from lm.planning.plan import with_changes
from lm.planning.shards import bytes_on_device
from lm.training.experiment import Experiment
from lm.types import Device

GIB = 2**30


def advice(config: ConfigTree, devices: Sequence[Device], flags: Sequence[str]) -> str:
    """Sentences about a config that did not fit on `devices`: the memory of its state, flags that
    lower the rest, the first of them first, and the command of a plan.

    flags: those of scripts/train.py that name and change the config.
    """
    experiment = Experiment(config, devices)
    state = jax.tree.leaves(experiment.abstract_state)
    tried = ", then ".join(_changes(experiment, config, devices))
    topology, kind = _topology(devices)
    search = "" if kind == "cpu" else " --search"
    command = shlex.join(["scripts/plan.py", *flags, f"--topology={topology}"])
    return (
        f"Parameters and optimizer state take {bytes_on_device(state) / GIB:.3g} GiB of each of "
        f"{len(devices)} devices, gradients and activations the rest. "
        + (f"Try {tried}. " if tried else "Use more devices. ")
        + f"`python {command}{search}` compiles it without them and says what fits"
    )


def _changes(
    experiment: Experiment, config: ConfigTree, devices: Sequence[Device]
) -> Iterator[str]:
    """Flags that need less memory for the same batch, each with its effect."""
    c, mesh = experiment.config, experiment.rules.mesh.shape
    parts = c.train.num_microbatches
    options: list[tuple[dict[str, object], str]] = [
        ({"train.num_microbatches": 2 * parts}, "half the rows at a time"),
        ({"model.remat": "full"}, "a third more FLOPs for the least activations"),
        (
            {"mesh.fsdp": mesh["data"] * mesh["fsdp"], "mesh.data": 1},
            "parameters and optimizer state in more shards",
        ),
    ]
    now = {
        "train.num_microbatches": parts,
        "model.remat": getattr(c.model, "remat", "full"),  # full: a model that has no choice
        "mesh.fsdp": mesh["fsdp"],
        "mesh.data": mesh["data"],
    }
    for changes, effect in options:
        if all(now[path] == value for path, value in changes.items()):
            continue
        with contextlib.suppress(ValueError):  # sizes that it does not divide
            Experiment(with_changes(config, changes), devices)
            yield " ".join(f"--config.{k}={v}" for k, v in changes.items()) + f" ({effect})"


def _topology(devices: Sequence[Device]) -> tuple[str, str]:
    """(the name that lm/compiled/topology.py has for these devices, the kind of chip)."""
    kind = devices[0].device_kind
    chip = next((c for c in CHIPS.values() if kind.startswith(c.kind)), CHIPS["cpu"])
    count = len(devices) // chip.devices
    if chip.platform == "cpu":
        return f"cpu:{len(devices)}", "cpu"
    if chip.platform == "gpu":
        is_whole = count < GPUS_PER_NODE or count % GPUS_PER_NODE == 0
        return f"{chip.name}:{count}" if is_whole else f"{chip.name}:1x{count}", chip.name
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shapes = SLICES[chip.dims]
    sizes = [math.prod(map(int, shape.split("x"))) for shape in shapes]
    size = count // slices
    shape = shapes[sizes.index(size)] if size in sizes else f"{size}" + "x1" * (chip.dims - 1)
    return f"{f'{slices}x' if slices > 1 else ''}{chip.name}:{shape}", chip.name
