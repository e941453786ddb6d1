"""The results of a sweep: a table of its runs, a ranking of its points, and a picture."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lm.scaling import run_table
from lm.scaling.run_table import Row
from lm.scaling.sweep import pool
from lm.scaling.sweep.pool import Trial
from lm.scaling.sweep.space import Point
from lm.telemetry import fonts
from lm.telemetry.figures import make_figure
from lm.telemetry.metrics import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPEATS = ("seed", "fold")  # keys in which runs of the same point differ
UNFINISHED = "unfinished"


def collect(root: Path, runs: Sequence[Trial], home: str = "") -> list[Row]:
    """A row for each run: its name, its status, the values of its point, and its result.

    home: folder or URL of the runs' folders; `root` if empty.

    A run without a finished outcome has no loss: an earlier loss is not the one it would reach.
    """
    keys = dict.fromkeys(key for run in runs for key in run.point)
    table = []
    for run in runs:
        outcome = pool.read_outcome(root, run.name, home)
        status = outcome.status if outcome is not None else UNFINISHED
        folder = os.path.join(home or root, run.name)
        result = run_table.read(folder) if status == pool.FINISHED else None
        row = {"run": run.name, "status": status, **{key: run.point.get(key) for key in keys}}
        for name in run_table.COLUMNS:
            row.setdefault(name, getattr(result, name, None))
        table.append({**row, "message": outcome.message if outcome is not None else ""})
    return table


@dataclasses.dataclass(frozen=True)
class Rank:
    """A point, the losses of its finished runs, and the number of the others by status."""

    point: Point
    losses: list[float]
    others: Counter[str]

    @property
    def mean(self) -> float:
        return float(np.mean(self.losses)) if self.losses else math.inf

    @property
    def spread(self) -> float:
        """Standard deviation of the losses; nan with fewer than two runs."""
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.spread / math.sqrt(len(self.losses)) if self.losses else math.nan


def rank(runs: Sequence[Trial], table: Sequence[Row]) -> list[Rank]:
    """The points, the lowest mean loss first; those of which a run is missing come last."""
    ranks: dict[str, Rank] = {}
    for run, row in zip(runs, table, strict=True):
        point = {key: value for key, value in run.point.items() if key not in REPEATS}
        found = ranks.setdefault(repr(point), Rank(point, [], Counter()))
        if row["loss"] is None:
            found.others[row["status"]] += 1
        else:
            found.losses.append(row["loss"])
    return sorted(ranks.values(), key=lambda r: (bool(r.others), r.mean))


def ranking(ranks: Sequence[Rank], limit: int = 20) -> str:
    """The ranking as text; a ~ marks points within two standard errors of the best."""
    best, short = ranks[0], short_names([*ranks[0].point], ".")
    names = [
        ", ".join(f"{short[k]}={v}" for k, v in r.point.items()) or "(one point)"
        for r in ranks[:limit]
    ]
    width = max(map(len, names))
    lines = [f"   {'point':{width}}  loss    spread  runs"]
    for number, (name, r) in enumerate(zip(names, ranks, strict=False), 1):
        loss = f"{r.mean:.4f}" if r.losses else "-"
        spread = f"{r.spread:.4f}" if len(r.losses) > 1 else "-"
        near = number > 1 and not r.others
        near = near and r.mean - best.mean <= 2 * math.hypot(r.error, best.error)
        rest = "".join(f", {n} {status}" for status, n in r.others.items()) + " ~" * near
        lines.append(f"{number:>2} {name:{width}}  {loss:<6}  {spread:<6}  {len(r.losses)}{rest}")
    if len(ranks) > limit:
        lines.append(f"   and {len(ranks) - limit} more")
    if any(line.endswith("~") for line in lines):
        lines.append("   ~ within two standard errors of the best")
    return "\n".join(lines)


def summary(table: Sequence[Row]) -> str:
    """The number of runs by status, and the messages of failed and diverged ones."""
    counts = Counter(row["status"] for row in table)
    lines = [f"{len(table)} runs: " + ", ".join(f"{n} {status}" for status, n in counts.items())]
    lines += [
        f"  {row['status']}: {row['run']}: {row['message']}"
        for row in table
        if row["status"] in (pool.DIVERGED, pool.FAILED)
    ]
    return "\n".join(lines)


def plot(ranks: Sequence[Rank], path: Path) -> None:
    """Draw the loss against every key: dots are runs, bars reach over a point's spread, and a line
    joins the best at each value. Runs without a loss are crosses at the top; ValueError where none
    has one.
    """
    means = sorted(r.mean for r in ranks if r.losses)
    if not means:
        raise ValueError("no run of the sweep has a loss to draw")
    losses = [loss for r in ranks for loss in r.losses]
    low, middle = min(losses), means[len(means) // 2]
    top = min(max(losses), middle + 3 * (middle - low)) if middle > low else max(losses)
    pad = 0.08 * (top - low or 0.1 * low)
    ceiling = top + 2 * pad
    keys = [*ranks[0].point] or [""]
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure, axes = make_figure(rows, columns, size=(4.6, 3.6))
    for axis, key in zip(axes.flat, keys, strict=False):
        position = _positions(axis, [r.point.get(key) for r in ranks])
        best: dict[float, float] = {}
        for r in ranks:
            x = position(r.point.get(key))
            axis.plot([x] * len(r.losses), r.losses, ".", color="0.6", zorder=1)
            if r.others:
                axis.plot(x, ceiling, "x", color="C3", clip_on=False, in_layout=False)
            if r.losses:
                spread = r.spread if len(r.losses) > 1 else 0.0
                axis.errorbar(x, r.mean, spread, fmt="C0o", alpha=0.6, capsize=3, zorder=2)
                best[x] = min(best.get(x, math.inf), r.mean)
        axis.plot(*zip(*sorted(best.items()), strict=True), color="C1", linewidth=1.5, zorder=3)
        axis.margins(x=0.12)
        axis.set_xlabel(key)
        axis.set_ylim(low - pad, ceiling)
    for axis in axes.flat[len(keys) :]:
        axis.remove()
    figure.supylabel("final validation loss (nats per token)", fontsize=10)
    counts = sum((r.others for r in ranks), Counter[str]())
    hidden = sum(loss > ceiling for loss in losses)
    notes = [f"{len(losses)} finished runs", *(f"{n} {s} (×)" for s, n in counts.items())]
    notes += [f"{hidden} above the picture"] * bool(hidden)
    figure.suptitle(" · ".join([*notes, "line: best mean at each value"]), fontsize=10)
    figure.savefig(str(path), dpi=120)


def _positions(axis: Axes, values: Sequence[object]) -> Callable[[object], float]:
    """The positions of a key's values on the axis: numbers to scale, in the logarithm if they span
    a factor of eight, all others side by side.
    """
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    distinct = list(dict.fromkeys(map(str, values)))
    if len(numbers) == len(values):
        if min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
            axis.set_xscale("log")
        if len(distinct) <= 8:
            axis.set_xticks(sorted(set(numbers)), [f"{v:g}" for v in sorted(set(numbers))])
            axis.minorticks_off()
        return lambda value: float(str(value))
    families = fonts.families("".join(distinct))
    shown = [fonts.readable(text, families) for text in distinct]
    rotation = 20 * (max(map(len, distinct)) > 8)
    axis.set_xticks(range(len(distinct)), shown, rotation=rotation, family=families)
    return lambda value: float(distinct.index(str(value)))
