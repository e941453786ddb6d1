"""Rows of scripts/gpu_check.py: lines of JSON and of a table, written at once; their summary."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.telemetry import jsonl

Figures = Mapping[str, Any]
UNITS = (  # endings of names, the unit to show and its size
    ("_flop_per_s", " TFLOP/s", 1e12),
    ("_bytes_per_s", " GB/s", 1e9),
    ("_per_s", "/s", 1),
    ("_bytes", " GiB", 2**30),
    ("_percent", "%", 1),
    ("_ms", " ms", 1),
    ("_s", " s", 1),
)


@dataclasses.dataclass(frozen=True)
class Goal:
    """A bound of a figure: at least `low` and at most `high`."""

    figure: str
    low: float | None = None
    high: float | None = None

    def is_met(self, figures: Figures) -> bool | None:
        """None where the figure was not measured."""
        value = figures.get(self.figure)
        if value is None:
            return None
        # nan is within no bound
        above = self.low is None or value >= self.low
        return bool(above and (self.high is None or value <= self.high))

    def __str__(self) -> str:
        bounds = {"at least": self.low, "at most": self.high}
        words = (f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        return f"{self.figure} {' and '.join(words)}"


@dataclasses.dataclass(frozen=True)
class Writer:
    """The rows of one part."""

    path: Path
    part: str

    def add(
        self,
        name: str,
        figures: Figures,
        goals: Sequence[Goal] = (),
        *,
        details: Figures | None = None,
        skipped: str = "",
        failed: str = "",
    ) -> None:
        """Write a row: `figures` are shown, `details` are in the file alone.

        skipped, failed: why there are no figures.
        """
        status = "skipped" if skipped else "failed" if failed else "measured"
        met = {str(goal): goal.is_met(figures) for goal in goals}
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = {"part": self.part, "name": name, "status": status}
        row |= {"reason": skipped or failed, "figures": dict(figures)}
        row |= {"goals": met, "details": dict(details or {}), "time": time}
        with self.path.open("a") as file:
            file.write(jsonl.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line(row), flush=True)


@dataclasses.dataclass(frozen=True)
class Check:
    """The file of a part's rows, the sizes to measure, and the plans to compare with."""

    rows: Writer
    small: bool
    plans: Mapping[str, Mapping[str, Any]]


def read(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """The rows of a file from byte `start` on."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(start)
        return [json.loads(text) for text in file.read().splitlines()]


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    found = [_text(*item) for item in row["figures"].items()]
    marks = {True: "pass", False: "MISS", None: "not measured"}
    found += [f"{marks[met]}: {goal}" for goal, met in row["goals"].items()]
    if row["reason"]:
        found.insert(0, f"{row['status']}: {row['reason']}")
    return f"{row['part']:<18} {row['name']:<22} {' · '.join(found)}"


def _text(name: str, value: Any) -> str:
    ending, unit, size = next((u for u in UNITS if name.endswith(u[0])), ("", "", 1))
    name = name.removesuffix(ending).replace("_", " ")
    if value is None or isinstance(value, str | bool):
        return f"{name} {'-' if value is None else value}"
    value = value / size
    return f"{name} {value:.4g}{unit}" if abs(value) < 1e4 else f"{name} {value:,.0f}{unit}"


def summary(rows: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """(lines about goals and parts that did not end well, True if every goal was met)."""
    goals = [
        (f"{row['part']} {row['name']}".strip(), goal, met)
        for row in rows
        for goal, met in row["goals"].items()
    ]
    failed = [row for row in rows if row["status"] == "failed"]
    count = {mark: sum(met is mark for *_, met in goals) for mark in (True, False, None)}
    lines = [f"goals: {count[True]} passed, {count[False]} missed, {count[None]} not measured"]
    lines += [f"  MISS  {where}: {goal}" for where, goal, met in goals if met is False]
    lines += [f"  failed  {row['part']}: {row['reason']}" for row in failed]
    return "\n".join(lines), not failed and not count[False]
