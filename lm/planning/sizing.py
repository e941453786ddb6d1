"""Sizes found by compiling plans: the largest batch that fits on a topology, and the smallest slice
that a config fits on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax

from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.parallel import sharding
from lm.planning import topology as topologies
from lm.planning.plan import Decode, Make, Plan, with_changes, without_data
from lm.planning.shards import bytes_on_device
from lm.training.experiment import Experiment

MOST_ROWS = 1024  # of a shard of the batch, beyond which nobody looks
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class SizeAttempt:
    """Flags that were tried; their plan, or the reason that there is none."""

    flags: str
    plan: Plan | None
    refused: str = ""


@dataclasses.dataclass(frozen=True)
class Sizes:
    wanted: str
    winner: SizeAttempt | None
    trials: tuple[SizeAttempt, ...]


def largest_batch(
    config: ConfigTree, name: str, make: Make, *, decode: Decode | None = None
) -> Sizes:
    """The most rows in one micro-batch of a training step, or of a decode step, that fit: a power
    of two on each shard of the batch, a multiple of what a pipeline divides.

    Memory is a line in the number of rows, or nearly, so that few plans are compiled.
    """
    c, target = conversion.resolve(config), topologies.parse(name)
    if not target.chip.hbm:
        raise ValueError(f"--largest-batch: {target.chip.name} has no memory of its own to fill")
    rules = sharding.make_rules(c.mesh, topologies.devices(target))
    unit = rules.size("batch")
    if decode is None and rules.size("layers") > 1:
        unit *= c.model.pipeline.num_microbatches
    trials: dict[int, SizeAttempt] = {}
    best, worst, rows = 0, 2 * MOST_ROWS, 1
    while rows > best:
        trials[rows] = _with_rows(config, name, make, rows * unit, decode)
        best, worst = (rows, worst) if _fits(trials[rows]) else (best, rows)
        rows = min(max(2 * best, _reach(trials)), worst // 2)
    ordered = tuple(trials[n] for n in sorted(trials))
    return Sizes(f"the most rows that fit on {name}", trials.get(best), ordered)


def _with_rows(
    config: ConfigTree, name: str, make: Make, rows: int, decode: Decode | None
) -> SizeAttempt:
    if decode is not None:
        plan = make(config, name, dataclasses.replace(decode, batch_size=rows))
        return SizeAttempt(f"--decode-batch={rows}", plan)
    changes = {"data.batch_size": rows, "data.batch_size_per_device": None}
    plan = make(with_changes(config, {**changes, "train.num_microbatches": 1}), name, None)
    return SizeAttempt(f"--config.data.batch_size={rows}", plan)


def _reach(trials: dict[int, SizeAttempt]) -> int:
    """The power of two at or below what the line through the two largest plans that fit allows; 0
    with fewer.
    """
    plans = [(n, t.plan) for n, t in sorted(trials.items()) if t.plan is not None and t.plan.fits]
    if len(plans) < 2:
        return 0
    (n, smaller), (m, larger) = plans[-2:]
    slope = max(1.0, (larger.memory.total - smaller.memory.total) / (m - n))
    return 2 ** int(math.log2(m + (larger.headroom or 0) / slope))


def fewest_chips(
    config: ConfigTree, name: str, make: Make, *, decode: Decode | None = None
) -> Sizes:
    """The smallest slice of the kind of chip in `name` that the step fits on, as it is or with one
    row at a time on each shard of the batch.

    The mesh must have an axis of -1. A slice that cannot hold the state is not compiled.
    """
    target = topologies.parse(name)
    kind, count = target.chip, f"{target.slices}x" if target.slices > 1 else ""
    conversion.resolve(config)  # a mistake in it is told before any slice is refused
    trials: list[SizeAttempt] = []
    for shape in topologies.SLICES[kind.dims]:
        at = f"{count}{kind.name}:{shape}"
        if topologies.parse(at).num_chips < target.slices * kind.smallest:
            continue
        for trial in _on(config, at, make, decode):
            trials.append(trial)
            if _fits(trial):
                return Sizes(f"the smallest slice of {kind.name}", trial, tuple(trials))
    return Sizes(f"the smallest slice of {kind.name}", None, tuple(trials))


def _on(config: ConfigTree, name: str, make: Make, decode: Decode | None) -> Iterator[SizeAttempt]:
    flags = f"--topology={name}"
    target = topologies.parse(name)
    try:
        experiment = Experiment(without_data(config), topologies.devices(target))
        held = _held(experiment, decode)
        if target.chip.hbm and held > target.chip.hbm:
            what = "parameters and optimizer state" if decode is None else "parameters"
            reason = f"{what} alone take {held / GIB:.1f} of {target.chip.hbm / GIB:.1f} GiB"
            yield SizeAttempt(flags, None, reason)
            return
        plan = make(config, name, decode)
    except ValueError as error:  # its sizes don't divide, or there is no such slice
        yield SizeAttempt(flags, None, str(error))
        return
    yield SizeAttempt(flags, plan)
    parts = plan.rows // experiment.rules.size("batch")
    if decode is None and not plan.fits and parts > experiment.config.train.num_microbatches:
        less = make(with_changes(config, {"train.num_microbatches": parts}), name, None)
        yield SizeAttempt(f"{flags} --config.train.num_microbatches={parts}", less)


def _held(experiment: Experiment, decode: Decode | None) -> int:
    """Bytes of a device that hold parameters and, in training, optimizer state."""
    state = experiment.abstract_state
    leaves = jax.tree.leaves(state.params if decode else (state.params, state.opt_state))
    return bytes_on_device(leaves)


def _fits(trial: SizeAttempt) -> bool:
    return trial.plan is not None and trial.plan.fits
