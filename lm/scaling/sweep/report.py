"""What came of a sweep: a table of its runs, a ranking of its points, and a picture."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.scaling import run_table
from lm.scaling.sweep import pool, space
from lm.scaling.sweep.pool import Trial
from lm.telemetry import fonts

REPEATS = ("seed", "fold")  # keys that tell runs of the same point apart
UNFINISHED = "unfinished"


def collect(root: Path, runs: Sequence[Trial], home: str = "") -> list[dict[str, Any]]:
    """A row for each run: its name, the values of its point, how it ended, and its result.

    home: folder or URL of the runs' folders; `root` if empty.

    A run without a finished outcome has no loss: where it was is not what it would have reached.
    """
    keys = dict.fromkeys(key for run in runs for key in run.point)
    table = []
    for run in runs:
        outcome = pool.read_outcome(root, run.name, home)
        status = outcome.status if outcome is not None else UNFINISHED
        folder = os.path.join(home or root, run.name)
        result = run_table.read(folder) if status == pool.FINISHED else None
        values = {name: getattr(result, name, None) for name in run_table.COLUMNS if name != "run"}
        row: dict[str, Any] = {"run": run.name, "status": status}
        row |= {key: run.point.get(key) for key in keys}
        row |= {name: value for name, value in values.items() if name not in row}
        row["message"] = outcome.message if outcome is not None else ""
        table.append(row)
    return table


@dataclasses.dataclass(frozen=True)
class Rank:
    """A point, and its finished runs; spread: standard deviation of their losses."""

    point: dict[str, Any]
    losses: tuple[float, ...]
    others: dict[str, int]  # runs that ended in another way, by how

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses) if self.losses else math.inf

    @property
    def spread(self) -> float:
        """nan with fewer than two runs."""
        if len(self.losses) < 2:
            return math.nan
        squares = sum((x - self.mean) ** 2 for x in self.losses)
        return math.sqrt(squares / (len(self.losses) - 1))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.spread / math.sqrt(len(self.losses)) if self.losses else math.nan


def rank(runs: Sequence[Trial], table: Sequence[Mapping[str, Any]]) -> list[Rank]:
    """The points, the lowest mean loss first; those of which a run is missing come last."""
    groups: dict[str, tuple[dict[str, Any], list[Mapping[str, Any]]]] = {}
    for run, row in zip(runs, table, strict=True):
        point = {key: value for key, value in run.point.items() if key not in REPEATS}
        groups.setdefault(repr(point), (point, []))[1].append(row)
    ranks = []
    for point, rows in groups.values():
        ended = [row["status"] for row in rows if row["loss"] is None]
        losses = tuple(row["loss"] for row in rows if row["loss"] is not None)
        ranks.append(Rank(point, losses, {status: ended.count(status) for status in ended}))
    return sorted(ranks, key=lambda r: (bool(r.others), r.mean))


def ranking(ranks: Sequence[Rank], limit: int = 20) -> str:
    """The ranking as text; a ~ marks points that two standard errors don't tell from the best."""
    best, lines = ranks[0], []
    keys = [*ranks[0].point]
    short = space.labels(keys)
    width = max(len(space.name(r.point)) for r in ranks[:limit])
    lines.append(f"   {'point'.ljust(width)}  loss    spread  runs")
    for place, r in enumerate(ranks[:limit], 1):
        named = ", ".join(f"{short[k]}={v}" for k, v in r.point.items()) or "(one point)"
        loss = f"{r.mean:.4f}" if r.losses else "-"
        spread = f"{r.spread:.4f}" if len(r.losses) > 1 else "-"
        difference = math.hypot(r.error, best.error)
        near = place > 1 and not r.others and r.mean - best.mean <= 2 * difference
        rest = "".join(f", {n} {status}" for status, n in r.others.items())
        mark = " ~" if near else ""
        lines.append(
            f"{place:>2} {named.ljust(width)}  {loss:<6}  {spread:<6}  {len(r.losses)}{rest}{mark}"
        )
    if len(ranks) > limit:
        lines.append(f"   and {len(ranks) - limit} more")
    if any(line.endswith("~") for line in lines):
        lines.append("   ~ within two standard errors of the best")
    return "\n".join(lines)


def summary(table: Sequence[Mapping[str, Any]]) -> str:
    """How many runs ended how, and what the others said."""
    statuses = [row["status"] for row in table]
    counts = {s: statuses.count(s) for s in dict.fromkeys(statuses)}
    lines = [f"{len(table)} runs: " + ", ".join(f"{n} {status}" for status, n in counts.items())]
    lines += [
        f"  {row['status']}: {row['run']}: {row['message']}"
        for row in table
        if row["status"] in (pool.DIVERGED, pool.FAILED)
    ]
    return "\n".join(lines)


def plot(ranks: Sequence[Rank], path: Path) -> None:
    """Draws the loss against every key: dots are runs, bars reach over a point's spread, and a line
    joins the best at each value. Runs without a loss are crosses at the top.

    Raises:
        ValueError: no run has a loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    finished = [r for r in ranks if r.losses]
    if not finished:
        raise ValueError("no run of the sweep has a loss to draw")
    keys = [*ranks[0].point] or [""]
    lows = [min(r.losses) for r in finished]
    low, high = min(lows), max(max(r.losses) for r in finished)
    middle = sorted(r.mean for r in finished)[len(finished) // 2]
    top = min(high, middle + 3 * (middle - low)) if middle > low else high
    pad = 0.08 * (top - low or 0.1 * low)
    ceiling = top + 2 * pad
    columns = min(3, len(keys))
    lines = -(-len(keys) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False, sharey=True
    )
    for axis, key in zip(axes.flat, keys, strict=False):
        at = _places(axis, [r.point.get(key) for r in ranks])
        best: dict[float, float] = {}
        for r in ranks:
            x = at(r.point.get(key))
            axis.plot([x] * len(r.losses), r.losses, ".", color="0.6", zorder=1)
            count = sum(r.others.values())
            if count:
                axis.plot([x] * count, [ceiling] * count, "x", color="C3", clip_on=False)
            if r.losses:
                spread = r.spread if len(r.losses) > 1 else 0.0
                axis.errorbar(
                    x, r.mean, spread, marker="o", color="C0", alpha=0.6, capsize=3, zorder=2
                )
                best[x] = min(best.get(x, math.inf), r.mean)
        axis.plot(*zip(*sorted(best.items()), strict=True), color="C1", linewidth=1.5, zorder=3)
        axis.margins(x=0.12)
        axis.set_xlabel(key)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(low - pad, ceiling)
    for axis in axes.flat[len(keys) :]:
        axis.remove()
    for row in axes:
        row[0].set_ylabel("final validation loss (nats per token)")
    counts: dict[str, int] = {}
    for r in ranks:
        for status, n in r.others.items():
            counts[status] = counts.get(status, 0) + n
    note = "".join(f" · {n} {status} (×)" for status, n in counts.items())
    hidden = sum(loss > ceiling for r in finished for loss in r.losses)
    note += f" · {hidden} above the picture" if hidden else ""
    finished_runs = sum(len(r.losses) for r in finished)
    note += " · line: best mean at each value"
    figure.suptitle(f"{finished_runs} finished runs{note}", fontsize=10)
    figure.tight_layout()
    figure.savefig(str(path), dpi=120)
    plt.close(figure)


def _places(axis: Any, values: Sequence[Any]) -> Callable[[Any], float]:
    """Where the values of a key are drawn: numbers to scale, in the logarithm if they span a factor
    of eight, all others side by side.
    """
    distinct = list(dict.fromkeys(map(str, values)))
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        if min(values) > 0 and max(values) >= 8 * min(values):
            axis.set_xscale("log")
        if len(distinct) <= 8:
            axis.set_xticks(sorted(set(values)), [f"{v:g}" for v in sorted(set(values))])
            axis.minorticks_off()
        return float
    families = fonts.families("".join(distinct))
    shown = [fonts.readable(text, families) for text in distinct]
    rotation = 20 * (max(map(len, distinct)) > 8)
    axis.set_xticks(range(len(distinct)), shown, rotation=rotation, family=families)
    return lambda value: float(distinct.index(str(value)))
