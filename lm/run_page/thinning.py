"""Fewer points for long curves and heat maps, so that a page of any run stays small.

A curve keeps the lowest and the highest value of each of a number of intervals of steps, as many as
a screen has columns: a spike of one step stays. Means of the same intervals are what a page
smooths, since extremes are not where the values are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BUCKETS = 700  # of a curve
CELLS = 150_000  # of all heat maps of a run
MAX_COLUMNS, MIN_COLUMNS = 240, 30  # of a heat map


def curve(
    steps: Sequence[float], values: Sequence[float], buckets: int = BUCKETS
) -> dict[str, Any]:
    """{"x", "y": the points to draw; "mx", "my": the means to smooth, only where points were left
    out}. Values that are not finite are left out.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= 2 * buckets:
        return {"x": numbers(x), "y": numbers(y)}
    starts = _starts(x, buckets)
    stops = [*starts[1:], len(x)]
    kept, means = {0, len(x) - 1}, np.add.reduceat(y, starts) / np.diff([*starts, len(x)])
    for start, stop in zip(starts, stops, strict=True):
        part = y[start:stop]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    chosen = sorted(kept)
    middles = (x[starts] + x[np.asarray(stops) - 1]) / 2
    return {
        "x": numbers(x[chosen]),
        "y": numbers(y[chosen]),
        "mx": numbers(middles),
        "my": numbers(means),
    }


def _starts(x: np.ndarray, buckets: int) -> np.ndarray:
    """Indices at which the intervals that have an entry begin; x ascends."""
    width = (x[-1] - x[0]) or 1.0
    number = np.minimum((x - x[0]) / width * buckets, buckets - 1).astype(int)
    return np.flatnonzero(np.diff(number, prepend=-1))


def heat_map(steps: Sequence[float], values: np.ndarray, columns: int) -> dict[str, Any]:
    """{"x": steps [C], "z": [rows, C]} with C at most `columns`; each keeps its largest magnitude.

    values: [records, rows], with nan where a record has none.
    """
    x, z = np.asarray(steps, np.float64), values.T.astype(np.float64)
    if len(x) > columns:
        starts = _starts(x, columns)
        size = np.abs(np.where(np.isfinite(z), z, 0.0))
        stops = [*starts[1:], len(x)]
        best = [a + size[:, a:b].argmax(1) for a, b in zip(starts, stops, strict=True)]
        z = np.take_along_axis(z, np.stack(best, 1), 1)
        x = x[starts]
    return {"x": numbers(x), "z": [numbers(row, 3) for row in z]}


def columns_for(rows: int) -> int:
    """Columns of each heat map where all have `rows` rows together."""
    return int(np.clip(CELLS // max(rows, 1), MIN_COLUMNS, MAX_COLUMNS))


def numbers(values: np.ndarray | Sequence[float], digits: int = 6) -> list[float | int | None]:
    """Values for JSON with so many significant digits; None for those that are not finite."""
    return [number(v, digits) for v in np.asarray(values, np.float64).tolist()]


def number(value: float, digits: int = 6) -> float | int | None:
    if not np.isfinite(value):
        return None
    if value == int(value) and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.{digits}g}")
