"""The warnings of a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lm.compiled.topology import Topology
from lm.compiled.traffic import Collective
from lm.optim.param_tree import named_leaves
from lm.planning.shards import shard_bytes, sharded_axes
from lm.training.experiment import Experiment

if TYPE_CHECKING:
    from lm.planning.plan import Plan

MIB, GIB = 2**20, 2**30
LARGE = 0.01  # of HBM: a tensor worth a warning
HBM = 16 * GIB  # where the capacity is not known


def warnings(
    plan: Plan,
    experiment: Experiment,
    topology: Topology,
    collectives: Sequence[Collective],
    messages: Sequence[str],
) -> tuple[str, ...]:
    """One sentence each, the most serious first."""
    found = (
        *_involuntary(messages),
        *_full(plan),
        *_doubled(collectives),
        *_replicated(plan, experiment),
        *_unsharded(plan, experiment),
        *_in_loss(experiment, collectives),
        *_padding(plan, experiment, topology),
        *plan.times.unknown,
    )
    return tuple(dict.fromkeys(found))


def _involuntary(messages: Sequence[str]) -> Iterator[str]:
    """Tensors that the partitioner gathers whole on every device and cuts again."""
    for line in messages:
        if "nvoluntary full rematerialization" in line:
            op = re.search(r'op_name="([^"]*)"', line)
            shape = re.search(r"%[\w.\-]+ = (\w+\[[\d,]*\])", line)
            name = " ".join(m[1] for m in (shape, op) if m) or line.strip()[:160]
            yield (
                "involuntary full rematerialization: the partitioner gathers "
                f"{name} on every device"
            )


def _full(plan: Plan) -> Iterator[str]:
    if plan.capacity and plan.fits and plan.memory.total > 0.95 * plan.capacity:
        share = plan.memory.total / plan.capacity
        yield f"HBM is {share:.1%} full: fragmentation at run time may not leave that much"


def _doubled(collectives: Sequence[Collective]) -> Iterator[str]:
    """All-gathers that became all-reduces. Seen with libtpu 0.0.42 on v5p for groups of 64
    chips and more, never for 32; on v5e and v6e groups of 64 stay gathers.
    """
    found = [c for c in collectives if c.unsliced and c.bytes > MIB]
    for axis, size in dict.fromkeys((c.axis, c.size) for c in found):
        sent = sum(c.bytes for c in found if c.axis == axis)
        yield (
            f"all-gathers over {axis} ({size} devices) are compiled as all-reduces of zeros: "
            f"{sent / GIB:.2f} GiB a step, twice what gathers would send; groups of 32 stay gathers"
        )


def _replicated(plan: Plan, experiment: Experiment) -> Iterator[str]:
    """Parameters that a mesh axis could shard and doesn't."""
    mesh = experiment.rules.mesh.shape
    leaves = named_leaves(experiment.abstract_params).items()
    for axis in (axis for axis, size in mesh.items() if size > 1):
        lost = [
            (shard_bytes(leaf), name)
            for name, leaf in leaves
            if axis not in sharded_axes(leaf) and any(d % mesh[axis] == 0 for d in leaf.shape)
        ]
        total = sum(size for size, _ in lost)
        if total > LARGE * (plan.capacity or HBM):
            yield (
                f"replicated over {axis}={mesh[axis]}: {total / GIB:.2f} GiB of parameters on each "
                f"device, in {len(lost)} tensors, the largest {max(lost)[1]}"
            )


def _unsharded(plan: Plan, experiment: Experiment) -> Iterator[str]:
    """Temporaries that hold a whole micro-batch though it is sharded.

    A dimension of as many elements may be another one, the length say: where a shard's rows or
    tokens are there too, it is.
    """
    shards = experiment.rules.size("batch")
    rows = plan.rows // experiment.config.train.num_microbatches
    if rows <= shards or shards == 1 or plan.step != "train":
        return
    whole = {rows, rows * plan.length}
    for line in plan.memory.largest_temporary:
        dims = {int(d) for d in re.findall(r"\d+", line.shape.partition("[")[2])}
        sharded = dims & {n // shards for n in whole}
        if dims & whole and not sharded and line.bytes > LARGE * (plan.capacity or HBM):
            yield (
                f"{line.shape} ({line.bytes / GIB:.2f} GiB) holds all {rows} rows of a batch on "
                f"each device, made by {line.op} {line.source}"
            )


def _in_loss(experiment: Experiment, collectives: Sequence[Collective]) -> Iterator[str]:
    """Collectives that every chunk of the loss repeats."""
    steps = experiment.config.train.num_microbatches
    inside = [
        c
        for c in collectives
        if c.source.startswith("lm/layers/cross_entropy.py") and c.times > steps and c.bytes > MIB
    ]
    if inside:
        c = max(inside, key=lambda c: c.bytes)
        yield (
            f"{len(inside)} collectives run in every chunk of the loss: "
            f"{sum(c.bytes for c in inside) / GIB:.2f} GiB a step, the largest a {c.kind} of "
            f"{c.shape} over {c.axis}, {c.times:.0f} times ({c.source})"
        )


def _padding(plan: Plan, experiment: Experiment, topology: Topology) -> Iterator[str]:
    """Dimensions that are no multiple of the chip's tiles, or of what a GPU's products take."""
    rows, lanes = topology.chip.tile
    if lanes == 1:
        return
    for name, field, axis in (
        ("embed_dim", "embed_dim", "act_embed"),
        ("mlp_dim", "mlp_size", "mlp"),
        ("head_dim", "head_size", "head_dim"),
        ("vocab_size", "vocab_size", "vocab"),
    ):
        size, shards = getattr(experiment.config.model, field, None), experiment.rules.size(axis)
        if size is None:
            continue
        shard = size / shards
        full = math.ceil(shard / lanes) * lanes
        if full > 1.02 * shard:
            of = f" / {shards} shards" if shards > 1 else ""
            yield f"config.model.{name} ({size}{of}) fills {shard / full:.0%} of tiles of {lanes}"
        elif full > shard and topology.chip.platform == "gpu":  # which load 16 bytes of 16 bits
            yield (
                f"config.model.{name} ({size}) is no multiple of {lanes * shards}: products read "
                f"padded copies; {full * shards} needs none"
            )
    wasted = sum(line.padding for line in plan.memory.largest)
    if wasted > max(0.01 * plan.memory.total, 64 * MIB):
        worst = max(plan.memory.largest, key=lambda line: line.padding)
        yield (
            f"padding to tiles of {rows} x {lanes} takes {wasted / GIB:.2f} GiB of the largest "
            f"buffers, most in {worst.shape} {worst.op}"
        )
