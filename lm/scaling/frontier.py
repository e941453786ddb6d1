"""Compute-optimal sizes without a formula for the loss: Chinchilla's first two approaches.

Both give the parameters and tokens of least loss for several budgets of FLOPs, and power laws
through them: N_opt proportional to C^a, D_opt to C^b (arXiv:2203.15556, sections 3.1 and 3.2).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.scaling.parametric import Law
from lm.scaling.powers import Power, fit_power, parabola_minimum
from lm.scaling.table import Table, groups, means

# The kinds of IsoFLOP sets: (largest factor between their FLOPs, least number of sizes). Sets that
# were planned have equal budgets; where budgets were missed by some percent, or runs of other
# budgets lie between, wide sets hold more sizes.
SETS = ((1.05, 3), (1.3, 5))
NUM_ENVELOPE = 200  # budgets at which the envelope is read
NUM_SLICES = 9  # budgets to cut curves at, where a table has no IsoFLOP sets


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The best runs by budget, and the laws through them."""

    flops: np.ndarray  # float64 [m]
    parameters: np.ndarray  # float64 [m]
    tokens: np.ndarray  # float64 [m]
    loss: np.ndarray  # float64 [m]
    parameters_law: Power
    tokens_law: Power


@dataclasses.dataclass(frozen=True)
class Curve:
    """Losses of one size over FLOPs, with the mean of seeds."""

    number: int  # of the size, as in Table.sizes
    parameters: float
    log_flops: np.ndarray  # [k], ascending
    log_tokens: np.ndarray  # [k]
    loss: np.ndarray  # [k]

    def covers(self, log_flops: float) -> bool:
        return bool(self.log_flops[0] <= log_flops <= self.log_flops[-1])


@dataclasses.dataclass(frozen=True)
class Slice:
    """Runs of one budget, to which a parabola is fitted."""

    flops: float
    parameters: np.ndarray  # [k]
    tokens: np.ndarray  # [k]
    loss: np.ndarray  # [k]


def curves(table: Table, loss: np.ndarray | None = None) -> list[Curve]:
    """A curve for every size that has at least two token counts; loss: [n], not the table's."""
    loss = table.loss if loss is None else loss
    sizes = table.sizes()
    found = []
    for number, size in enumerate(means(table.parameters, sizes)):
        of_size = sizes == number
        counts = groups(table.tokens[of_size])
        if counts.max() < 1:
            continue
        columns = (np.log(table.flops), np.log(table.tokens), loss)
        log_flops, log_tokens, mean = (means(column[of_size], counts) for column in columns)
        found.append(Curve(number, float(size), log_flops, log_tokens, mean))
    return found


def envelope(table: Table, loss: np.ndarray | None = None, law: Law | None = None) -> Frontier:
    """Approach 1: the size whose curve is lowest, for each budget.

    Between its runs a curve is a line over log FLOPs. A budget counts where the best size is
    neither the smallest nor the largest of those whose curves reach it, since beyond the ends of a
    table the best of its sizes is not the best size. Empty where no budget counts. It needs no
    law.
    """
    del law
    all_curves = curves(table, loss)
    if len(all_curves) < 3:
        return _frontier([])
    low = min(c.log_flops[0] for c in all_curves)
    high = max(c.log_flops[-1] for c in all_curves)
    grid = np.linspace(low, high, NUM_ENVELOPE)
    losses = np.array(  # infinite beyond the ends of a curve
        [np.interp(grid, c.log_flops, c.loss, left=np.inf, right=np.inf) for c in all_curves]
    )
    points = []
    for log_flops, column in zip(grid, losses.T, strict=True):
        reached, best = np.flatnonzero(np.isfinite(column)), column.argmin()
        if len(reached) and reached[0] < best < reached[-1]:
            curve = all_curves[best]
            tokens = np.exp(np.interp(log_flops, curve.log_flops, curve.log_tokens))
            points.append((np.exp(log_flops), curve.parameters, tokens, column[best]))
    return _frontier(points)


def slices(table: Table, loss: np.ndarray | None = None, law: Law | None = None) -> list[Slice]:
    """The IsoFLOP sets of a table; where it has fewer than two, cuts through its curves.

    A run whose FLOPs are not its set's is moved there: its size stays, its tokens change, and its
    loss changes as `law` predicts (not at all without a law). 10% more FLOPs are some 0.5% of the
    loss, as much as a factor of 1.5 in size near the best one.
    """
    loss, sizes = table.loss if loss is None else loss, table.sizes()
    found = []
    for rows in _sets(table.flops, sizes):
        runs = table.take(rows)
        flops = float(np.exp(np.log(runs.flops).mean()))
        tokens = runs.tokens * flops / runs.flops
        moved = loss[rows]
        if law is not None:
            before, after = (
                law.loss(runs.parameters, count, runs.unique_tokens)
                for count in (runs.tokens, tokens)
            )
            moved = moved * after / before
        numbers = np.unique(sizes[rows], return_inverse=True)[1]  # runs of one size become one
        columns = (runs.parameters, tokens, moved)
        found.append(Slice(flops, *(means(column, numbers) for column in columns)))
    return found if len(found) >= 2 else _cuts(curves(table, loss))


def _sets(flops: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Rows of the IsoFLOP sets, by budget, of the kind in SETS that leaves the parabolas the most
    degrees of freedom.
    """
    kinds = [_windows(np.log(flops), sizes, width, least) for width, least in SETS]
    spare = [sum(len(np.unique(sizes[rows])) - 2 for rows in kind) for kind in kinds]
    return kinds[int(np.argmax(spare))]


def _windows(
    log_flops: np.ndarray, sizes: np.ndarray, width: float, least: int
) -> list[np.ndarray]:
    """Disjoint sets of rows whose FLOPs differ by up to `width` times: greedily the one with the
    most sizes among the rows left, until none has `least`.
    """
    rest, found = np.argsort(log_flops), []
    while len(rest):
        held = np.zeros((len(rest) + 1, sizes.max() + 1), int)
        held[np.arange(1, len(rest) + 1), sizes[rest]] = 1
        held = held.cumsum(axis=0)  # rows of each size before each position
        x = log_flops[rest]
        ends = np.searchsorted(x, x + np.log(width) + 1e-9, side="right")
        count = (held[ends] > held[:-1]).sum(axis=1)
        first = int(np.argmax(count))
        if count[first] < least:
            break
        found.append(rest[first : ends[first]])
        rest = np.delete(rest, np.s_[first : ends[first]])
    return sorted(found, key=lambda rows: log_flops[rows[0]])


def isoflop(table: Table, loss: np.ndarray | None = None, law: Law | None = None) -> Frontier:
    """Approach 2: the minimum of a parabola of loss over log parameters, for each budget.

    A budget whose parabola opens downwards or has its minimum beyond its sizes does not count. law:
    see `slices`.
    """
    points = []
    for cut in slices(table, loss, law):
        size, at_best = parabola_minimum(cut.parameters, cut.loss)
        if np.isnan(size):
            continue
        # within a budget, tokens are a power of parameters: near -1
        tokens = fit_power(cut.parameters, cut.tokens).at(size)
        points.append((cut.flops, size, tokens, at_best))
    return _frontier(points)


def _cuts(all_curves: list[Curve]) -> list[Slice]:
    """Budgets evenly spaced in their logarithm where at least three curves reach."""
    ends = sorted({v for c in all_curves for v in (c.log_flops[0], c.log_flops[-1])})
    inside = [v for v in ends if sum(c.covers(v) for c in all_curves) >= 3]
    if len(inside) < 2:
        return []
    found = []
    for log_flops in np.linspace(inside[0], inside[-1], NUM_SLICES):
        reached = [c for c in all_curves if c.covers(log_flops)]
        if len(reached) < 3:
            continue
        tokens = [np.exp(np.interp(log_flops, c.log_flops, c.log_tokens)) for c in reached]
        loss = [np.interp(log_flops, c.log_flops, c.loss) for c in reached]
        columns = ([c.parameters for c in reached], tokens, loss)
        found.append(Slice(float(np.exp(log_flops)), *map(np.array, columns)))
    return found


def _frontier(points: list[tuple[float, float, float, float]]) -> Frontier:
    flops, parameters, tokens, loss = np.array(points, float).reshape(-1, 4).T
    return Frontier(
        flops, parameters, tokens, loss, fit_power(flops, parameters), fit_power(flops, tokens)
    )
