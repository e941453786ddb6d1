"""The plan of a run: its real train step (or decode step), compiled for absent devices.

    plan = make(config, "v5p:4x4x4")

A Plan holds numbers and names only, and goes to JSON and back: `lm.planning.report` makes a page of
it, `lm.planning.picture` a picture, `lm.planning.search` and `sizing` compare many.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from lm.compiled import (
    chips,
    compiling,
    costs,
    hlo,
    interconnect,
    memory,
    roofline,
    topology,
    traffic,
)
from lm.compiled.costs import Work
from lm.compiled.interconnect import Transfer
from lm.compiled.memory import Line, Memory
from lm.compiled.roofline import StepTimeBounds
from lm.compiled.topology import Topology
from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.generation.decode import lower_decode
from lm.models import flops
from lm.planning import findings, plausibility, save_cost
from lm.planning.save_cost import SaveCost
from lm.storage.files import write_atomically
from lm.telemetry.energy import JOULES_PER_KWH
from lm.telemetry.progress import Progress
from lm.training import run_costs, teacher
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
    save: SaveCost | None  # None: a decode step
    warnings: tuple[str, ...]
    compile_seconds: float
    compile_cpu_seconds: float
    optimizer_transfers: tuple[Transfer, ...] = ()  # those of `transfers` that the update makes
    teacher_flops: float = 0.0  # those of `model_flops` that a teacher takes
    num_steps: int = 0  # of the run; 0: a decode step
    watts: float | None = None  # of a device; None: not published
    gco2e_per_kwh: float | None = None  # of the grid; None: not given

    @property
    def headroom(self) -> int | None:
        """Free bytes of HBM; negative: missing ones."""
        return None if self.capacity is None else self.capacity - self.memory.total

    @property
    def fits(self) -> bool:
        return not self.refusal and (self.headroom is None or self.headroom >= 0)

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs of a step of this length, as a part of the peak."""
        if not seconds or self.model_flops is None or self.peak_flops is None:
            return None
        return self.model_flops / (seconds * self.peak_flops)

    @property
    def mfu_bounds(self) -> tuple[float, float] | None:
        """MFU at the upper and the lower bound of the step's time."""
        low, high = self.mfu(self.times.upper_bound_s), self.mfu(self.times.lower_bound_s)
        return None if low is None or high is None else (low, high)

    def kwh(self, steps: float) -> tuple[float, float] | None:
        """Energy of so many steps at the bounds of their time, all devices drawing `watts`; None
        where one isn't known.
        """
        if self.watts is None or not self.times.lower_bound_s:
            return None
        one = self.watts * self.num_devices * steps / JOULES_PER_KWH
        return one * self.times.lower_bound_s, one * self.times.upper_bound_s

    def to_json(self) -> str:
        derived = {
            "kwh": self.kwh(self.num_steps) or [None, None],
            "fits": self.fits,
            "headroom": self.headroom,
            "step_seconds": [self.times.lower_bound_s, self.times.upper_bound_s],
            "mfu": self.mfu_bounds or [None, None],
            "binding": self.times.bottleneck,
        }
        return json.dumps({**dataclasses.asdict(self), "derived": derived}, indent=2)


def from_json(text: str) -> Plan:
    """The Plan that `to_json` wrote."""
    tree = json.loads(text, object_hook=_with_tuples)
    del tree["derived"]
    largest = {
        name: tuple(Line(**line) for line in tree["memory"][name])
        for name in ("largest", "largest_temporary")
    }
    tree["memory"] = Memory(**tree["memory"] | largest)
    for name in ("transfers", "optimizer_transfers"):
        tree[name] = tuple(Transfer(**transfer) for transfer in tree[name])
    tree |= {"work": Work(**tree["work"]), "times": StepTimeBounds(**tree["times"])}
    tree["save"] = SaveCost(**tree["save"]) if tree["save"] else None
    return Plan(**tree)


def _with_tuples(tree: dict) -> dict:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in tree.items()}


# (config, topology, None for the train step) -> its plan, from a cache or not
Make = Callable[[ConfigTree, str, Decode | None], Plan]


@dataclasses.dataclass(frozen=True)
class Trial:
    """Flags that were tried, their plan, and remarks: why there is none, or why it lost."""

    flags: str
    plan: Plan | None = None
    remarks: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits


@dataclasses.dataclass(frozen=True)
class Trials:
    """The plans that a search made."""

    wanted: str
    winner: Trial | None
    trials: Sequence[Trial]
    pruned: Mapping[str, int] = dataclasses.field(default_factory=dict)  # not tried, by reason


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
    kind = "reverse" if of_pairs else "codes" if hasattr(c.objective, "num_codes") else "random"
    changes: dict[str, object] = {
        "data.tokenizer": "bytes",
        "data.train": (f"synthetic:{kind}",),
        "data.weights": (),
        "data.validation": (),
        "train.max_epochs": None,
    }
    if hasattr(c.objective, "labels") and not hasattr(c.objective, "fields"):
        changes["objective.labels"] = ("", "another")  # any caption has the first
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
    folder: Path | None = None,
) -> Plan:
    """Compile the step of `config` for the topology called `name`.

    folder: a cache of plans, by config, topology, code and versions.

    Raises:
        ValueError: the config doesn't fit the mesh, or the topology or its compiler isn't there.
    """
    if folder is not None:
        path = folder / f"{key(config, name, decode)}.json"
        if not path.exists():
            plan = make(config, name, config_name=config_name, decode=decode, show=show)
            write_atomically(path, plan.to_json())
        return dataclasses.replace(from_json(path.read_text()), name=config_name)
    target = topology.parse(name)
    experiment = Experiment(without_data(config), topology.devices(target))
    if decode is None:
        lowered = experiment.lower_train_step()
    else:
        sizes = dataclasses.asdict(decode)
        lowered = lower_decode(experiment.model, experiment.abstract_params, **sizes)
    label = f"{config_name or 'step'} on {name}"
    compiled = compiling.compile_step(lowered, label=label, show=show)
    return analyse(experiment, target, compiled, config_name=config_name, decode=decode)


def cache_folder() -> Path:
    """The user's cache of plans."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "lm" / "plan"


def key(config: ConfigTree, name: str, decode: Decode | None = None) -> str:
    """A hash of all that a plan depends on."""
    conversion.resolve(config)  # raises for a mistake before anything is looked up
    root, code = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    parts = {
        "config": json.loads(conversion.to_json(without_data(config))),
        "topology": name,
        "decode": None if decode is None else dataclasses.asdict(decode),
        "code": code.hexdigest(),
        "versions": plausibility.versions(),
        "flags": {n: os.environ.get(n, "") for n in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "gpu_share": chips.gpu_share(),
        "teacher": teacher.model_config_text(config),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


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
    found = traffic.collectives(module, mesh.shape, slices=c.mesh.slices)
    priced = interconnect.price(found, target, interconnect.chip_coords(target, mesh))
    update = [p for p in priced if p.collective.source.startswith(hlo.OPTIMIZER)]
    work = costs.count_flops_and_hbm_bytes(module)
    rows, length = experiment.batch_size, c.data.length
    if decode is not None:
        rows, length = decode.batch_size, decode.length
    model_flops = _model_flops(experiment, rows, length, decode)
    plan = Plan(
        name=config_name,
        topology=target.name,
        step="train" if decode is None else "decode",
        num_devices=mesh.size,
        num_chips=target.num_chips,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        rows=rows,
        length=length,
        tokens=rows * length if decode is None else rows,
        parameters=sum(math.prod(x.shape) for x in leaves),
        capacity=compiled.available or target.chip.hbm or None,
        refusal=compiled.refusal,
        memory=memory.measure(compiled, module, shapes, platform=target.chip.platform),
        transfers=interconnect.transfers(priced),
        work=work,
        model_flops=model_flops,
        peak_flops=target.chip.peak_flops(c.model.dtype),
        times=roofline.times(target, module, work, priced, c.model.dtype),
        save=save_cost.measure(experiment.abstract_state) if decode is None else None,
        warnings=(),
        compile_seconds=compiled.seconds,
        compile_cpu_seconds=compiled.cpu_seconds,
        optimizer_transfers=interconnect.transfers(update),
        teacher_flops=run_costs.teacher_share(experiment) * model_flops if decode is None else 0.0,
        num_steps=experiment.num_steps if decode is None else 0,
        watts=target.chip.watts if c.log.watts_per_device is None else c.log.watts_per_device,
        gco2e_per_kwh=c.log.grid_gco2e_per_kwh,
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
