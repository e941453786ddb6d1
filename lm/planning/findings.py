"""The warnings of a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lm.optim.param_tree import named_leaves
from lm.planning.shards import shard_bytes, sharded_axes
from lm.planning.topology import Topology
from lm.planning.traffic import Collective
from lm.training.experiment import Experiment

if TYPE_CHECKING:
    from lm.planning.plan import Plan

MIB, GIB = 2**20, 2**30
LARGE = 0.01  # of HBM: a tensor worth a warning


def warnings(
    plan: Plan,
    experiment: Experiment,
    topology: Topology,
    collectives: Sequence[Collective],
    messages: Sequence[str],
) -> tuple[str, ...]:
    """One sentence each, the most serious first."""
    return (
        *_involuntary(messages),
        *_full(plan),
        *_doubled(collectives),
        *_replicated(plan, experiment),
        *_unsharded(plan, experiment),
        *_in_loss(experiment, collectives),
        *_padding(plan, experiment, topology),
        *plan.times.unknown,
    )


def _involuntary(messages: Sequence[str]) -> list[str]:
    """Tensors that the partitioner gathers whole on every device and cuts again."""
    found: dict[str, None] = {}
    for line in messages:
        if "nvoluntary full rematerialization" in line:
            op = re.search(r'op_name="([^"]*)"', line)
            shape = re.search(r"%[\w.\-]+ = (\w+\[[\d,]*\])", line)
            name = " ".join(m[1] for m in (shape, op) if m) or line.strip()[:160]
            found[name] = None
    return [
        f"involuntary full rematerialization: the partitioner gathers {name} on every device"
        for name in found
    ]


def _full(plan: Plan) -> list[str]:
    if plan.capacity and plan.fits and plan.memory.total > 0.95 * plan.capacity:
        share = plan.memory.total / plan.capacity
        return [f"HBM is {share:.1%} full: fragmentation at run time may not leave that much"]
    return []


def _doubled(collectives: Sequence[Collective]) -> list[str]:
    """All-gathers that became all-reduces. Seen with libtpu 0.0.42 on v5p for groups of 64
    chips and more, never for 32; on v5e and v6e groups of 64 stay gathers.
    """
    found = [c for c in collectives if c.unsliced and c.bytes > MIB]
    return [
        f"all-gathers over {axis} ({size} devices) are compiled as all-reduces of zeros: "
        f"{sum(c.bytes for c in found if c.axis == axis) / GIB:.2f} GiB a step, twice what gathers "
        "would send; groups of 32 stay gathers"
        for axis, size in dict.fromkeys((c.axis, c.size) for c in found)
    ]


def _replicated(plan: Plan, experiment: Experiment) -> list[str]:
    """Parameters that a mesh axis could shard and doesn't."""
    mesh = experiment.rules.mesh
    capacity = plan.capacity or 16 * GIB
    lost: dict[str, list[tuple[int, str]]] = {}
    for name, leaf in named_leaves(experiment.abstract_params).items():
        used, size = sharded_axes(leaf), shard_bytes(leaf)
        for axis, n in mesh.shape.items():
            if n > 1 and axis not in used and any(d % n == 0 for d in leaf.shape):
                lost.setdefault(axis, []).append((size, name))
    found = []
    for axis, leaves in lost.items():
        total = sum(size for size, _ in leaves)
        if total > LARGE * capacity:
            _, largest = max(leaves)
            found.append(
                f"replicated over {axis}={mesh.shape[axis]}: {total / GIB:.2f} GiB of parameters "
                f"on each device, in {len(leaves)} tensors, the largest {largest}"
            )
    return found


def _unsharded(plan: Plan, experiment: Experiment) -> list[str]:
    """Temporaries that hold a whole micro-batch though it is sharded.

    A dimension of as many elements may be another one, the length say: where a shard's rows or
    tokens are there too, it is.
    """
    shards = experiment.rules.size("batch")
    rows = plan.rows // experiment.config.train.num_microbatches
    capacity = plan.capacity or 16 * GIB
    if rows <= shards or shards == 1 or plan.step != "train":
        return []
    whole = {rows, rows * plan.length}
    found: dict[str, None] = {}
    for line in plan.memory.largest_temporary:
        dims = {int(d) for d in re.findall(r"\d+", line.shape.partition("[")[2])}
        sharded = dims & {n // shards for n in whole}
        if dims & whole and not sharded and line.bytes > LARGE * capacity:
            found[
                f"{line.shape} ({line.bytes / GIB:.2f} GiB) holds all {rows} rows of a batch on "
                f"each device, made by {line.op} {line.source}"
            ] = None
    return list(found)


def _in_loss(experiment: Experiment, collectives: Sequence[Collective]) -> list[str]:
    """Collectives that every chunk of the loss repeats."""
    steps = experiment.config.train.num_microbatches
    inside = [
        c
        for c in collectives
        if c.source.startswith("lm/layers/cross_entropy.py") and c.times > steps and c.bytes > MIB
    ]
    if not inside:
        return []
    largest = max(inside, key=lambda c: c.bytes)
    total = sum(c.bytes for c in inside)
    return [
        f"{len(inside)} collectives run in every chunk of the loss: {total / GIB:.2f} GiB a step, "
        f"the largest a {largest.kind} of {largest.shape} over {largest.axis}, {largest.times:.0f} "
        f"times ({largest.source})"
    ]


def _padding(plan: Plan, experiment: Experiment, topology: Topology) -> list[str]:
    """Dimensions that are no multiple of the chip's tiles."""
    rows, lanes = topology.chip.tile
    if lanes == 1:
        return []
    c, rules = experiment.config.model, experiment.rules
    found = []
    for name, size, axis in (
        ("embed_dim", getattr(c, "embed_dim", None), "act_embed"),
        ("mlp_dim", getattr(c, "mlp_size", None), "mlp"),
        ("head_dim", getattr(c, "head_size", None), "head_dim"),
        ("vocab_size", getattr(c, "vocab_size", None), "vocab"),
    ):
        if size is None:
            continue
        shard = size / rules.size(axis)
        full = math.ceil(shard / lanes) * lanes
        if full > 1.02 * shard:
            of = f" / {rules.size(axis)} shards" if rules.size(axis) > 1 else ""
            found.append(
                f"config.model.{name} ({size}{of}) fills {shard / full:.0%} of tiles of {lanes}"
            )
    wasted = sum(line.padding for line in plan.memory.largest)
    if wasted > max(0.01 * plan.memory.total, 64 * MIB):
        worst = max(plan.memory.largest, key=lambda line: line.padding)
        found.append(
            f"padding to tiles of {rows} x {lanes} takes {wasted / GIB:.2f} GiB of the largest "
            f"buffers, most in {worst.shape} {worst.op}"
        )
    return found
