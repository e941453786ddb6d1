"""Evaluations inside a run: `config.evaluations`, each at its own steps and within its own time.

A component of `lm.evaluation.kinds`, or a module of your own, has `Config`, a subclass of
`EvaluationConfig`, and `build(config, experiment, path)`, which reads all data and returns an
`Evaluation`. It raises ValueError, with the config path, for whatever is missing or does not fit
the model. Each result is a record of RUN/evaluations.jsonl, which trackers get, too.
"""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import jax

from lm.config.components import EVALUATIONS, component
from lm.config.schema import EvaluationConfig
from lm.parallel import process_group
from lm.telemetry.jsonl import Record
from lm.telemetry.metrics import ERROR_SUFFIX, EVALUATION
from lm.training.experiment import Experiment
from lm.types import Params

RESERVED = ("step", "kind", "source", "n", "total", "partial", "seconds", "samples")
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_compiled = 0.0  # seconds that the main thread has compiled for


def _count_compiling(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del kwargs
    global _compiled
    if event == _COMPILE_EVENT and threading.current_thread() is threading.main_thread():
        _compiled += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count_compiling)


def _clock() -> float:
    """time.monotonic() without the time of compiling."""
    return time.monotonic() - _compiled


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one evaluation.

    values: by name; the standard error of NAME is NAME_stderr. count: of the examples that they are
    of, out of `total`. samples: rows of texts that are kept, all of the same columns.
    """

    values: Mapping[str, float]
    count: int
    total: int
    samples: Sequence[Mapping[str, str]] = ()


class Evaluation(Protocol):
    def run(self, params: Params, budget: Budget) -> Result | None:
        """The result of all examples, or of those before the budget was spent; None where that
        leaves no figure. All processes call it together.
        """
        ...


class Budget:
    """The time of one evaluation, by the lead's clock, without what compiling takes."""

    def __init__(
        self, seconds: float = 0.0, report: Callable[[int, int], object] = lambda done, count: None
    ) -> None:
        """seconds: 0: any time. report: called with the examples done, and their count."""
        self._seconds, self.report, self._began = seconds, report, _clock()

    @property
    def elapsed(self) -> float:
        return max(0.0, _clock() - self._began)

    def is_spent(self) -> bool:
        """True in all processes, which ask together, once the lead's time is over."""
        if not self._seconds:
            return False
        return process_group.from_lead("budget", lambda: self.elapsed > self._seconds)

    def parts(self, count: int, size: int) -> Iterator[Sequence[int]]:
        """Indices of `count` examples in parts of up to `size`, until the budget is spent.

        A part takes every n-th example, so that a partial result is of all kinds of them. Parts are
        the same every time: what they compile is compiled once.
        """
        stride, done = -(-count // size), 0
        for start in range(stride):
            part = range(start, count, stride)
            yield part
            done += len(part)
            self.report(done, count)
            if done < count and self.is_spent():
                return


class RunEvaluations:
    """Evaluations of an experiment's config, ready to run."""

    def __init__(self, experiment: Experiment, names: Sequence[str] | None = None) -> None:
        """Read their data; names: None: of all. Raises ValueError where one cannot be run."""
        self._experiment = experiment
        self._all: dict[str, tuple[EvaluationConfig, Evaluation]] = {}
        for name, entry in sorted(experiment.config.evaluations.items()):
            if names is not None and name not in names:
                continue
            path = f"config.evaluations.{name}"
            if not re.fullmatch(r"[A-Za-z][\w-]*", name):
                raise ValueError(f"{path}: a name has letters, digits, - and _ alone")
            build = component(EVALUATIONS, entry.name, path).build
            self._all[name] = entry.config, build(entry.config, experiment, path)

    @property
    def names(self) -> list[str]:
        return [*self._all]

    def due(self, step: int) -> list[str]:
        """The names of those that are due after `step` steps."""
        is_last = step == self._experiment.num_steps
        periods = {name: config.every for name, (config, _) in self._all.items()}
        return [n for n, every in periods.items() if is_last or (every and step % every == 0)]

    def run(
        self,
        name: str,
        params: Params,
        step: int,
        *,
        limited: bool = True,
        report: Callable[[str], object] = lambda text: None,
    ) -> Record:
        """The record of an evaluation of the parameters after `step` steps: `values`, their number
        of examples `n`, `seconds` without compiling, and `samples`, if any. A partial one has
        `partial` and the `total` of examples; without any figure, `n` is 0.

        limited: to its `seconds`. report: called with lines of progress.
        """
        config, evaluation = self._all[name]
        budget = Budget(
            config.seconds if limited else 0.0,
            lambda done, count: report(f"evaluating {name} · {done}/{count}"),
        )
        found = evaluation.run(params, budget)
        record: Record = {"step": step, "kind": EVALUATION, "source": name}
        if found is not None:
            assert not set(RESERVED) & found.values.keys(), "names of other fields of a record"
            record |= {k: float(v) for k, v in found.values.items()}
        record |= {"n": found.count if found else 0, "seconds": round(budget.elapsed, 3)}
        if found is None or found.count < found.total:
            record |= {"partial": True} | ({"total": found.total} if found else {})
        if found is not None and found.samples:
            record["samples"] = [dict(row) for row in found.samples]
        return record


def describe(record: Record) -> str:
    """One line of a record: "grammar · accuracy 0.61 ± 0.02 · n 120 · 1.2 s"."""
    names = [k for k in record if k not in RESERVED and not k.endswith(ERROR_SUFFIX)]
    parts = [record["source"]]
    if not record["n"]:
        return f"{parts[0]} · skipped: its {record['seconds']:.3g} s were over before any figure"
    for name in names:
        error = record.get(name + ERROR_SUFFIX)
        parts.append(f"{name} {record[name]:.4g}" + (f" ± {error:.2g}" if error else ""))
    is_partial = record.get("partial")
    count = f"{record['n']} of {record['total']}, partial" if is_partial else f"{record['n']}"
    return " · ".join([*parts, f"n {count}", f"{record['seconds']:.3g} s"])
