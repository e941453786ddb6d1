"""Laws for the best learning rate and batch size: power laws in parameters, tokens or FLOPs."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.scaling.powers import Power, fit_power, parabola_minimum
from lm.scaling.table import Table

VARIABLES = ("parameters", "tokens", "flops")


@dataclasses.dataclass(frozen=True)
class Optima:
    """The best value of a setting for every pair of parameters and tokens that tells it."""

    kind: str  # swept: from parabolas; as run: the values that the table used, no sweep behind them
    x: np.ndarray  # float64 [m], the variable of the law
    best: np.ndarray  # float64 [m]
    at_edge: int  # pairs left out: the best value is the smallest or largest that was tried

    @property
    def law(self) -> Power:
        return fit_power(self.x, self.best)


def optima(table: Table, name: str, variable: str, loss: np.ndarray | None = None) -> Optima:
    """Optima of the setting `name` in a table that has it; loss: [n], not the table's.

    A pair of parameters and tokens with at least three values of the setting gives the lowest point
    of a parabola of loss over its logarithm, through the best value and its neighbours; other
    settings are at their best for each value, seeds are averaged. Where no pair was swept, the
    values that were run are all there is.
    """
    loss = table.loss if loss is None else loss
    setting, variables = getattr(table, name), getattr(table, variable)
    cells, kinds = table.cells(), table.settings()
    x, best, used, at_edge, num_swept = [], [], [], 0, 0
    for cell in range(cells.max() + 1):
        inside = np.flatnonzero(cells == cell)
        place = float(np.exp(np.log(variables[inside]).mean()))
        means = {}  # of each value, at the best of the other settings
        for kind in np.unique(kinds[inside]):
            runs = inside[kinds[inside] == kind]
            value, mean = float(setting[runs[0]]), float(loss[runs].mean())
            means[value] = min(mean, means.get(value, np.inf))
        values = np.array(sorted(means))
        losses = np.array([means[v] for v in values])
        i = int(np.argmin(losses))
        used.append((place, values[i]))
        if len(values) < 3:
            continue
        num_swept += 1
        lowest_at, _ = parabola_minimum(values, losses)
        if np.isnan(lowest_at):
            at_edge += 1
            continue
        x.append(place)
        best.append(lowest_at)
    if num_swept:
        return Optima("swept", np.array(x), np.array(best), at_edge)
    places, values = np.array(used).T
    return Optima("as run", places, values, 0)
