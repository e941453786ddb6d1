"""Equivalence of a mesh and one device: three training steps of both, compared array by array.

In float32 and with plain SGD, whose updates are linear in the gradient: Adam would divide gradients
that are nothing but rounding noise by their own size. Momentum is off, so that the optimizer's
state after a step is that step's clipped gradient. Dropout, padding, uneven segments and uneven
weights are on, as these are the cases in which meshes go wrong.

The first step of the mesh starts from parameters initialized on it, each later one from the state
of the one device: continued from its own results it would also differ by the rounding of earlier
steps, amplified by the curvature of the loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from lm.compiled import hlo
from lm.config import conversion
from lm.config.tree import ConfigTree, leaves
from lm.optim.param_tree import is_box, named_leaves
from lm.parallel.sharding import AXES
from lm.planning.plan import with_changes, without_data
from lm.training.experiment import Experiment
from lm.types import Device, HostBatch, HostTokens, TrainState

STEPS = 3
# Largest difference as a fraction of the largest entry of an array. Sums in another order differed
# by up to 1.4e-6 on the meshes of tests/test_verify.py; the smallest seeded defect by 1e-2.
TOLERANCE = 5e-6

BATCH, LENGTH, HEADS = 16, 64, 16
GRID, CODES = 4, 4  # of pictures; codes are beside the 259 ids of bytes
# The sizes of a shrunk model; a config's structure (kinds of layer, ratios of heads, biases, norms,
# experts) stays.
SIZES = {
    "vocab_size": 256 + 8,
    "num_layers": 4,
    "embed_dim": 64,
    "mlp_dim": 96,
    "head_dim": 8,
    "max_length": LENGTH,
}
SIZES_WHERE_SET = {
    "num_encoder_layers": 3,
    "pooler_dim": SIZES["embed_dim"],
    "embedding_dim": SIZES["embed_dim"],
    "patch_size": 4,
    "num_heads": HEADS,
    "window": 9,
    "moe.num_experts": 8,
    "moe.mlp_dim": 48,
    "moe.shared_mlp_dim": 48,
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """|mesh - one device| / max |one device| of one array, or of the worst of a tree."""

    step: int
    what: str  # objective, gradient norm, gradients, parameters or counts
    worst: str  # name of the array
    value: float

    @property
    def ok(self) -> bool:
        return self.value <= TOLERANCE  # nan is not


@dataclasses.dataclass(frozen=True)
class EquivalenceReport:
    differences: tuple[Difference, ...]
    layout: tuple[str, ...]  # arrays on devices that should not hold them

    @property
    def ok(self) -> bool:
        return all(d.ok for d in self.differences) and not self.layout


def shrink(config: ConfigTree) -> ConfigTree:
    """The same structure in small: a few layers, narrow, short rows of synthetic data."""
    given = dict(leaves(config.model.to_dict()))
    towers = ("", "vision.", "text.")
    sizes: dict[str, object] = {
        tower + name: size
        for tower in towers
        for name, size in SIZES.items()
        if tower + name in given
    }
    sizes |= {
        tower + name: size
        for tower in towers
        for name, size in SIZES_WHERE_SET.items()
        if given.get(tower + name)
    }
    if patch := sizes.get("vision.patch_size"):
        sizes["image_size"] = 4 * int(str(patch))
    if given.get("num_kv_heads"):
        sizes["num_kv_heads"] = max(1, HEADS * given["num_kv_heads"] // given["num_heads"])
    pattern = given.get("layer_pattern") or ()
    if len(pattern) > SIZES["num_layers"]:  # both kinds, in the order of their first use
        sizes["layer_pattern"] = tuple(dict.fromkeys(pattern))
    if given.get("moe.num_experts"):
        k = sizes["moe.num_experts_per_token"] = min(2, given["moe.num_experts_per_token"])
        if given["moe.num_groups"] > 1:
            sizes |= {"moe.num_groups": 4, "moe.num_groups_chosen": k}
    return with_changes(config, {f"model.{name}": size for name, size in sizes.items()})


def prepare(config: ConfigTree, *, dropout: bool = True) -> ConfigTree:
    """The config for the comparison: float32, SGD, dropout, synthetic rows."""
    config = config.copy_and_resolve_references()
    length = min(config.model.get("max_length") or LENGTH, LENGTH)
    changes: dict[str, object] = {
        "model.dtype": "float32",
        "data.length": length,
        "data.batch_size": BATCH * config.train.num_microbatches,
        "data.batch_size_per_device": None,
        "loader.kind": "thread",
        "loss.chunk_size": 256,
        "optimizer.b1": 0.0,
        "optimizer.nesterov": False,
        "optimizer.learning_rate": 0.5,
        "optimizer.moment_dtype": "float32",
        "optimizer.schedule.kind": "constant",
        "optimizer.schedule.warmup_steps": 0,
        "optimizer.clip_norm": 1.0,  # the global norm is part of what must agree
        "guard.spike_factor": 0.0,
        "train.num_steps": STEPS,
        "train.num_tokens": None,
    }
    changes |= {"model.dropout": 0.1 * dropout} if "dropout" in config.model else {}
    if config.data.encoder_length is not None:  # shorter targets: a text leaves less to predict
        changes |= {"data.encoder_length": length, "data.length": length // 4}
    if "num_codes" in config.objective:
        changes |= {"objective.grid_size": GRID, "objective.num_codes": CODES}
        if config.data.encoder_length is not None:
            changes |= {"data.length": GRID**2}
    if "fields" in config.objective:  # synthetic rows have one
        objective = "causal" if config.data.encoder_length is None else "span_corruption"
        config.objective = conversion.default(objective=objective).objective
    config.optimizer.name = "sgd"
    return with_changes(without_data(config), changes)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of one device, on the host."""

    batch: HostBatch
    state: TrainState  # after it
    arrays: dict[str, object]  # that must agree, by `Difference.what`


def verify(
    config: ConfigTree,
    mesh: Mapping[str, int],
    devices: Sequence[Device],
    *,
    num_microbatches: int = 1,
) -> EquivalenceReport:
    """Compare `mesh`, {axis: size} of `config.mesh`, over all `devices` with the first of them.

    They may be those of several processes: each then compares the shards that it holds with its own
    first device, and all return the largest differences of any.

    Raises:
        ValueError: the config or the mesh doesn't fit (see `Experiment`).
    """
    many = on_mesh(config, mesh, devices, num_microbatches=num_microbatches)
    return compare(many, on_one_device(config, devices, dropout=num_microbatches == 1))


def on_mesh(
    config: ConfigTree,
    mesh: Mapping[str, int],
    devices: Sequence[Device],
    *,
    num_microbatches: int = 1,
) -> Experiment:
    """The experiment of `config`, prepared, on a mesh of `devices`. Several micro-batches, which
    have random keys of their own, are without dropout.
    """
    if unknown := set(mesh) - {*AXES, "slices"}:
        raise ValueError(f"config.mesh has no axis {sorted(unknown)}; there are {AXES} and slices")
    changes = {f"mesh.{axis}": size for axis, size in {"data": 1, **mesh}.items()}
    changes["train.num_microbatches"] = num_microbatches
    prepared = prepare(config, dropout=num_microbatches == 1)
    return Experiment(with_changes(prepared, changes), across_processes(mesh, devices))


def on_one_device(
    config: ConfigTree, devices: Sequence[Device], *, dropout: bool = True
) -> tuple[Step, ...]:
    """The reference steps, on the first of `devices` that is of this process."""
    changes = {f"mesh.{axis}": 1 for axis in (*AXES, "slices")}
    changes |= {"mesh.rules": (), "train.num_microbatches": 1}
    first = [d for d in devices if d.process_index == jax.process_index()][:1]
    one = Experiment(with_changes(prepare(config, dropout=dropout), changes), first)
    steps: list[Step] = []
    state = one.init_state()
    for number in range(STEPS):
        batch = _uneven(one.train_data.batch_at(number, np.arange(one.batch_size)), seed=number)
        state, arrays = _run(one, state, batch)
        # copies: the arguments of the next step are donated to it
        steps.append(Step(batch, *jax.tree.map(np.array, (state, arrays))))
    return tuple(steps)


def compare(many: Experiment, steps: Sequence[Step]) -> EquivalenceReport:
    """The differences of the same steps on a mesh, and faults of the layout."""
    differences: list[Difference] = []
    for number, step in enumerate(steps):
        state = many.init_state() if number == 0 else _placed(steps[number - 1].state, many)
        _, arrays = _run(many, state, step.batch)
        found = {what: relative(tree, arrays[what]) for what, tree in step.arrays.items()}
        gathered = multihost_utils.process_allgather(found)
        for what, tree in step.arrays.items():
            values = np.max(gathered[what], axis=0)  # nan is the largest
            worst = int(np.argmax(values))
            name = list(named_leaves(tree))[worst]
            differences.append(Difference(number, what, name, float(values[worst])))
    return EquivalenceReport(tuple(differences), tuple(_layout(many)))


def _run(
    experiment: Experiment, state: TrainState, batch: HostBatch
) -> tuple[TrainState, dict[str, object]]:
    """(the state after a step, the arrays to compare)."""
    local = jax.tree.map(lambda x: x[experiment.rows], batch)
    state, *outputs = experiment.train_step(state, experiment.make_global_batch(local))
    sums, info = map(dict, outputs)
    momentum = optax.tree.get(state.opt_state, optax.TraceState.__name__)
    counts = {k: v for k, v in named_leaves((state, info)).items() if v.dtype.kind in "iub"}
    arrays = {
        "objective": sums,
        "gradient norm": info["grad_norm"],
        "gradients": momentum.trace,
        "parameters": state.params,
        "counts": counts,
    }
    return state, arrays


def _placed(state: TrainState, experiment: Experiment) -> TrainState:
    return jax.tree.map(
        lambda x, like: jax.make_array_from_callback(x.shape, like.sharding, lambda at: x[at]),
        *(state, experiment.abstract_state),
    )


def across_processes(mesh: Mapping[str, int], devices: Sequence[Device]) -> list[Device]:
    """Order the devices so that neighbours on any axis of the mesh are in different processes and
    every collective crosses processes.

    A checkerboard: a device's process is the sum of its coordinates, modulo processes. With slices,
    a slice is a run of processes, as on real ones: the order of the devices.

    Raises:
        ValueError: no axis is divisible by the number of processes.
    """
    groups: dict[int, list[Device]] = {}
    for device in devices:
        groups.setdefault(device.process_index, []).append(device)
    if mesh.get("slices", 1) > 1 or len(groups) == 1:
        return list(devices)
    sizes = [mesh[axis] for axis in AXES if axis in mesh]
    if all(size % len(groups) for size in sizes) or math.prod(sizes) != len(devices):
        raise ValueError(
            f"config.mesh ({dict(mesh)}) must have an axis that is divisible by the number of "
            f"processes ({len(groups)}), and as many devices as they have ({len(devices)})"
        )
    waiting = [iter(groups[process]) for process in sorted(groups)]
    return [next(waiting[sum(at) % len(groups)]) for at in np.ndindex(*sizes)]


def _uneven(batch: HostBatch, seed: int) -> HostBatch:
    """The same tokens as segments of uneven lengths, with padding, and with uneven weights."""
    rng = np.random.default_rng(seed)

    def cut(tokens: HostTokens) -> HostTokens:
        segments = np.zeros_like(tokens.segments)
        positions = np.zeros_like(tokens.positions)
        length = segments.shape[1]
        if length == 1:  # of a picture's class
            return tokens
        for row in range(len(segments)):
            ends = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
            for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                segments[row, start:end] = number + 1
                positions[row, start:end] = np.arange(end - start)
        return dataclasses.replace(tokens, segments=segments, positions=positions)

    inputs = cut(batch.inputs)
    encoder = None if batch.encoder is None else cut(batch.encoder)
    shape = batch.weights.shape
    weights = rng.choice([0, 0.25, 1, 3], shape) * (inputs.segments[:, : shape[1]] != 0)
    # half of the rows score far fewer tokens: a mean of devices' means is another number
    weights[: len(weights) // 2] *= np.arange(weights.shape[1]) < 8
    weights = weights.astype(np.float32)
    return dataclasses.replace(batch, inputs=inputs, encoder=encoder, weights=weights)


def relative(one: object, many: object) -> np.ndarray:
    """The difference of every array, as in `Difference`, over the shards of this process: [arrays].

    Integers and booleans differ by 1 where they aren't equal.
    """
    leaves, found = named_leaves(one), []
    for name, other in named_leaves(many).items():
        a = np.asarray(leaves[name], np.float64)
        shards = [(s.index, np.asarray(s.data, np.float64)) for s in other.addressable_shards]
        largest = np.max([np.abs(a[index] - shard).max() for index, shard in shards])
        if other.dtype.kind in "iub":
            found.append(largest != 0)
            continue
        # A key's bias raises all scores of a query alike: without rotary positions its gradient is
        # zero up to rounding, which has the scale of the query's bias.
        scale = np.asarray(leaves.get(name.replace("key.bias", "query.bias"), a))
        found.append(largest / np.max([np.abs(a).max(), np.abs(scale).max(), 1e-30]))
    return np.array(found, np.float64)


def _layout(experiment: Experiment) -> list[str]:
    """Arrays that a device holds or computes and others should."""
    rules, compiled = experiment.rules, experiment.train_step
    wanted = named_leaves((experiment.abstract_state, experiment.abstract_batch))
    given = jax.tree.leaves(compiled.input_shardings[0])
    problems = [
        f"{name} is {got}, not {leaf.sharding}"
        for (name, leaf), got in zip(wanted.items(), given, strict=True)
        if not got.is_equivalent_to(leaf.sharding, leaf.ndim)
    ]
    params = named_leaves(experiment.abstract_params)
    owners = jax.tree.leaves(rules.shardings(experiment.boxed_params))
    boxes = jax.tree.leaves(experiment.boxed_params, is_leaf=is_box)
    for (name, leaf), owner, box in zip(params.items(), owners, boxes, strict=True):
        # biases by distance have no such dimension, and a few numbers for each head
        is_matrix = leaf.ndim >= 2 + ("layers" in box.names) and "embed" in box.names
        if rules.mesh.shape["fsdp"] > 1 and is_matrix and owner.is_fully_replicated:
            problems.append(f"parameter {name} {leaf.shape} and its moments are on every device")
    return problems + _whole_activations(experiment, hlo.of_compiled(compiled))


def _whole_activations(experiment: Experiment, program: hlo.Module) -> list[str]:
    """Arrays of the program of one device with features of every token of the batch."""
    rules, data = experiment.rules, experiment.config.data
    lengths = {data.length, data.encoder_length or data.length}
    if rules.size("batch") * rules.size("length") == 1:
        return []
    rows = experiment.batch_size // experiment.config.train.num_microbatches
    seen: dict[str, str] = {}
    for instruction in program.instructions.values():
        for shape in instruction.shapes:  # [B, T, D], [B, N, T, H]
            inner = set(shape.dims[1:-1])
            if shape.dtype in ("f32", "bf16") and shape.dims[:1] == (rows,) and lengths & inner:
                seen.setdefault(str(shape), instruction.opcode)
    return [f"{shape} holds the tokens of all devices ({op})" for shape, op in seen.items()]


def describe(report: EquivalenceReport) -> str:
    """The report as a table."""
    lines = [f"{'step':>4}  {'compared':14} {'difference':>10}  {'of':40}"]
    for d in report.differences:
        mark = "" if d.ok else "  WRONG"
        lines.append(f"{d.step:4}  {d.what:14} {d.value:10.1e}  {d.worst:40}{mark}".rstrip())
    lines += [f"layout: {problem}" for problem in report.layout] or ["layout: as the config says"]
    return "\n".join(lines)
