"""Tables of runs whose law is known, for the tests of scaling laws."""

import numpy as np

from lm.scaling.parametric import Law
from lm.scaling.table import Source, Table

# As published (arXiv:2203.15556, equation 10).
CHINCHILLA = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
SIZES, TOKENS = np.geomspace(5e7, 1e10, 6), np.geomspace(1e9, 3e11, 6)


def grid(law=CHINCHILLA, noise=0.0, sizes=SIZES, tokens=TOKENS, seed=0, unique=None):
    """A table of every size with every token count."""
    n, d = (v.ravel() for v in np.meshgrid(sizes, tokens))
    u = None if unique is None else np.minimum(d, unique)
    error = np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    rows = np.arange(1, len(n) + 1)
    return Table(n, d, 6 * n * d, law.loss(n, d, u) * error, rows, "total", unique_tokens=u)


def unbalanced(loss=None, *, law=CHINCHILLA, num_runs=245, num_sizes=43, seed=0):
    """A table of the shape of the public one of Chinchilla's runs (arXiv:2404.10102): nine budgets
    that each run misses by 5 to 30%, unequally many sizes for each, some runs of other budgets, and
    sizes that differ in their last digits as if read from a picture.

    loss: a function of (rng, parameters, tokens); without it the law's, exact.
    """
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(6e7, 1.6e10, num_sizes)
    budgets = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
    flops = rng.choice(budgets, num_runs, p=np.array([3, 6, 5, 4, 5, 4, 4, 5, 3]) / 39)
    flops = flops * (1 - rng.uniform(0.05, 0.3, num_runs))
    between = rng.random(num_runs) < 0.25
    flops[between] = np.exp(rng.uniform(np.log(3e18), np.log(3e21), between.sum()))
    n = law.optimum(1.0)[0] * flops ** float(law.parameters_exponent)
    n = n * np.exp(rng.uniform(-1.4, 1.4, num_runs))
    places = np.abs(np.log(n[:, None] / sizes)).argmin(axis=1)
    n = sizes[places] * (1 + 2e-6 * rng.random(num_runs))
    d = flops / 6 / n
    values = law.loss(n, d) if loss is None else loss(rng, n, d)
    return Table(n, d, flops, values, np.arange(1, num_runs + 1), "total")


def source(num_rows=36):
    return Source("made.csv", "0" * 64, num_rows, 0, 0)
