"""Compute-optimal sizes without a formula for the loss: Chinchilla's first two approaches.

Both give, for several budgets of FLOPs, the parameters and tokens of least loss, and power laws
through them: N_opt proportional to C^a, D_opt to C^b (arXiv:2203.15556, sections 3.1 and 3.2).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.scaling.parametric import Law
from lm.scaling.powers import Power, fit_power, parabola_minimum
from lm.scaling.table import Table, groups, means

# What counts as an IsoFLOP set: (most by which its FLOPs differ, fewest sizes). Sets that were
# planned have equal budgets; where budgets were missed by some percent, or runs of other budgets
# lie between, wide sets hold more sizes.
SETS = ((1.05, 3), (1.3, 5))
NUM_ENVELOPE = 200  # budgets that the envelope is read at
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

    def covers(self, log_flops: np.ndarray) -> np.ndarray:
        return (self.log_flops[0] <= log_flops) & (log_flops <= self.log_flops[-1])


@dataclasses.dataclass(frozen=True)
class Slice:
    """Runs of one budget: what a parabola is laid through."""

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
        mine = sizes == number
        which = groups(table.tokens[mine])
        if which.max() < 1:
            continue
        count = np.bincount(which)
        logs = (np.log(table.flops), np.log(table.tokens), loss)
        log_flops, log_tokens, mean = (np.bincount(which, v[mine]) / count for v in logs)
        found.append(Curve(number, float(size), log_flops, log_tokens, mean))
    return found


def envelope(table: Table, loss: np.ndarray | None = None, law: Law | None = None) -> Frontier:
    """Approach 1: for each budget the size whose curve is lowest there.

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
    points = []
    grid = np.linspace(low, high, NUM_ENVELOPE)
    losses = np.array(
        [np.where(c.covers(grid), np.interp(grid, c.log_flops, c.loss), np.inf) for c in all_curves]
    )
    for i, log_flops in enumerate(grid):
        reached = np.flatnonzero(np.isfinite(losses[:, i]))
        if len(reached) < 3:
            continue
        best = reached[np.argmin(losses[reached, i])]
        if best in (reached[0], reached[-1]):
            continue
        curve = all_curves[best]
        tokens = np.exp(np.interp(log_flops, curve.log_flops, curve.log_tokens))
        points.append((np.exp(log_flops), curve.parameters, tokens, losses[best, i]))
    return _frontier(points)


def slices(table: Table, loss: np.ndarray | None = None, law: Law | None = None) -> list[Slice]:
    """The IsoFLOP sets of a table; where it has fewer than two, cuts through its curves.

    A run whose FLOPs are not its set's is moved there: its size stays, its tokens change, and its
    loss changes by what `law` says of those tokens (by nothing without a law). 10% more FLOPs are
    some 0.5% of the loss, as much as a factor of 1.5 in size near the best one.
    """
    loss, sizes = table.loss if loss is None else loss, table.sizes()
    found = []
    for rows in _sets(table.flops, sizes):
        runs = table.take(rows)
        flops = float(np.exp(np.log(runs.flops).mean()))
        tokens = runs.tokens * flops / runs.flops
        moved = loss[rows]
        if law is not None:
            here, there = (
                law.loss(runs.parameters, count, runs.unique_tokens)
                for count in (runs.tokens, tokens)
            )
            moved = moved * there / here
        which = np.unique(sizes[rows], return_inverse=True)[1]  # runs of one size become one
        size, tokens = means(runs.parameters, which), means(tokens, which)
        moved = np.bincount(which, moved) / np.bincount(which)
        found.append(Slice(flops, size, tokens, moved))
    return found if len(found) >= 2 else _cuts(curves(table, loss))


def _sets(flops: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Rows of the IsoFLOP sets, by budget: of the kind in SETS whose sets hold more sizes in all
    than their parabolas have degrees of freedom.
    """
    kinds = [_windows(np.log(flops), sizes, width, least) for width, least in SETS]
    spare = [sum(len(np.unique(sizes[rows])) - 2 for rows in kind) for kind in kinds]
    return kinds[int(np.argmax(spare))]


def _windows(
    log_flops: np.ndarray, sizes: np.ndarray, width: float, least: int
) -> list[np.ndarray]:
    """Disjoint sets of rows whose FLOPs differ by up to `width` times: again and again that with
    the most sizes of what is left, until none has `least`.
    """
    rest, found = np.argsort(log_flops), []
    while len(rest):
        held = np.zeros((len(rest) + 1, sizes.max() + 1), int)
        held[np.arange(1, len(rest) + 1), sizes[rest]] = 1
        held = held.cumsum(axis=0)  # rows of each size before a place
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
    """Approach 2: for each budget the lowest point of a parabola of loss over log parameters.

    A budget whose parabola opens downwards or is lowest beyond its sizes does not count. law: see
    `slices`.
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
    """Budgets evenly spaced where at least three curves can be read."""
    if len(all_curves) < 3:
        return []
    ends = sorted({float(v) for c in all_curves for v in (c.log_flops[0], c.log_flops[-1])})
    inside = [v for v in ends if sum(bool(c.covers(np.array(v))) for c in all_curves) >= 3]
    if len(inside) < 2:
        return []
    found = []
    for log_flops in np.linspace(inside[0], inside[-1], NUM_SLICES):
        mine = [c for c in all_curves if c.covers(log_flops)]
        if len(mine) < 3:
            continue
        tokens = [np.exp(np.interp(log_flops, c.log_flops, c.log_tokens)) for c in mine]
        loss = [np.interp(log_flops, c.log_flops, c.loss) for c in mine]
        sizes = np.array([c.parameters for c in mine])
        found.append(Slice(float(np.exp(log_flops)), sizes, np.array(tokens), np.array(loss)))
    return found


def _frontier(points: list[tuple[float, float, float, float]]) -> Frontier:
    flops, parameters, tokens, loss = np.array(points, float).reshape(-1, 4).T
    return Frontier(
        flops, parameters, tokens, loss, fit_power(flops, parameters), fit_power(flops, tokens)
    )
