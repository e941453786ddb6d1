"""Coverage of 90% intervals, on made tables fitted as a table of a user is.

python -m pytest -m slow tests/test_scaling_coverage.py -s
"""

import numpy as np
import pytest

from lm.scaling import frontier, intervals, parametric
from lm.scaling.parametric import NAMES, Law
from lm.scaling.powers import fit_power
from lm.scaling.table import Table
from tests.scaling_tables import CHINCHILLA, unbalanced

# Of 39 replicates, a 90% interval reaches from the 2nd to the 38th, so it is exact without more.
TRIALS, REPLICATES = 100, 39
MOST = 0.985  # a bootstrap of cases leaves some sizes of a small grid out, and is a little wide
WIDE = (np.geomspace(5e7, 1e10, 6), np.geomspace(1e9, 3e11, 6))
NARROW = (np.geomspace(1e8, 4e9, 6), np.geomspace(2e9, 1e11, 6))


def gaussian(rng, shape):
    return rng.standard_normal(shape)


def heavy(rng, shape):
    """Student's t with 5 degrees of freedom, of variance 1."""
    return rng.standard_t(5, shape) * np.sqrt(3 / 5)


def short_are_noisy(rng, tokens):
    """Noise of variance 1 for long runs, and as much again for each 3 billion tokens fewer."""
    return rng.standard_normal(len(tokens)) * (1 + 3e9 / tokens)


def uneven(noise):
    """A draw for tokens, of which the others only take the number."""
    return lambda rng, tokens: noise(rng, len(tokens))


def of_grid(axes):
    return tuple(v.ravel() for v in np.meshgrid(*axes))


SHAPE = unbalanced()
UNBALANCED = (SHAPE.parameters, SHAPE.tokens)
CASES = {
    "wide grid, 0.5% of the loss": (of_grid(WIDE), 0.005, uneven(gaussian)),
    "wide grid, 1%": (of_grid(WIDE), 0.01, uneven(gaussian)),
    "narrow grid, 0.5%": (of_grid(NARROW), 0.005, uneven(gaussian)),
    "wide grid, 0.5%, heavy tails": (of_grid(WIDE), 0.005, uneven(heavy)),
    "unbalanced, 0.5%": (UNBALANCED, 0.005, uneven(gaussian)),
    "unbalanced, 0.5%, heavy tails": (UNBALANCED, 0.005, uneven(heavy)),
    "unbalanced, 0.5%, more for few tokens": (UNBALANCED, 0.005, short_are_noisy),
}


@pytest.mark.slow
@pytest.mark.parametrize("axes, noise, draw", CASES.values(), ids=CASES)
def test_ninety_percent_intervals_hold_the_truth_as_often(axes, noise, draw, request):
    sizes, tokens = axes
    runs = (sizes, tokens, 6 * sizes * tokens)
    rng = np.random.default_rng(2)
    truth = np.array([getattr(CHINCHILLA, n) for n in NAMES[:5]])
    inside = np.zeros((TRIALS, 5), bool)
    for trial in range(TRIALS):
        loss = CHINCHILLA.loss(sizes, tokens) * (1 + noise * draw(rng, tokens))
        table = Table(*runs, loss, np.arange(len(loss)), "total")
        fit = parametric.fit(table)
        replicates, _ = intervals.bootstrap(
            table, fit, repeats=np.inf, delta=parametric.HUBER_DELTA, num=REPLICATES, rng=rng
        )
        laws = Law.stack([each.law for each in replicates])
        for k, name in enumerate(NAMES[:5]):
            value, values = getattr(fit.law, name), getattr(laws, name)
            found = intervals.estimate(value, values, 0.9)
            inside[trial, k] = found.low <= truth[k] <= found.high
    share = dict(zip(NAMES[:5], inside.mean(axis=0).round(3).tolist(), strict=True))
    print(f"\n{request.node.callspec.id}: {share}")
    least = 0.9 - 2.4 * np.sqrt(0.9 * 0.1 / TRIALS)  # 0.83
    assert all(least <= v <= MOST for v in share.values()), share


@pytest.mark.slow
def test_intervals_of_isoflop_exponents_hold_the_truth_at_least_as_often():
    def loss(rng, n, d):
        return CHINCHILLA.loss(n, d) * np.exp(0.005 * rng.standard_normal(len(n)))

    inside, rng = [], np.random.default_rng(0)
    for trial in range(40):
        table = unbalanced(loss, seed=trial)
        fit = parametric.fit(table)
        tables = [table, *intervals.wild(table, fit, REPLICATES, rng)]
        points = [frontier.isoflop(each, fit.law) for each in tables]
        value, *others = (fit_power(found.flops, found.parameters).exponent for found in points)
        a = intervals.estimate(value, np.array(others), 0.9)
        inside.append(a.low <= CHINCHILLA.parameters_exponent <= a.high)
    print(f"\nisoflop: {np.mean(inside):.2f}")
    assert np.mean(inside) >= 0.8
