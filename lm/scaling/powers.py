"""Power laws y = coefficient * x^exponent, and minima of parabolas in a logarithm."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial


class Power(NamedTuple):
    """Constants, each a number or, for many fits at once, an array [R]."""

    coefficient: np.ndarray | float
    exponent: np.ndarray | float

    def at(self, x: float) -> np.ndarray | float:
        return np.exp(np.log(self.coefficient) + np.asarray(self.exponent) * np.log(x))


def fit_power(x: np.ndarray, y: np.ndarray) -> Power:
    """Least squares in logarithms, x and y: [n]; NaN unless two x differ and all y are positive."""
    log_x = np.log(x)
    if len(x) < 2 or np.ptp(log_x) == 0 or not np.all(np.isfinite(y) & (y > 0)):
        return Power(np.nan, np.nan)
    log_y, centred = np.log(y), log_x - log_x.mean()
    exponent = float(centred @ log_y / (centred @ centred))
    return Power(float(np.exp(log_y.mean() - exponent * log_x.mean())), exponent)


NEIGHBOURS = 2  # least points on each side of the lowest that a parabola is fitted to
REACH = 2.0  # and all points up to this factor from it


def parabola(x: np.ndarray, y: np.ndarray) -> Polynomial | None:
    """The least squares parabola in log x of the lowest of the points [n], n >= 3, and those near
    it: far from the minimum a loss is no parabola. Its domain are the logarithms of the first and
    last of them. None where the lowest point is the first or the last of all.
    """
    order = np.argsort(x)
    x, y = x[order], y[order]
    i = int(np.argmin(y))
    if i in (0, len(x) - 1):
        return None
    near = np.abs(np.log(x / x[i])) <= np.log(REACH) + 1e-9
    near[max(0, i - NEIGHBOURS) : i + NEIGHBOURS + 1] = True
    return Polynomial.fit(np.log(x[near]), y[near], 2)


def parabola_minimum(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(x, y) of the minimum of `parabola`; NaN unless it opens upwards and has it in its domain."""
    found = parabola(x, y)
    if found is None:
        return np.nan, np.nan
    _, slope, square = found.coef  # over the domain as -1 ... 1
    if square <= 0 or abs(slope) > 2 * square:
        return np.nan, np.nan
    offset, scale = found.mapparms()
    log_x = (-slope / (2 * square) - offset) / scale
    return float(np.exp(log_x)), float(found(log_x))
