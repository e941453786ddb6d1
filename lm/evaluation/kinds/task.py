"""The records of a task inside a run: classification or generation, as by scripts/predict.py.

Figures are percentages of lm.evaluation.task_metrics; their standard errors are those of a
jackknife over groups of records.
"""

from __future__ import annotations

import dataclasses

from lm.config.fields import field
from lm.config.schema import EvaluationConfig
from lm.evaluation import task_metrics, task_records
from lm.evaluation.kinds import check_generates, check_packages, named
from lm.evaluation.predict import GREEDY, predict, room_for_source, task_config
from lm.evaluation.task_metrics import METRICS, PACKAGES
from lm.generation.beam import BeamSearch
from lm.objectives import classification
from lm.preparation.corpus import Corpus
from lm.telemetry.metrics import ERROR_SUFFIX
from lm.training.experiment import Experiment
from lm.training.run_evaluations import Budget, Result
from lm.types import Params


@dataclasses.dataclass(frozen=True)
class Config(EvaluationConfig):
    data: tuple[str, ...] = field((), "Files of records, as scripts/predict.py reads them.")
    metrics: tuple[str, ...] = field(
        (), "What to measure, as of scripts/predict.py.", choices=METRICS
    )
    fields: tuple[tuple[str, str], ...] = field(
        (), "(field of the objective, column of the records); empty: of equal names."
    )
    references: str = field("", "Column with a reference in each of its lines; empty: the target.")
    task: str | None = field(None, "Of a run of several tasks: which one.")
    limit: int | None = field(None, "Only the first records; unset: all.", ge=1)
    max_new_tokens: int = field(64, "Tokens of a text.", ge=1)
    num_beams: int = field(0, "Beams of a search; 0: greedy.", ge=0)
    batch_size: int = field(32, "Records between two looks at the clock, texts at once.", ge=1)


def build(config: Config, experiment: Experiment, path: str) -> Task:
    for name in ("data", "metrics"):
        if not getattr(config, name):
            raise ValueError(f"{path}.{name} is empty")
    check_packages([PACKAGES[name] for name in config.metrics if name in PACKAGES], path)
    with named(f"{path}.task"):
        objective = task_config(experiment, config.task)
    if isinstance(objective, classification.Config):
        if (stages := experiment.rules.size("layers")) > 1:
            raise ValueError(f"{path} needs config.mesh.stage ({stages}) to be 1")
    else:
        check_generates(experiment, path)
        with named(path):
            room_for_source(experiment, config.max_new_tokens)
    source, target = objective.fields
    columns = {source: source, target: target} | dict(config.fields)
    if unknown := columns.keys() - {source, target}:
        raise ValueError(f"{path}.fields: {', '.join(unknown)} is none of {source}, {target}")
    if config.references:
        columns["references"] = config.references
    with named(f"{path}.data"):
        records, _ = task_records.read(
            Corpus(config.data, columns, validation_fraction=0.0), [*columns]
        )
    records = records[: config.limit]
    lines = "references" if config.references else ""
    references = task_records.references(records, target, lines)
    with named(path):  # several classes of a record, for example
        for name in config.metrics:
            METRICS[name]([refs[0] for refs in references], references)
    return Task(config, experiment, [r.fields[source] for r in records], references)


@dataclasses.dataclass(frozen=True)
class Task:
    config: Config
    experiment: Experiment
    sources: list[str]
    references: list[list[str]]

    def run(self, params: Params, budget: Budget) -> Result:
        c = self.config
        texts, references = [], []
        for part in budget.parts(len(self.sources), c.batch_size):
            found = predict(
                self.experiment,
                params,
                [self.sources[i] for i in part],
                task=c.task,
                max_new_tokens=c.max_new_tokens,
                search=BeamSearch(c.num_beams) if c.num_beams else GREEDY,
                batch_size=c.batch_size,
            )
            texts += [prediction.text for prediction in found]
            references += [self.references[i] for i in part]
        values: dict[str, float] = {}
        for name in c.metrics:
            values |= METRICS[name](texts, references)
            errors = task_metrics.standard_errors(METRICS[name], texts, references)
            values |= {k + ERROR_SUFFIX: error for k, error in errors.items()}
        return Result(values, len(texts), len(self.sources))
