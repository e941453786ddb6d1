"""Tables of figures: the common result of all probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from lm.probes.intervals import Interval

Cell: TypeAlias = str | int | float | Interval


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of figures.

    probe: the probe that made it. columns: the first one names a row. note: how to read it. x, y:
    columns that are drawn, y with intervals; without x, a line for each row. chance: y of a model
    that knows nothing. more: figures for the JSON file alone.
    """

    probe: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    note: str
    y: tuple[str, ...]
    x: str | None = None
    chance: float | None = None
    more: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def column(self, name: str) -> list[Cell]:
        return [row[self.columns.index(name)] for row in self.rows]

    def to_json(self) -> dict[str, object]:
        rows = [dict(zip(self.columns, map(_plain, row), strict=True)) for row in self.rows]
        head = {"probe": self.probe, "title": self.title, "note": self.note}
        return {**head, "rows": rows, **self.more}


def _plain(cell: Cell) -> object:
    return cell._asdict() if isinstance(cell, Interval) else cell
