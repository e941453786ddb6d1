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


NEIGHBOURS = 2  # least points on each side of the lowest that a parabola is fitted to
REACH = 2.0  # and all points up to this factor from it


@dataclasses.dataclass(frozen=True)
class Parabola:
    """y = square (log x - middle)^2 + slope (log x - middle) + height, for low <= x <= high."""

    square: float
    slope: float
    height: float
    middle: float
    low: float
    high: float

    def at(self, x: np.ndarray | float) -> np.ndarray | float:
        return np.polyval((self.square, self.slope, self.height), np.log(x) - self.middle)

    @property
    def minimum(self) -> float:
        """The x of its minimum; NaN unless it opens upwards and has the minimum inside."""
        offset = -self.slope / (2 * self.square) if self.square > 0 else np.nan
        x = float(np.exp(self.middle + offset))
        return x if self.low <= x <= self.high else np.nan


def parabola(x: np.ndarray, y: np.ndarray) -> Parabola | None:
    """The least squares parabola of the lowest of the points [n], n >= 3, and those near it: far
    from the minimum a loss is no parabola. None where the lowest point is the first or the last.
    """
    order = np.argsort(x)
    x, y = x[order], y[order]
    i = int(np.argmin(y))
    if i in (0, len(x) - 1):
        return None
    near = np.abs(np.log(x / x[i])) <= np.log(REACH) + 1e-9
    near[max(0, i - NEIGHBOURS) : i + NEIGHBOURS + 1] = True
    log_x = np.log(x[near])
    middle = float(log_x.mean())
    square, slope, height = (float(v) for v in np.polyfit(log_x - middle, y[near], 2))
    return Parabola(square, slope, height, middle, float(x[near][0]), float(x[near][-1]))


def parabola_minimum(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(x, y) of the minimum of `parabola`; NaN where there is none inside."""
    found = parabola(x, y)
    return (np.nan, np.nan) if found is None else (found.minimum, float(found.at(found.minimum)))
