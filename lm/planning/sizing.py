"""Sizes found by compiling plans: the largest batch that fits on a topology, and the smallest slice
that a config fits on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax

from lm.compiled import topology as topologies
from lm.compiled.topology import Topology
from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.parallel import sharding
from lm.planning.plan import Decode, Make, Trial, Trials, with_changes, without_data
from lm.planning.shards import bytes_on_device
from lm.training.experiment import Experiment

MOST_ROWS = 1024  # of a shard of the batch, beyond which nobody looks
GIB = 2**30


def largest_batch(
    config: ConfigTree, name: str, make: Make, *, decode: Decode | None = None
) -> Trials:
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
    trials: dict[int, Trial] = {}
    best, worst, rows = 0, 2 * MOST_ROWS, 1
    while rows > best:
        trials[rows] = _with_rows(config, name, make, rows * unit, decode)
        best, worst = (rows, worst) if trials[rows].fits else (best, rows)
        rows = min(max(2 * best, _reach(trials)), worst // 2)
    ordered = [trials[n] for n in sorted(trials)]
    return Trials(f"the most rows that fit on {name}", trials.get(best), ordered)


def _with_rows(
    config: ConfigTree, name: str, make: Make, rows: int, decode: Decode | None
) -> Trial:
    if decode is not None:
        plan = make(config, name, dataclasses.replace(decode, batch_size=rows))
        return Trial(f"--decode-batch={rows}", plan)
    changes = {"data.batch_size": rows, "data.batch_size_per_device": None}
    plan = make(with_changes(config, {**changes, "train.num_microbatches": 1}), name, None)
    return Trial(f"--config.data.batch_size={rows}", plan)


def _reach(trials: dict[int, Trial]) -> int:
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
) -> Trials:
    """The smallest slice of the kind of chip in `name` that the step fits on, as it is or with one
    row at a time on each shard of the batch.

    The mesh must have an axis of -1. A slice that cannot hold the state is not compiled.
    """
    target = topologies.parse(name)
    kind, count = target.chip, f"{target.slices}x" if target.slices > 1 else ""
    conversion.resolve(config)  # a mistake in it is told before any slice is refused
    named = (topologies.parse(f"{count}{kind.name}:{s}") for s in topologies.SLICES[kind.dims])
    offered = (target for target in named if math.prod(target.shape) >= kind.smallest)
    trials: list[Trial] = []
    for trial in (t for target in offered for t in _on(config, target, make, decode)):
        trials.append(trial)
        if trial.fits:
            break
    winner = trials[-1] if trials[-1].fits else None
    return Trials(f"the smallest slice of {kind.name}", winner, trials)


def _on(config: ConfigTree, target: Topology, make: Make, decode: Decode | None) -> Iterator[Trial]:
    flags, hbm = f"--topology={target.name}", target.chip.hbm
    try:
        experiment = Experiment(without_data(config), topologies.devices(target))
        state = experiment.abstract_state
        kept = state.params if decode else (state.params, state.opt_state, state.teacher)
        held = bytes_on_device(jax.tree.leaves(kept))
        if hbm and held > hbm:
            what = "parameters and optimizer state" if decode is None else "parameters"
            reason = f"{what} alone take {held / GIB:.1f} of {hbm / GIB:.1f} GiB"
            yield Trial(flags, None, (reason,))
            return
        plan = make(config, target.name, decode)
    except ValueError as error:  # its sizes don't divide, or there is no such slice
        yield Trial(flags, None, (str(error),))
        return
    yield Trial(flags, plan)
    parts = plan.rows // experiment.rules.size("batch")
    if decode is None and not plan.fits and parts > experiment.config.train.num_microbatches:
        less = make(with_changes(config, {"train.num_microbatches": parts}), target.name, None)
        yield Trial(f"{flags} --config.train.num_microbatches={parts}", less)
