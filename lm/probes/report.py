"""The report of probes: a JSON file, a Markdown page and a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm.probes.intervals import LEVEL, RESAMPLES, Interval
from lm.probes.tables import Cell, Table
from lm.storage import files
from lm.storage.epaths import StoragePath
from lm.telemetry import jsonl
from lm.telemetry.figures import make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JSON, PAGE, PLOT = "probes.json", "probes.md", "probes.png"


def write(folder: str, head: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """Write the three files; returns the page. head: the run, and what else all tables are of."""
    path = StoragePath(folder)
    path.mkdir(parents=True, exist_ok=True)
    page = markdown(head, tables)
    content = {**head, "level": LEVEL, "resamples": RESAMPLES}
    content["tables"] = [table.to_json() for table in tables]
    text = jsonl.dumps(content, indent=2, ensure_ascii=False)
    files.write_atomically(str(path / JSON), (text + "\n").encode())
    files.write_atomically(str(path / PAGE), f"{page}\n![intervals]({PLOT})\n".encode())
    files.write_atomically(str(path / PLOT), plot(tables))
    return page


def markdown(head: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """Figures with their intervals in brackets."""
    about = ", ".join(
        f"{key} {value}" for key, value in head.items() if not isinstance(value, dict)
    )
    lines = [
        "# Probes",
        "",
        f"{about}. In brackets: {LEVEL:.0%} intervals: Wilson's for shares of sequences and "
        f"canaries, else percentiles of {RESAMPLES} bootstrap samples.",
    ]
    for table in tables:
        lines += ["", f"## {table.title}", "", table.note, ""]
        lines += [_line(table.columns), _line(["---"] * len(table.columns))]
        lines += [_line([_text(cell) for cell in row]) for row in table.rows]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text(cell: Cell) -> str:
    if not isinstance(cell, Interval):
        return (
            f"{cell:,}"
            if isinstance(cell, int)
            else f"{cell:.3g}"
            if isinstance(cell, float)
            else cell
        )
    value, low, high = map(_number, cell)
    return value if math.isnan(cell.low) else f"{value} [{low}, {high}]"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def plot(tables: Sequence[Table]) -> bytes:
    """A PNG file with an axis for each table."""
    columns = min(2, len(tables))
    figure, axes = make_figure(-(-len(tables) // columns), columns, size=(6.5, 3.6))
    for axis, table in zip(axes.flat, tables, strict=False):
        _draw(axis, table)
    for axis in axes.flat[len(tables) :]:
        axis.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    return content.getvalue()


def _draw(axis: Axes, table: Table) -> None:
    """Points with intervals: along a column of numbers, else one row above the other."""
    title = table.title.replace("`", "")
    axis.set_title(title if len(title) < 70 else f"…{title[-68:]}", fontsize=9)
    for name in table.y:
        found = [x for x in table.column(name) if isinstance(x, Interval)]
        values = [x.value for x in found]
        errors = [
            [max(x.value - x.low, 0.0) for x in found],  # NaN, without an interval, draws none
            [max(x.high - x.value, 0.0) for x in found],
        ]
        if table.x is None:
            axis.errorbar(values, range(len(found)), xerr=errors, fmt="o", capsize=3, label=name)
        else:
            at = [float(x) for x in table.column(table.x) if isinstance(x, int | float)]
            axis.errorbar(at, values, yerr=errors, marker="o", capsize=3, label=name)
    if table.x is None:
        labels = [str(row[0]) for row in table.rows]
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_xlabel(table.y[0])
    else:
        axis.set_xscale("symlog", linthresh=1)
        ticks = [float(x) for x in table.column(table.x) if isinstance(x, int | float)]
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.set_xlabel(table.x)
        axis.legend(fontsize=8)
    if table.chance is not None:
        line = axis.axvline if table.x is None else axis.axhline
        line(table.chance, color="gray", linestyle=":")
