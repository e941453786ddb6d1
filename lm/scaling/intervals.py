"""Confidence of a fit: a bootstrap, read by percentiles.

For the law it is one of cases, which takes the noise of runs as it is (docs/scaling.md: where other
bootstraps are too narrow). For the minima of budgets, where a run that is not drawn leaves a hole,
every loss is moved by its own residual times Gaussian noise: conservative, since the losses have
their own noise already.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.scaling import parametric
from lm.scaling.parametric import Fit
from lm.scaling.table import Table


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its interval; NaN where too few of the replicates gave one."""

    value: float
    low: float
    high: float


def bootstrap(
    table: Table,
    fit: Fit,
    *,
    repeats: float | None,
    delta: float,
    num: int,
    rng: np.random.Generator,
) -> tuple[list[Fit], float]:
    """(fits of `num` drawn tables, the standard deviation of log loss around the law of `fit`)."""
    num_runs, num_constants = len(table), 6 if repeats is None else 5
    noise = float(np.sqrt(np.square(fit.residuals).sum() / (num_runs - num_constants)))
    counts = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num)
    rows = (np.repeat(np.arange(num_runs), count) for count in counts)
    return [
        parametric.fit(table.take(drawn), repeats=repeats, delta=delta, starts=fit.law)
        for drawn in rows
    ], noise


def wild(table: Table, fit: Fit, num: int, rng: np.random.Generator) -> list[Table]:
    """`num` tables with losses around those of the table, by the residuals of `fit`."""
    freedom = np.sqrt(len(table) / (len(table) - 5))  # of residuals around five constants
    return draw(table, freedom * np.abs(fit.residuals), num, rng)


def draw(
    table: Table, deviation: float | np.ndarray, num: int, rng: np.random.Generator
) -> list[Table]:
    """`num` tables with losses around those of the table; deviation of their logarithm: one, or
    [n].
    """
    losses = table.loss * np.exp(deviation * rng.standard_normal((num, len(table))))
    return [dataclasses.replace(table, loss=loss) for loss in losses]


def estimate(value: float, replicates: np.ndarray, level: float) -> Estimate:
    """The middle `level` of the replicates [R] that are numbers, if at least 80% are."""
    good = replicates[np.isfinite(replicates)]
    if len(good) < 0.8 * len(replicates) or not np.isfinite(value):
        return Estimate(float(value), np.nan, np.nan)
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return Estimate(float(value), float(low), float(high))
