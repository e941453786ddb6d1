"""What a plan shows that somebody should know, and what to try next."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from lm.aot.topology import Topology
from lm.aot.traffic import Collective
from lm.experiment import Experiment

MIB, GIB = 2**20, 2**30
LARGE = 0.01  # of HBM: a tensor worth a warning
REMAT = ("none", "dots", "projections", "attended", "full")  # from most to least that is saved


@dataclasses.dataclass(frozen=True)
class Advice:
    """Something to try: what it may do, and the flags that do it."""

    why: str
    flags: str


def warnings(
    plan: Any,
    experiment: Experiment,
    topology: Topology,
    collectives: Sequence[Collective],
    messages: Sequence[str],
) -> tuple[str, ...]:
    """One sentence each, the gravest first."""
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
    """The partitioner gave up: it gathers a whole tensor on every device and cuts it again."""
    found: dict[str, int] = {}
    for line in messages:
        if "nvoluntary full rematerialization" in line:
            op = re.search(r'op_name="([^"]*)"', line)
            shape = re.search(r"%[\w.\-]+ = (\w+\[[\d,]*\])", line)
            name = " ".join(m[1] for m in (shape, op) if m) or line.strip()[:160]
            found[name] = found.get(name, 0) + 1
    return [
        f"involuntary full rematerialization: the partitioner gathers {name} on every device"
        for name in found
    ]


def _full(plan: Any) -> list[str]:
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
        "would send"
        for axis, size in dict.fromkeys((c.axis, c.size) for c in found)
    ]


def _replicated(plan: Any, experiment: Experiment) -> list[str]:
    """Parameters that a mesh axis could shard and doesn't."""
    mesh = experiment.rules.mesh
    capacity = plan.capacity or 16 * GIB
    lost: dict[str, list[tuple[int, str]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(experiment.abstract_params):
        used = {
            axis
            for entry in leaf.sharding.spec
            if entry is not None
            for axis in ((entry,) if isinstance(entry, str) else entry)
        }
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for axis, n in mesh.shape.items():
            if n > 1 and axis not in used and any(d % n == 0 for d in leaf.shape):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                lost.setdefault(axis, []).append((size, name))
    found = []
    for axis, leaves in lost.items():
        total = sum(size for size, _ in leaves)
        if total > LARGE * capacity:
            _, largest = max(leaves)
            what = f"{total / GIB:.2f} GiB of parameters on each device"
            found.append(
                f"replicated over {axis}={mesh.shape[axis]}: {what}, in {len(leaves)} tensors, the "
                f"largest {largest}"
            )
    return found


def _unsharded(plan: Any, experiment: Experiment) -> list[str]:
    """Temporaries that hold the whole batch though it is sharded."""
    rules, rows = experiment.rules, plan.rows
    shards = rules.size("batch")
    capacity = plan.capacity or 16 * GIB
    if shards == 1 or plan.step != "train":
        return []
    found = []
    for line in plan.memory.largest_temporary:
        dims = [int(d) for d in re.findall(r"\d+", line.shape.partition("[")[2])]
        tokens = rows * plan.length
        whole = any(d in (rows, tokens) for d in dims) and rows > shards
        if whole and line.bytes > LARGE * capacity:
            found.append(
                f"{line.shape} ({line.bytes / GIB:.2f} GiB) holds all {rows} rows of the batch on "
                f"each device, made by {line.op} {line.source}"
            )
    return found


def _in_loss(experiment: Experiment, collectives: Sequence[Collective]) -> list[str]:
    """Collectives that every chunk of the loss repeats."""
    steps = experiment.config.train.num_microbatches
    inside = [
        c
        for c in collectives
        if c.source.startswith("lm/loss.py") and c.times > steps and c.bytes > MIB
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


def _padding(plan: Any, experiment: Experiment, topology: Topology) -> list[str]:
    """Dimensions that are no multiple of what the chip's tiles hold."""
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


def advice(plan: Any, experiment: Experiment) -> tuple[Advice, ...]:
    """Changes worth a plan of their own, from what binds; the first is the likeliest."""
    found = _to_fit(plan, experiment) if not plan.fits else _to_gain(plan, experiment)
    return tuple(found[:4])


def _flag(path: str, value: Any) -> str:
    return f"--config.{path}={value}"


def _to_fit(plan: Any, experiment: Experiment) -> list[Advice]:
    c, groups = experiment.config, plan.memory.groups
    missing = -(plan.headroom or 0)
    found = []
    remat = getattr(c.model, "remat", "full")
    shards = experiment.rules.size("batch")
    k = c.train.num_microbatches
    by_batch = sum(groups.get(n, 0) for n in ("saved activations", "temporaries", "kernels"))
    if remat != "full" and groups.get("saved activations", 0) > missing / 2:
        found.append(Advice("save only the inputs of layers", _flag("model.remat", "full")))
    if experiment.batch_size % (2 * k * shards) == 0 and by_batch > missing:
        found.append(
            Advice(
                f"halve what a micro-batch holds ({by_batch / GIB:.1f} GiB)",
                _flag("train.num_microbatches", 2 * k),
            )
        )
    data, fsdp = plan.mesh.get("data", 1), plan.mesh.get("fsdp", 1)
    state = groups.get("parameters", 0) + groups.get("optimizer", 0)
    if data > 1 and state > missing:
        found.append(
            Advice(
                f"shard parameters and optimizer state ({state / GIB:.1f} GiB) over data too",
                f"{_flag('mesh.data', 1)} {_flag('mesh.fsdp', data * fsdp)}",
            )
        )
    if c.optimizer.moment_dtype == "float32" and groups.get("optimizer", 0) / 2 > missing / 2:
        found.append(
            Advice("store moments in half the bytes", _flag("optimizer.moment_dtype", "bfloat16"))
        )
    if remat != "full" and not any("remat" in a.flags for a in found):
        found.append(Advice("save only the inputs of layers", _flag("model.remat", "full")))
    if fsdp % 2 == 0:
        found.append(
            Advice(
                "split activations and gathered parameters over two devices",
                f"{_flag('mesh.fsdp', fsdp // 2)} "
                f"{_flag('mesh.tensor', 2 * plan.mesh.get('tensor', 1))}",
            )
        )
    found.append(Advice("more chips: state is sharded further", "--topology=..."))
    return found


def _to_gain(plan: Any, experiment: Experiment) -> list[Advice]:
    c = experiment.config
    found = []
    binding, room = plan.times.binding, plan.headroom or 0
    remat = getattr(c.model, "remat", "full")
    again = plan.work.flops / plan.model_flops - 1 if plan.model_flops else 0.0
    k = c.train.num_microbatches
    if binding == "compute" and remat in REMAT[2:] and room > 0.1 * (plan.capacity or 0):
        weaker = REMAT[REMAT.index(remat) - 1]
        found.append(
            Advice(
                f"{again:.0%} more FLOPs than the model has, and {room / GIB:.1f} GiB are free: "
                "save more, compute less again",
                _flag("model.remat", weaker),
            )
        )
    if "fsdp" in binding and k > 1:
        found.append(
            Advice(
                "every micro-batch gathers the parameters again: take fewer",
                _flag("train.num_microbatches", k // 2),
            )
        )
    tensor, fsdp = plan.mesh.get("tensor", 1), plan.mesh.get("fsdp", 1)
    state = plan.memory.groups.get("parameters", 0) + plan.memory.groups.get("optimizer", 0)
    if any("as all-reduces of zeros" in w for w in plan.warnings) and fsdp >= 64 and room > state:
        found.append(
            Advice(
                "gathers over 32 devices stay gathers: half the bytes",
                f"{_flag('mesh.data', plan.mesh.get('data', 1) * fsdp // 32)} "
                f"{_flag('mesh.fsdp', 32)}",
            )
        )
    if "tensor" in binding and tensor > 1:
        found.append(
            Advice(
                "activations cross tensor's links in every layer: shard parameters instead",
                f"{_flag('mesh.tensor', tensor // 2)} {_flag('mesh.fsdp', fsdp * 2)}",
            )
        )
    if "links" in binding or binding in ("HBM", "network"):
        size = plan.rows * 2
        found.append(
            Advice(
                f"{binding} binds, and takes about as long for more tokens",
                _flag("data.batch_size", size),
            )
        )
    if room > 0.4 * (plan.capacity or math.inf):
        found.append(
            Advice(
                f"{room / GIB:.1f} GiB of {(plan.capacity or 0) / GIB:.1f} GiB are free: larger "
                "batches, or fewer chips",
                _flag("data.batch_size", plan.rows * 2),
            )
        )
    if binding == "network" and c.train.num_microbatches == 1:
        found.append(
            Advice("cross the network once for more tokens", _flag("train.num_microbatches", 2))
        )
    unique: dict[str, Advice] = {}
    for a in found:
        unique.setdefault(a.flags, a)
    return list(unique.values())
