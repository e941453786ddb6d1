"""Laws for the best learning rate and batch size: power laws in parameters, tokens or FLOPs."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.scaling.powers import parabola_minimum
from lm.scaling.table import Table, means


@dataclasses.dataclass(frozen=True)
class Optima:
    """The best value of a setting for every pair of parameters and tokens that tells it."""

    kind: str  # swept: from parabolas; as run: the values that the table used, without a sweep
    x: np.ndarray  # float64 [m], the variable of the law
    best: np.ndarray  # float64 [m]
    at_edge: int  # pairs left out: the best value is the smallest or largest that was tried


def optima(table: Table, name: str, variable: str) -> Optima:
    """Optima of the setting `name` over a variable, a column of the table.

    A pair of parameters and tokens with at least three values of the setting gives the minimum of a
    parabola of loss over its logarithm, fitted to the best value and its neighbours; other settings
    are at their best for each value, seeds are averaged. Where no pair was swept, the values that
    were run are all there is.
    """
    setting, variables = getattr(table, name), getattr(table, variable)
    cells, kinds = table.cells(), table.settings()
    swept, used = [], []  # pairs (x, best)
    for cell in range(cells.max() + 1):
        runs = np.flatnonzero(cells == cell)
        x = np.exp(np.log(variables[runs]).mean())
        _, first, kind = np.unique(kinds[runs], return_index=True, return_inverse=True)
        values, of_kind = np.unique(setting[runs[first]], return_inverse=True)
        losses = np.full(len(values), np.inf)  # of each value, at the best of the other settings
        np.minimum.at(losses, of_kind, means(table.loss[runs], kind))
        used.append((x, values[losses.argmin()]))
        if len(values) >= 3:
            swept.append((x, parabola_minimum(values, losses)[0]))
    x, best = np.array(swept or used).T
    inside = np.isfinite(best)
    kind = "swept" if swept else "as run"
    return Optima(kind, x[inside], best[inside], at_edge=int((~inside).sum()))
