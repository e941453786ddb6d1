"""Bootstrap intervals of a statistic, and the statistics of two sets of losses."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.stats

RESAMPLES = 2000
LEVEL = 0.95
MAX_FPR = 0.01  # of `true_positive_rate`


class Interval(NamedTuple):
    """A figure with the limits of its 95% interval; NaN where samples are too few."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int = 0
) -> Interval:
    """The interval of statistic(*samples, axis=), each sample drawn again by itself with
    replacement; differences of pairs, as one sample, are a paired bootstrap.
    """
    if not all(len(x) for x in samples):
        return Interval(math.nan, math.nan, math.nan)
    # a deviation of 0 or of one number: the figure is NaN, and says so
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        warnings.filterwarnings("ignore", "Degrees of freedom", RuntimeWarning)
        value = float(statistic(*samples, axis=-1))
        if min(map(len, samples)) < 2:
            return Interval(value, math.nan, math.nan)
        low, high = scipy.stats.bootstrap(
            samples,
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, (1 << 20) // sum(map(len, samples))),
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(value, float(low), float(high))


mean = functools.partial(bootstrap, np.mean)


def share(is_so: np.ndarray) -> Interval:
    """The share of True in bool [n], with Wilson's interval: of 10 that are all so, resampling
    would only ever find 10.
    """
    if not len(is_so):
        return Interval(math.nan, math.nan, math.nan)
    test = scipy.stats.binomtest(int(np.sum(is_so)), len(is_so))
    low, high = test.proportion_ci(LEVEL, "wilson")
    return Interval(float(np.mean(is_so)), float(low), float(high))


def standardized_mean(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean in standard deviations: Cohen's d of pairs, from their differences."""
    return np.mean(x, axis) / np.std(x, axis, ddof=1)


def mean_difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(x, axis) - np.mean(y, axis)


def standardized_difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """The difference of the means in standard deviations of all: the effect size of WEAT
    (Caliskan et al. 2017), in [-2, 2].
    """
    both = np.concatenate([x, y], axis)
    return mean_difference(x, y, axis) / np.std(both, axis, ddof=1)


def auc(members: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
    """The probability that a member has a lower loss than another; ties count as half."""
    count = members.shape[axis]
    ranks = scipy.stats.rankdata(np.concatenate([members, others], axis), axis=axis)
    above = np.sum(np.take(ranks, np.arange(count), axis), axis) - count * (count + 1) / 2
    return 1 - above / (count * others.shape[axis])


def true_positive_rate(members: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
    """The share of members below the largest threshold that at most 1% of the others are below."""
    ordered = np.sort(others, axis)
    allowed = math.floor(MAX_FPR * others.shape[axis])
    return np.mean(members < np.take(ordered, [allowed], axis), axis)
