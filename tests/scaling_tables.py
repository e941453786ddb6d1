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


def source(num_rows=36):
    return Source("made.csv", "0" * 64, num_rows, 0, 0)
