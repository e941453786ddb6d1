"""A search that learns from its runs: Optuna proposes points, and prunes runs.

Points come from a tree-structured Parzen estimator (Bergstra et al. 2011), seeded for each trial,
so that with one slot the search is a function of its flags. A run is pruned when its loss at an
evaluation is above the median of the earlier runs' at the same step. The study lies in
ROOT/study.log.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm.scaling import run_table
from lm.scaling.sweep import pool, space
from lm.scaling.sweep.pool import Outcome, Trial
from lm.scaling.sweep.space import Axis, Choice, Point
from lm.telemetry import metrics

if TYPE_CHECKING:
    import optuna

STARTUP = 4  # runs at random points, and without pruning, before there is something to learn from


class Search:
    """The trials of a study of `count`, kept below `root`."""

    def __init__(
        self,
        root: Path,
        axes: Sequence[Axis],
        count: int,
        seed: int,
        config: str,
        settings: Sequence[str],
    ) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        root.mkdir(parents=True, exist_ok=True)
        self._root, self._axes, self._count, self._seed = root, axes, count, seed
        self._config, self._settings = config, settings
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(root / "study.log"))),
            study_name="sweep",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        )
        self._seen: dict[str, int] = {}  # run -> size of its metrics when last read

    def runs(self) -> Iterator[Trial]:
        """The trials: first those that had been proposed already."""
        from optuna.samplers import TPESampler

        for trial in self._study.trials:
            yield self._run(self._trial(trial.number))
        while (number := len(self._study.trials)) < self._count:
            self._study.sampler = TPESampler(
                n_startup_trials=STARTUP,
                seed=1_000_003 * self._seed + number,
                constant_liar=True,
            )
            yield self._run(self._study.ask())

    def _trial(self, number: int) -> optuna.Trial:
        """A trial that was asked for, perhaps by an earlier process."""
        import optuna

        return optuna.Trial(self._study, self._study.trials[number]._trial_id)

    def _run(self, trial: optuna.Trial) -> Trial:
        """The run of a trial; the values that it has already stay."""
        point: Point = {}
        for axis in self._axes:
            if isinstance(axis, Choice):
                index = trial.suggest_categorical(axis.key, list(range(len(axis.values))))
                point[axis.key] = axis.values[index]
            elif axis.is_whole:
                low, high = int(axis.low), int(axis.high)
                point[axis.key] = trial.suggest_int(axis.key, low, high, log=axis.log)
            else:
                value = trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)
                point[axis.key] = space.round_to_4_significant(value)
        name = f"{trial.number:03d}-{space.name(point)}"
        return Trial(name, point, space.arguments(self._config, point, self._settings))

    def should_prune(self, run: Trial) -> bool:
        """Report new evaluations of a run to the study; True if it is to be stopped."""
        path = self._root / run.name / metrics.METRICS_FILE
        size = path.stat().st_size if path.exists() else 0
        if size == self._seen.get(run.name, 0):
            return False
        self._seen[run.name] = size
        return self._report(run).should_prune()

    def _report(self, run: Trial) -> optuna.Trial:
        """The trial of a run, with all its evaluations reported to the study."""
        number = _number(run)
        known, trial = self._study.trials[number].intermediate_values, self._trial(number)
        losses = run_table.mean_losses(metrics.read(str(self._root / run.name)))
        for step, loss in losses.items():
            if step not in known:
                trial.report(loss, step)
        return trial

    def ended(self, run: Trial, outcome: Outcome) -> None:
        """Report a new outcome to the study; a diverged run is worse than all others."""
        number, loss = _number(run), math.inf
        if self._study.trials[number].state.is_finished():
            return
        if outcome.status == pool.FINISHED:
            result = run_table.read(str(self._root / run.name))
            if result is None:
                raise ValueError(
                    f"{run.name} has no evaluation to compare: set config.data.validation"
                )
            loss = result.loss
            self._report(run)  # the median is taken over those that finished
        self.tell(number, outcome.status, loss)

    def tell(self, number: int, status: str, loss: float) -> None:
        """End a trial."""
        from optuna.trial import TrialState

        if status in (pool.FINISHED, pool.DIVERGED):
            self._study.tell(number, loss)
        else:
            pruned = status == pool.PRUNED
            self._study.tell(number, state=TrialState.PRUNED if pruned else TrialState.FAIL)


def _number(run: Trial) -> int:
    return int(run.name.split("-")[0])
