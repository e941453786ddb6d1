"""The plan of a run: its real train step (or decode step), compiled for absent devices.

    plan = make(config, "v5p:4x4x4")

A Plan holds numbers and names only, and goes to JSON and back: `lm.planning.report` makes a page of
it, `lm.planning.picture` a picture, `lm.planning.search` compares many.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.generation.decode import lower_decode
from lm.models import flops
from lm.planning import (
    compiling,
    costs,
    findings,
    hlo,
    interconnect,
    memory,
    plausibility,
    roofline,
    topology,
    traffic,
)
from lm.planning.costs import Work
from lm.planning.interconnect import Transfer
from lm.planning.memory import Line, Memory
from lm.planning.roofline import StepTimeBounds
from lm.planning.topology import Topology
from lm.telemetry.progress import Progress
from lm.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Decode:
    """A decode step: one new token for each of `batch_size` rows with a cache of `length`."""

    batch_size: int
    length: int


@dataclasses.dataclass(frozen=True)
class Plan:
    name: str  # of the config
    topology: str
    step: str  # train or decode
    num_devices: int
    num_chips: int
    mesh: dict[str, int]  # axes larger than 1
    rows: int  # of a step, all devices together
    length: int
    tokens: int  # that a step takes in
    parameters: int
    capacity: int | None  # bytes of a device's HBM
    refusal: str  # the compiler's words where it doesn't fit
    memory: Memory
    transfers: tuple[Transfer, ...]
    work: Work
    model_flops: float | None  # of a step, for each device
    peak_flops: float | None  # of a device
    times: StepTimeBounds
    warnings: tuple[str, ...]
    compile_seconds: float
    compile_cpu_seconds: float

    @property
    def fits(self) -> bool:
        room = self.capacity is None or self.memory.total <= self.capacity
        return room and not self.refusal

    @property
    def headroom(self) -> int | None:
        """Free bytes of HBM; negative: missing ones."""
        return None if self.capacity is None else self.capacity - self.memory.total

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs of a step of this length, as a part of the peak."""
        if not seconds or self.model_flops is None or self.peak_flops is None:
            return None
        return self.model_flops / (seconds * self.peak_flops)

    @property
    def mfu_bounds(self) -> tuple[float, float] | None:
        """MFU with nothing and with everything overlapped."""
        bounds = self.times.upper_bound_s, self.times.lower_bound_s
        low, high = (self.mfu(seconds) for seconds in bounds)
        return None if low is None or high is None else (low, high)

    def to_json(self) -> str:
        tree = dataclasses.asdict(self)
        derived = {
            "fits": self.fits,
            "headroom": self.headroom,
            "step_seconds": [self.times.lower_bound_s, self.times.upper_bound_s],
            "mfu": self.mfu_bounds or [None, None],
            "binding": self.times.bottleneck,
        }
        return json.dumps({**tree, "derived": derived}, indent=2)


def from_json(text: str) -> Plan:
    """The Plan that `to_json` wrote."""
    tree = json.loads(text)
    del tree["derived"]
    m = tree["memory"]
    m["largest"] = tuple(Line(**line) for line in m["largest"])
    m["largest_temporary"] = tuple(Line(**line) for line in m["largest_temporary"])
    tree["memory"] = Memory(**m)
    tree["transfers"] = tuple(Transfer(**t) for t in tree["transfers"])
    tree["work"] = Work(**_tuples(tree["work"]))
    tree["times"] = StepTimeBounds(**_tuples(tree["times"]))
    return Plan(**_tuples(tree))


def _tuples(tree: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()}


# (config, topology, None for the train step) -> its plan, from a cache or not
Make = Callable[[ConfigTree, str, Decode | None], Plan]


def with_changes(config: ConfigTree, changes: Mapping[str, object]) -> ConfigTree:
    """A copy of the config with changes by path."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(dict(changes))
    return copy


def without_data(config: ConfigTree) -> ConfigTree:
    """The config with synthetic rows of the same shapes: a plan needs no data and no tokenizer."""
    c = conversion.resolve(config)
    # objectives that read two texts of a record; no synthetic source has a text and its label
    of_pairs = hasattr(c.objective, "fields") and not hasattr(c.objective, "labels")
    changes: dict[str, object] = {
        "data.tokenizer": "bytes",
        "data.train": ("synthetic:reverse" if of_pairs else "synthetic:random",),
        "data.weights": (),
        "data.validation": (),
        "train.max_epochs": None,
    }
    if c.train.num_epochs is not None:  # data would have to say how many steps that is
        changes |= {"train.num_epochs": None, "train.num_steps": 1000}
    return with_changes(config, changes)


def make(
    config: ConfigTree,
    name: str,
    *,
    config_name: str = "",
    decode: Decode | None = None,
    show: Progress | None = None,
) -> Plan:
    """Compile the step of `config` for the topology called `name`.

    Raises:
        ValueError: the config doesn't fit the mesh, or the topology or its compiler isn't there.
    """
    target = topology.parse(name)
    devices = topology.devices(target)
    experiment = Experiment(without_data(config), devices)
    label = f"{config_name or 'step'} on {name}"
    if decode is None:
        lowered = experiment.lower_train_step()
    else:
        lowered = lower_decode(
            experiment.model,
            experiment.abstract_params,
            batch_size=decode.batch_size,
            length=decode.length,
        )
    compiled = compiling.compile_step(lowered, label=label, show=show)
    return analyse(experiment, target, compiled, config_name=config_name, decode=decode)


def analyse(
    experiment: Experiment,
    target: Topology,
    compiled: compiling.Compiled,
    *,
    config_name: str = "",
    decode: Decode | None = None,
) -> Plan:
    """The Plan of a program that has been compiled, or refused for want of memory.

    Raises:
        ImplausiblePlan: its figures cannot be right, so the compiler's output was not understood.
    """
    c, mesh = experiment.config, experiment.rules.mesh
    module = hlo.read(compiled.program.hlo_module)
    leaves = jax.tree.leaves(experiment.abstract_params)
    shapes = [(x.shape, x.sharding.shard_shape(x.shape)) for x in leaves]
    used = memory.measure(compiled, module, shapes, platform=target.chip.platform)
    sizes = tuple(mesh.shape.values())
    found = traffic.collectives(module, mesh.axis_names, sizes, slices=c.mesh.slices)
    coords = interconnect.chip_coords(target, mesh.devices.flatten().tolist())
    sent = interconnect.transfers(found, target, coords)
    done = costs.count_flops_and_hbm_bytes(module)
    rows = experiment.batch_size if decode is None else decode.batch_size
    length = c.data.length if decode is None else decode.length
    tokens = rows * length if decode is None else rows
    plan = Plan(
        name=config_name,
        topology=target.name,
        step="train" if decode is None else "decode",
        num_devices=mesh.size,
        num_chips=target.num_chips,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        rows=rows,
        length=length,
        tokens=tokens,
        parameters=sum(math.prod(x.shape) for x in leaves),
        capacity=compiled.available or target.chip.hbm or None,
        refusal=compiled.refusal,
        memory=used,
        transfers=sent,
        work=done,
        model_flops=_model_flops(experiment, rows, length, decode),
        peak_flops=target.chip.peak_flops(c.model.dtype),
        times=roofline.times(target, done, sent, c.model.dtype),
        warnings=(),
        compile_seconds=compiled.seconds,
        compile_cpu_seconds=compiled.cpu_seconds,
    )
    plausibility.check(plan, experiment, found)
    warnings = findings.warnings(plan, experiment, target, found, compiled.messages)
    return dataclasses.replace(plan, warnings=warnings)


def _model_flops(experiment: Experiment, rows: int, length: int, decode: Decode | None) -> float:
    """Model FLOPs of a step, for each device."""
    model, size = experiment.config.model, experiment.rules.mesh.size
    if decode is None:
        return experiment.flops_per_token * rows * length / size
    # a new token attends to every slot of the cache
    one = flops.flops_per_token(model, length, training=False, full_square=True)
    return one * rows / size
