"""Power laws y = coefficient * x^exponent, and minima of parabolas in a logarithm."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Power:
    """Constants, each a number or, for many fits at once, an array [R]."""

    coefficient: np.ndarray | float
    exponent: np.ndarray | float

    def at(self, x: float) -> np.ndarray | float:
        return np.exp(np.log(self.coefficient) + np.asarray(self.exponent) * np.log(x))


def fit_power(x: np.ndarray, y: np.ndarray) -> Power:
    """Least squares in logarithms, x and y: [n]; NaN for fewer than two different x."""
    log_x, log_y = np.log(x), np.log(y)
    if len(x) < 2 or np.ptp(log_x) == 0:
        return Power(np.nan, np.nan)
    centred = log_x - log_x.mean()
    exponent = float(centred @ log_y / (centred @ centred))
    return Power(float(np.exp(log_y.mean() - exponent * log_x.mean())), exponent)


NEIGHBOURS = 2  # points on each side of the lowest that a parabola is laid through


def lowest(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(x, y) of the lowest point of a parabola of y over log x; NaN where there is none inside.

    It goes through the lowest of the points [n], n >= 3, and its neighbours: far from the minimum a
    loss is no parabola. It must open upwards and be lowest between the outer of these points.
    """
    order = np.argsort(x)
    i = int(np.argmin(y[order]))
    if i in (0, len(x) - 1):
        return np.nan, np.nan
    near = order[max(0, i - NEIGHBOURS) : i + NEIGHBOURS + 1]
    log_x = np.log(x[near])
    middle = log_x.mean()
    square, slope, height = np.polyfit(log_x - middle, y[near], 2)
    place = -slope / (2 * square) if square > 0 else np.nan
    if not log_x.min() <= middle + place <= log_x.max():
        return np.nan, np.nan
    return float(np.exp(middle + place)), float(height + slope * place / 2)
