"""Compute-optimal sizes without a formula for the loss: Chinchilla's first two approaches.

Both give the parameters and tokens of least loss for several budgets of FLOPs; power laws through
them are N_opt proportional to C^a and D_opt to C^b (arXiv:2203.15556, sections 3.1 and 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.scaling.parametric import Law
from lm.scaling.powers import fit_power, parabola_minimum
from lm.scaling.table import Points, Table, groups, means

# The kinds of IsoFLOP sets: (largest factor between their FLOPs, least number of sizes). Sets that
# were planned have equal budgets; where budgets were missed by some percent, or runs of other
# budgets lie between, wide sets hold more sizes.
SETS = ((1.05, 3), (1.3, 5))
NUM_ENVELOPE = 200  # budgets at which the envelope is read
NUM_SLICES = 9  # budgets to cut curves at, where a table has no IsoFLOP sets


def curves(table: Table) -> dict[int, Points]:
    """{number of a size, as in Table.sizes: its runs by tokens, with the mean of seeds}, for every
    size that has at least two token counts.
    """
    sizes, found = table.sizes(), {}
    for number, size in enumerate(means(table.parameters, sizes)):
        runs = table.take(sizes == number)
        counts = groups(runs.tokens)
        if counts.max() > 0:
            tokens, flops = (np.exp(means(np.log(x), counts)) for x in (runs.tokens, runs.flops))
            loss = means(runs.loss, counts)
            found[number] = Points(np.full(len(loss), size), tokens, flops, loss)
    return found


def envelope(table: Table) -> Points:
    """Approach 1: the size whose curve is lowest, for each budget.

    A budget counts where the best size is neither the smallest nor the largest of those whose
    curves reach it, since beyond the ends of a table the best of its sizes is not the best size.
    Empty where no budget counts.
    """
    all_curves = [*curves(table).values()]
    if len(all_curves) < 3:
        return Points(*np.zeros((4, 0)))
    ends = _ends(all_curves)
    grid = _at(all_curves, np.linspace(ends[0], ends[-1], NUM_ENVELOPE))
    reached, number = np.isfinite(grid.loss), np.arange(len(all_curves))[:, None]
    best = grid.loss.argmin(axis=0)
    inside = (reached & (number < best)).any(axis=0) & (reached & (number > best)).any(axis=0)
    return grid.take((best[inside], np.flatnonzero(inside)))


def _ends(all_curves: Sequence[Points]) -> np.ndarray:
    """Log FLOPs of the first and last points of all curves, ascending."""
    return np.unique([np.log(curve.flops[[0, -1]]) for curve in all_curves])


def _at(all_curves: Sequence[Points], log_flops: np.ndarray) -> Points:
    """Columns [curves, G] at G budgets: lines over log FLOPs between the points of each curve, and
    an infinite loss beyond its ends.
    """
    found = []
    for curve in all_curves:
        x = np.log(curve.flops)
        tokens = np.exp(np.interp(log_flops, x, np.log(curve.tokens)))
        loss = np.interp(log_flops, x, curve.loss, left=np.inf, right=np.inf)
        found.append((np.full_like(loss, curve.parameters[0]), tokens, np.exp(log_flops), loss))
    return Points(*np.swapaxes(found, 0, 1))


def slices(table: Table, law: Law | None = None) -> list[Points]:
    """The IsoFLOP sets of a table; where it has fewer than two, cuts through its curves.

    A run whose FLOPs are not its set's is moved there: its size stays, its tokens change, and its
    loss changes as `law` predicts (not at all without a law). 10% more FLOPs are some 0.5% of the
    loss, as much as a factor of 1.5 in size near the best one.
    """
    sizes, found = table.sizes(), []
    for rows in _sets(table.flops, sizes):
        runs = table.take(rows)
        flops = np.full(len(rows), np.exp(np.log(runs.flops).mean()))
        tokens, loss = runs.tokens * flops / runs.flops, runs.loss
        if law is not None:
            before, after = (
                law.loss(runs.parameters, count, runs.unique_tokens)
                for count in (runs.tokens, tokens)
            )
            loss = loss * after / before
        numbers = np.unique(sizes[rows], return_inverse=True)[1]  # runs of one size become one
        columns = (runs.parameters, tokens, flops, loss)
        found.append(Points(*(means(column, numbers) for column in columns)))
    return found if len(found) >= 2 else _cuts([*curves(table).values()])


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


def _cuts(all_curves: Sequence[Points]) -> list[Points]:
    """Budgets evenly spaced in their logarithm where at least three curves reach."""
    if len(all_curves) < 3:
        return []
    ends = _ends(all_curves)
    ends = ends[np.isfinite(_at(all_curves, ends).loss).sum(axis=0) >= 3]
    if len(ends) < 2:
        return []
    cuts = _at(all_curves, np.linspace(ends[0], ends[-1], NUM_SLICES))
    reached = np.isfinite(cuts.loss).T
    return [cuts.take((held, k)) for k, held in enumerate(reached) if held.sum() >= 3]


def isoflop(table: Table, law: Law | None = None) -> Points:
    """Approach 2: the minimum of a parabola of loss over log parameters, for each budget.

    A budget whose parabola opens downwards or has its minimum beyond its sizes does not count. law:
    see `slices`.
    """
    points = []
    for cut in slices(table, law):
        size, at_best = parabola_minimum(cut.parameters, cut.loss)
        if np.isfinite(size):
            # within a budget, tokens are a power of parameters: near -1
            tokens = fit_power(cut.parameters, cut.tokens).at(size)
            points.append((size, tokens, cut.flops[0], at_best))
    return Points(*np.array(points, float).reshape(-1, 4).T)
