"""Statistics of layers every `log.layers_every` steps: RUN/layers.jsonl.

A program of its own, before the train step, on its state and on some rows of its batch: the train
step has no instruction more, and keeps its bits. Its gradients are those of these rows, in two
halves where they divide, and its update is the optimizer's own for them: no copy of the parameters
has to live through a step, and what it needs beside the state is less than what the step does.

Costs, in train steps: about the share of rows, at most a quarter unless devices have fewer than
four each, and one update of the optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.layers import activation_statistics
from lm.layers.activation_statistics import COLLECTION
from lm.optim import chain, optimizer_state, param_tree
from lm.optim.param_tree import flatten
from lm.parallel import sharding
from lm.storage.epaths import StoragePath
from lm.telemetry import jsonl, metrics
from lm.telemetry.scalars import Scalars
from lm.training import gradient_noise_scale, losses
from lm.types import Array, Batch, Model, Params, Sums, TrainState, Tree

if TYPE_CHECKING:
    from lm.training.experiment import Experiment

SHARE = 4  # at most one row of so many is measured
PARTS = 2  # halves of the rows, from which the noise of gradients is estimated
_LEAVES = {"weight", "bias", "scale", "embedding"}  # of a module, which are one group
Figures: TypeAlias = dict[str, Array]  # {"statistic/group": [] or [L]}


class MeasuredModel:
    """A model that keeps the statistics which its layers sow in `apply`."""

    num_pipeline_microbatches = 1  # layers that sow are run one by one

    def __init__(self, model: Model) -> None:
        self._model = model
        self.sown: dict[str, list[Array]] = defaultdict(list)  # {path of the module and name: ...}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        output, kept = self._model.apply(variables, *args, mutable=[COLLECTION], **options)
        for name, values in flatten(kept.get(COLLECTION, {})).items():
            self.sown[name].extend(values)
        return output


def num_rows(batch_size: int, shards: int, num_microbatches: int) -> int:
    """Rows that are measured: as many on every device, at most one of SHARE, and of as many as a
    micro-batch has; one a device where that is none.
    """
    most = batch_size // max(SHARE, num_microbatches)
    fits = [n for n in range(shards, most + 1, shards) if batch_size % n == 0]
    return max(fits, default=shards)


def position_buckets(length: int) -> list[tuple[int, int]]:
    """[(first, last)] of positions 0, 1, 2-3, 4-7, ... of a document, up to `length` of them."""
    starts = [0, *(2**i for i in range((length - 1).bit_length()))]
    return [(a, b - 1) for a, b in zip(starts, [*starts[1:], length], strict=True)]


class LayerStatistics:
    """The measurements of a run, and the file that they are written to. `first_step` is where this
    process starts: records from there on, which will be made again, are dropped.
    """

    def __init__(
        self, experiment: Experiment, workdir: str, *, first_step: int, active: bool
    ) -> None:
        self._experiment, self._workdir, self._active = experiment, workdir, active
        self._every = experiment.config.log.layers_every
        self._pending: dict[int, Scalars] = {}
        self._file = self._open(first_step) if self._every else None

    def _open(self, step: int) -> jsonl.Writer:
        path = StoragePath(self._workdir) / metrics.LAYERS_FILE
        kept = [record for record in jsonl.read(path) if record["step"] < step]
        return jsonl.Writer(path, kept, active=self._active)

    def measure(self, state: TrainState, batch: Batch, step: int) -> None:
        """Start measuring `state`, that before step number `step`, if one is due."""
        if self._file is not None and step % self._every == 0:
            sources = source_numbers(self._experiment, step)
            self._pending[step] = self._experiment.measure_layers(state, batch, sources)

    def record(self, step: int) -> jsonl.Record | None:
        """Write what was measured before step number `step`, which the devices have done, if it
        was, and return it.
        """
        if self._file is None or (found := self._pending.pop(step, None)) is None:
            return None
        record = as_record(step, jax.device_get(found))
        self._file.append(record)
        return record

    def roll_back(self, step: int) -> None:
        """Drop the records of the states from step number `step` on, which will be made again."""
        self._pending.clear()
        if self._file is not None:
            self._file.close()
            self._file = self._open(step)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def as_record(step: int, found: Mapping[str, np.ndarray]) -> jsonl.Record:
    """{"step", statistic: {group: number, or numbers of layers}, statistic: number}."""
    record: jsonl.Record = {"step": step}
    for name in sorted(found, key=_natural_order):
        statistic, _, group = name.partition("/")
        value = np.vectorize(lambda x: float(f"{x:.5g}"), otypes=[float])(found[name]).tolist()
        if not group:
            record[statistic] = value
        elif not (statistic.startswith("loss_by") and math.isnan(value)):  # no such tokens
            record.setdefault(statistic, {})[group] = value
    if record.get("signal", 0.0) > 0:
        record["noise_scale"] = float(f"{record['noise'] / record['signal']:.5g}")
    return record


def _natural_order(name: str) -> list[tuple[bool, int, str]]:
    """A key by which "4-7" is before "16-31"."""
    parts = re.split(r"(\d+)", name)
    return [(x.isdigit(), int(x) if x.isdigit() else 0, x) for x in parts]


def source_numbers(experiment: Experiment, step: int) -> Array:
    """int32 [B], the number among `data.train` of the source of each row of the batch of a step."""
    numbers: Any = experiment.train_data.source_numbers(step, experiment.rows)
    found: Any = sharding.make_global_batch(experiment.rules, numbers, experiment.batch_size)
    return found


def lower(experiment: Experiment) -> jax.stages.Lowered:
    """`measure` as a function of (state, batch, sources)."""
    rules = experiment.rules
    jitted = jax.jit(
        functools.partial(measure, experiment),
        out_shardings=rules.sharding(),
        compiler_options=experiment.compiler_options,
    )
    sources: Any = jax.ShapeDtypeStruct(
        (experiment.batch_size,), jnp.int32, sharding=rules.sharding("batch")
    )
    return jitted.lower(experiment.abstract_state, experiment.abstract_batch, sources)


def measure(experiment: Experiment, state: TrainState, batch: Batch, sources: Array) -> Scalars:
    """Every statistic of a state and of `num_rows` rows of the batch of its step, [] or [L]:

    gradient_norm  of the mean loss per token, of each group of parameters, before clipping
    weight_norm, update_to_weight    norms of the parameters, and of the update by these
                   gradients, with all that the optimizer adds, divided by them
    noise, signal  as `gradient_noise_scale.estimate`, where the rows are two halves
    loss_by_position, loss_by_source    mean nll of tokens by their position in the document and by
                   the source of their row, for the token cross-entropy
    and those of `activation_statistics.summarize`.
    """
    e, config = experiment, experiment.config
    rows = num_rows(e.batch_size, e.rules.size("batch"), config.train.num_microbatches)
    parts = PARTS if rows % (PARTS * e.rules.size("batch")) == 0 and not e.objective.pairs else 1
    objective, classes = e.objective, {}
    if objective.loss is None and objective.pairs is None and not objective.parts:
        classes = token_classes(e, batch, sources)
        objective = dataclasses.replace(objective, tasks=tuple(classes))
        batch = dataclasses.replace(batch, tasks=jnp.stack([*classes.values()], axis=-1))
    frozen_params, trained = param_tree.split(state.params, e.initializer.frozen)
    teacher = None if e.teacher is None else (e.teacher.model, state.teacher)
    no_loss_of = chain.statistics(e.boxed_params)
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def loss_of(trained: Params, batch: Batch, rng: Array) -> tuple[Array, Any]:
        model: Any = MeasuredModel(e.model)
        options: Any = {"train": True, "step": state.step, "teacher": teacher}
        loss_fn = losses.make(objective, model, config.loss, **options)
        total, sums = loss_fn(param_tree.join(trained, frozen_params), batch, rng)
        return total, (sums, {name: joined(name, jnp.stack(x)) for name, x in model.sown.items()})

    def part(i: Array) -> tuple[tuple[Params, Sums], dict[str, Array]]:
        def take(x: Array) -> Array:  # strided, so that no row moves to another device
            x = x.reshape(rows // parts, parts, -1, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)[:, 0]

        own: Batch = jax.tree.map(take, batch)
        key = jax.random.fold_in(rng, i)
        grads, (sums, sown) = jax.grad(loss_of, has_aux=True)(trained, own, key)
        of_loss = param_tree.split(grads, no_loss_of)[1]
        return (grads, sums | gradient_noise_scale.micro_batch_sums(of_loss, sums["tokens"])), sown

    def add(total: Tree, i: Array) -> tuple[Tree, dict[str, Array]]:
        found, sown = part(i)
        return jax.tree.map(jnp.add, total, found), sown

    shapes = jax.eval_shape(part, jnp.int32(0))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, sums), sown = jax.lax.scan(add, zeros, jnp.arange(parts))
    tokens = jnp.maximum(sums["tokens"], 1.0)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    grads = jax.lax.with_sharding_constraint(
        grads, e.initializer.trained(e.rules.shardings(e.boxed_params))
    )
    figures = _of_parameters(e, state, grads)
    figures |= _of_activations({name: joined(name, x) for name, x in sown.items()})
    if parts > 1:
        norm = optax.tree.norm(param_tree.split(grads, no_loss_of)[1])
        figures |= gradient_noise_scale.estimate(sums, norm)
    for name in classes:
        figures[name] = sums[f"loss/{name}"] / sums[f"tokens/{name}"]
    return Scalars.pack({name: x.astype(jnp.float32) for name, x in figures.items()})


def token_classes(experiment: Experiment, batch: Batch, sources: Array) -> dict[str, Array]:
    """{statistic/class: bool [B, T], the targets in it}: by the position in the document, where
    every input has a target, and by the source of the row.
    """
    found, position, shape = {}, batch.inputs.positions, batch.targets.shape
    buckets = position_buckets(shape[1]) if position.shape == shape else []
    for first, last in buckets:
        name = str(first) if first == last else f"{first}-{last}"
        found[f"loss_by_position/{name}"] = (position >= first) & (position <= last)
    for i, name in enumerate(metrics.short_names([*experiment.train_data.sources]).values()):
        found[f"loss_by_source/{name}"] = jnp.broadcast_to((sources == i)[:, None], shape)
    return found


def joined(name: str, values: Array) -> Array:
    """values: [n, ...] that were sown as `name`."""
    return (jnp.max if name.endswith("_max") else jnp.sum)(values, axis=0)


def _of_activations(sown: Mapping[str, Array]) -> Figures:
    """sown: by the path of the module and the name of the value."""
    of_modules: dict[str, dict[str, Array]] = defaultdict(dict)
    for path, values in sown.items():
        module, _, name = path.rpartition(".")
        of_modules[module][name] = values
    return {
        f"{statistic}/{module}": value
        for module, values in of_modules.items()
        for statistic, value in activation_statistics.summarize(values).items()
    }


def group_of(name: str) -> str:
    """The group of a parameter: its module, or its own name."""
    module, _, leaf = name.rpartition(".")
    return module if module and leaf in _LEAVES else name


def _norms(experiment: Experiment, tree: Params) -> Figures:
    """{group: norm [], or [L] of stacked layers}, of the parameters that are no statistics."""
    boxes = flatten(experiment.boxed_params)
    left_out = chain.statistics(experiment.boxed_params)
    squares: Figures = {}
    for name, x in flatten(tree).items():
        if name in left_out:
            continue
        is_stacked = boxes[name].names[:1] == ("layers",)
        square = jnp.square(x.astype(jnp.float32))
        total = jnp.sum(square, axis=tuple(range(is_stacked, x.ndim)))
        squares[group_of(name)] = squares.get(group_of(name), 0.0) + total
    return {group: jnp.sqrt(square) for group, square in squares.items()}


def _of_parameters(experiment: Experiment, state: TrainState, grads: Params) -> Figures:
    """grads: of the trained parameters, per token."""
    trained = param_tree.split(state.params, experiment.initializer.frozen)[1]
    before = optimizer_state.set_schedule_step(sharding.on_device(state.opt_state), state.step)
    update: Any = experiment.tx.update(grads, before, trained)[0]
    updates, before_update = _norms(experiment, update), _norms(experiment, trained)
    found = {f"gradient_norm/{group}": x for group, x in _norms(experiment, grads).items()}
    found |= {f"weight_norm/{group}": x for group, x in _norms(experiment, state.params).items()}
    for group, size in before_update.items():  # a bias that begins at 0 has no ratio yet
        ratio = updates[group] / jnp.where(size > 0, size, 1.0)
        found[f"update_to_weight/{group}"] = jnp.where(size > 0, ratio, jnp.nan)
    return found
