"""Spike score of a curve (OLMo 2, arXiv:2501.00656, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW, DEVIATIONS = 1000, 7.0
LEAST = 100  # values before the first that counts: a mean of fewer is none, and losses fall fast


def spike_score(values: Sequence[float]) -> float | None:
    """The share of values at least DEVIATIONS standard deviations away from the mean of the WINDOW
    values before them, or of all where there are fewer; those that are not finite are left out.
    None where there are not more than LEAST.
    """
    x = np.asarray(values, np.float64)
    x = x[np.isfinite(x)]
    if len(x) <= LEAST:
        return None
    first = min(WINDOW, len(x))
    means = [x[:i].mean() for i in range(LEAST, first)]
    deviations = [x[:i].std() for i in range(LEAST, first)]
    if len(x) > WINDOW:
        windows = np.lib.stride_tricks.sliding_window_view(x[:-1], WINDOW)
        for start in range(0, len(windows), WINDOW):  # a copy of all would be large
            part = windows[start : start + WINDOW]
            means.extend(part.mean(axis=1))
            deviations.extend(part.std(axis=1))
    distance = np.abs(x[LEAST:] - means)
    spikes = (distance >= DEVIATIONS * np.array(deviations)) & (distance > 0)
    return float(spikes.mean())
