"""How sure a fit is: a parametric bootstrap, read by percentiles.

New losses are drawn around the fitted law with Gaussian noise in log L, of the size that the
residuals show, and everything is fitted again. Drawing from the residuals themselves gives
intervals that are too narrow: the Huber loss with a small delta passes through as many runs as
there are constants, and their residuals are zero. Drawing rows leaves some sizes out and is wide.
The size of the noise is itself not known better than its degrees of freedom allow: each replicate
draws its own, which makes intervals of a linear model exactly those of Student's t.
`tests/test_scaling_coverage.py` counts how often the truth is inside: as often as it should be with
Gaussian noise, and more often where the noise has heavy tails.
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
) -> tuple[Fit, float]:
    """(fits of `num` drawn tables, the standard deviation of log loss around the law of `fit`)."""
    law, residuals = fit.one(), fit.residuals[0]
    num_free = len(residuals) - (6 if repeats is None else 5)
    noise = float(np.sqrt((residuals**2).sum() / num_free))
    centre = law.loss(table.parameters, table.tokens, table.unique_tokens)
    sizes = noise * np.sqrt(num_free / rng.chisquare(num_free, (num, 1)))
    losses = draw(centre, sizes, num, rng)
    return parametric.fit(table, losses=losses, repeats=repeats, delta=delta, starts=law), noise


def draw(
    centre: np.ndarray, deviation: float | np.ndarray, num: int, rng: np.random.Generator
) -> np.ndarray:
    """Losses [num, n] around centre: [n]; deviation of their logarithm: one, or [num, 1]."""
    return centre * np.exp(deviation * rng.standard_normal((num, len(centre))))


def estimate(value: float, replicates: np.ndarray, level: float) -> Estimate:
    """The middle `level` of the replicates [R] that are numbers, if at least 80% are."""
    good = replicates[np.isfinite(replicates)]
    if len(good) < 0.8 * len(replicates) or not np.isfinite(value):
        return Estimate(float(value), np.nan, np.nan)
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return Estimate(float(value), float(low), float(high))
