"""How often 90% intervals hold the truth: 200 made tables, each fitted as a table of a user is.

python -m pytest -m slow tests/test_scaling_coverage.py -s
"""

import numpy as np
import pytest

from lm.scaling import intervals, parametric
from lm.scaling.parametric import NAMES
from lm.scaling.table import Table
from tests.scaling_tables import CHINCHILLA

TRIALS, REPLICATES = 200, 200
WIDE = (np.geomspace(5e7, 1e10, 6), np.geomspace(1e9, 3e11, 6))
NARROW = (np.geomspace(1e8, 4e9, 6), np.geomspace(2e9, 1e11, 6))


def gaussian(rng, shape):
    return rng.standard_normal(shape)


def heavy(rng, shape):
    """Student's t with 5 degrees of freedom, of variance 1."""
    return rng.standard_t(5, shape) * np.sqrt(3 / 5)


CASES = {
    "wide grid, 0.5% of the loss": (WIDE, 0.005, gaussian, 0.95),
    "wide grid, 1%": (WIDE, 0.01, gaussian, 0.95),
    "narrow grid, 0.5%": (NARROW, 0.005, gaussian, 0.95),
    # a fit by Huber loss gains from heavy tails what a Gaussian bootstrap knows nothing of
    "wide grid, 0.5%, heavy tails": (WIDE, 0.005, heavy, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("axes, noise, draw, most", CASES.values(), ids=CASES)
def test_ninety_percent_intervals_hold_the_truth_as_often(axes, noise, draw, most, request):
    sizes, tokens = (v.ravel() for v in np.meshgrid(*axes))
    runs = (sizes, tokens, 6 * sizes * tokens)
    rng = np.random.default_rng(2)
    truth = np.array([getattr(CHINCHILLA, n) for n in NAMES[:5]])
    inside = np.zeros((TRIALS, 5), bool)
    for trial in range(TRIALS):
        loss = CHINCHILLA.loss(sizes, tokens) * (1 + noise * draw(rng, len(sizes)))
        table = Table(*runs, loss, np.arange(len(loss)), "total")
        fit = parametric.fit(table)
        again, _ = intervals.bootstrap(
            table, fit, repeats=np.inf, delta=parametric.HUBER_DELTA, num=REPLICATES, rng=rng
        )
        for k, name in enumerate(NAMES[:5]):
            value, values = getattr(fit.one(), name), getattr(again.law, name)
            found = intervals.estimate(value, values, 0.9)
            inside[trial, k] = found.low <= truth[k] <= found.high
    share = dict(zip(NAMES[:5], inside.mean(axis=0).round(3).tolist(), strict=True))
    print(f"\n{request.node.callspec.id}: {share}")
    assert all(0.85 <= v <= most for v in share.values()), share
