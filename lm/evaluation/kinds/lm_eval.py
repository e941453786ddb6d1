"""Tasks of EleutherAI's harness inside a run (pip install lm_eval).

A harness has no figure before its last request: where the time is over sooner, there is none.
"""

from __future__ import annotations

import dataclasses

from lm.config.fields import field
from lm.config.schema import EvaluationConfig
from lm.evaluation import lm_eval_adapter
from lm.evaluation.kinds import check_generates, check_packages, named
from lm.generation.generator import Generator
from lm.generation.score import Scorer
from lm.training.experiment import Experiment
from lm.training.run_evaluations import Budget, Result
from lm.types import Params


@dataclasses.dataclass(frozen=True)
class Config(EvaluationConfig):
    tasks: tuple[str, ...] = field(
        (),
        "YAML files of tasks, or names of the harness's own, which fetch their data.",
    )
    limit: int | None = field(None, "Documents of each task; unset: all.", ge=1)
    num_fewshot: int | None = field(
        None, "Examples before each document; unset: as the task says.", ge=0
    )
    batch_size: int = field(16, "Texts that are generated together.", ge=1)


def build(config: Config, experiment: Experiment, path: str) -> Harness:
    if not config.tasks:
        raise ValueError(f"{path}.tasks is empty: name a task's YAML file")
    check_packages(["lm_eval"], path)
    check_generates(experiment, path)
    with named(f"{path}.tasks"):
        lm_eval_adapter.load(config.tasks)
    return Harness(config, experiment)


class _OutOfTime(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Harness:
    config: Config
    experiment: Experiment

    def run(self, params: Params, budget: Budget) -> Result | None:
        c, parts = self.config, (self.experiment.model, params, self.experiment.tokenizer)

        def report(done: int, count: int) -> None:
            budget.report(done, count)
            if done < count and budget.is_spent():
                raise _OutOfTime

        model = lm_eval_adapter.make_model(
            Scorer(*parts), Generator(*parts), batch_size=c.batch_size, report=report
        )
        try:
            found = lm_eval_adapter.evaluate(
                model, c.tasks, num_fewshot=c.num_fewshot, limit=c.limit
            )
        except _OutOfTime:
            return None
        count = sum(n["effective"] for n in found["n-samples"].values())
        return Result(lm_eval_adapter.figures(found), count, count)
