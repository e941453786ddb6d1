"""The spike score of curves with known spikes."""

import numpy as np
import pytest

from lm.telemetry.spikes import spike_score


def by_loops(values):
    """The definition: 7 standard deviations off the mean of up to 1,000 values before."""
    found = []
    for i in range(100, len(values)):
        before = values[max(0, i - 1000) : i]
        found.append(abs(values[i] - np.mean(before)) >= 7 * np.std(before) > 0)
    return np.mean(found)


@pytest.mark.parametrize("count", [101, 1000, 1001, 3456])
def test_it_is_the_share_of_values_far_from_those_before(count):
    rng = np.random.default_rng(0)
    values = 3 + 0.1 * rng.normal(size=count)
    values[100::97] += 2.0
    assert spike_score(values.tolist()) == by_loops(values) > 0


def test_what_is_constant_or_falls_or_is_not_finite_has_no_spikes():
    assert spike_score([2.5] * 1500) == 0
    assert spike_score((5 / np.sqrt(np.arange(1, 3000))).tolist()) == 0
    assert spike_score([1.0, 1.1] * 600 + [np.nan, np.inf] * 100) == 0
    assert spike_score([1.0] * 100) is None and spike_score([]) is None


def test_one_value_off_a_constant_is_a_spike():
    assert spike_score([2.0] * 200 + [3.0]) == 1 / 101
