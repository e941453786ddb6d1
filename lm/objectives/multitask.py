"""Several objectives at once: every source has its own, and every task its own loss."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.components import Task, component
from lm.config.fields import field
from lm.data.rows import Rows
from lm.objectives import ModelInterface, Objective, RowGenerator
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import HostBatch


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: dict[str, Task] = field(
        {}, "Of each task: the name of an objective, its sources (paths of stores), its fields."
    )


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the objective that applies to each source's rows the objective of its task.

    In a config, `lm.config.conversion.task` writes a section, and data.weights mixes the sources:

        config.objective.tasks = {
            "translate": task("seq2seq", ("data/pairs/train", "data/pairs/validation")),
            "text": task("causal", ("data/text/train", "data/text/validation")),
        }

    A batch has rows of all tasks; `Batch.tasks` numbers them in the order of their names, and the
    metrics `loss/TASK` are those of their own tokens. All have a prefix mask where one task has.
    """
    if not config.tasks:
        raise ValueError(
            "config.objective.tasks is empty: name at least one task (lm.config.conversion.task "
            "writes one)"
        )
    tasks = dict(sorted(config.tasks.items()))
    inner = {
        name: component("lm.objectives", task.name).build(task.config, tokenizer, interface)
        for name, task in tasks.items()
    }
    for name, objective in inner.items():
        if objective.loss is not None or objective.pairs is not None or objective.parts:
            raise ValueError(
                f"config.objective.tasks.{name} ({tasks[name].name}) brings a loss of its own: "
                "tasks of a batch share the cross-entropy over all ids"
            )
    examples = [_on_empty_rows(objective) for objective in inner.values()]
    with_prefix = any(batch.inputs.bidirectional is not None for batch in examples)
    by_source: dict[str, Objective] = {}
    for number, (name, task) in enumerate(tasks.items()):
        if not task.sources:
            raise ValueError(f"config.objective.tasks.{name}.sources names no store")
        for source in task.sources:
            if source in by_source:
                raise ValueError(f"config.objective.tasks: two tasks have the source {source}")
            by_source[source] = _with_task(inner[name], number, with_prefix)

    def multitask(rows: Rows, rng: RowGenerator) -> HostBatch:
        raise AssertionError("rows of several tasks have no common objective: use `for_source`")

    first = next(iter(inner.values()))
    return Objective(multitask, first.layout, tasks=tuple(tasks), by_source=by_source)


def _with_task(objective: Objective, number: int, with_prefix: bool) -> Objective:
    """Return the objective whose batches have their task's number, and a prefix mask if asked."""

    def make(rows: Rows, rng: RowGenerator) -> HostBatch:
        batch = objective(rows, rng)
        inputs = batch.inputs
        if with_prefix and inputs.bidirectional is None:
            inputs = dataclasses.replace(inputs, bidirectional=np.zeros(inputs.ids.shape, bool))
        tasks = np.full(len(rows.ids), number, np.int32)
        return dataclasses.replace(batch, inputs=inputs, tasks=tasks)

    return dataclasses.replace(objective, make=make)


def _on_empty_rows(objective: Objective) -> HostBatch:
    """Return the batch of a row of padding, which has the structure of all batches."""
    zeros = np.zeros((1, objective.layout.length), np.int32)
    fields = zeros if len(objective.layout.fields) > 1 else None
    rows = Rows(zeros, zeros, zeros, np.full_like(zeros, -1), fields)
    return objective(rows, np.random.default_rng)
