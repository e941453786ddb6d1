"""BLiMP inside a run: the accuracy on minimal pairs, overall and for each phenomenon.

A partial result has as many pairs of each paradigm as of any other, but for one.
"""

from __future__ import annotations

import dataclasses

from lm.config.fields import field
from lm.config.schema import EvaluationConfig
from lm.evaluation import blimp
from lm.evaluation.blimp import Pair
from lm.evaluation.kinds import PART_ROWS, make_scorer, named
from lm.generation.score import Scorer
from lm.telemetry.metrics import ERROR_SUFFIX
from lm.training.experiment import Experiment
from lm.training.run_evaluations import Budget, Result
from lm.types import Params


@dataclasses.dataclass(frozen=True)
class Config(EvaluationConfig):
    data: str = field("", "BLiMP.zip, or a folder with its .jsonl files.")
    limit: int | None = field(None, "Pairs of each paradigm; unset: all.", ge=1)


def build(config: Config, experiment: Experiment, path: str) -> MinimalPairs:
    if not config.data:
        raise ValueError(f"{path}.data is empty: name BLiMP.zip, or a folder with its files")
    with named(f"{path}.data"):
        pairs = blimp.read(config.data, limit=config.limit)
    scorer = make_scorer(experiment, path)
    if scorer.takes_encoder:
        raise ValueError(f"{path}: an encoder-decoder gives no probability to a text by itself")
    return MinimalPairs(scorer, pairs, PART_ROWS * experiment.rules.size("batch") // 2)


@dataclasses.dataclass(frozen=True)
class MinimalPairs:
    scorer: Scorer
    pairs: list[Pair]
    part_size: int  # pairs

    def run(self, params: Params, budget: Budget) -> Result:
        self.scorer.params = params
        pairs, outcomes = [], []
        for part in budget.parts(len(self.pairs), self.part_size):
            pairs += [self.pairs[i] for i in part]
            outcomes += blimp.outcomes(self.scorer, pairs[-len(part) :])
        self.scorer.params = {}  # of a step that is over
        found = blimp.accuracy(pairs, outcomes)
        values = {"accuracy": found.overall, **found.phenomena}
        errors = {"accuracy" if k == "overall" else k: v for k, v in found.errors.items()}
        values |= {name + ERROR_SUFFIX: error for name, error in errors.items()}
        return Result(values, len(pairs), len(self.pairs))
