"""Wall time of a run across its restarts, in equal bins by phase, from goodput.jsonl."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm.exit_codes import Exit
from lm.run_page.thinning import numbers
from lm.telemetry import goodput
from lm.telemetry.jsonl import Record
from lm.telemetry.phase_timer import PHASES

BINS = 240
ORDER = ("step", "redone", "evaluate", "save", "data", "restore", "investigate", "init", "compile",
         "start", "down")  # fmt: skip
_START = ("start", "compile", "init", "restore")  # phases of a process before its first record
assert set(ORDER) == {*PHASES, "redone", "down"}


def make(records: Sequence[Record]) -> dict[str, Any] | None:
    """{"start", "wall": seconds since 1970 and of the whole; "goodput"; "seconds": {phase: in all};
    "bins": {phase: seconds in each of `BINS`}}; None before anything was written.

    `redone` are steps that a later process did again, `down` the time between processes: both as in
    `lm.telemetry.goodput`.
    """
    if not records:
        return None
    report = goodput.report(records)
    start = records[0]["began"]
    width = (report.wall or 1.0) / BINS
    bins = {phase: np.zeros(BINS) for phase in ORDER}
    for begin, end, phase, seconds in _pieces(records):
        _add(bins[phase], (begin - start) / width, (end - start) / width, seconds)
    used = {phase: numbers(b, 4) for phase, b in bins.items() if b.any()}
    seconds = {"step": report.productive, **report.losses}
    totals = {phase: round(seconds[phase], 1) for phase in ORDER if seconds[phase] > 0}
    return {
        "start": start,
        "wall": report.wall,
        "goodput": report.goodput,
        "seconds": totals,
        "bins": used,
    }


def _pieces(records: Sequence[Record]) -> Iterator[tuple[float, float, str, float]]:
    """(begin, end, phase, seconds of it in between) of the time between any two records."""
    processes = [list(g) for _, g in itertools.groupby(records, lambda r: r["began"])]
    ended = None
    for i, lines in enumerate(processes):
        began, step = lines[0]["began"], lines[0]["first_step"]
        if ended is not None and began > ended:
            yield ended, began, "down", began - ended
        kept = min([r[0]["first_step"] for r in processes[i + 1 :]], default=float("inf"))
        before: dict[str, float] = {}
        for line in lines:
            if not before:  # nothing but its start, phase by phase
                for phase in _START:
                    seconds = line["seconds"].get(phase, 0.0)
                    yield began, began + seconds, phase, seconds
                    began += seconds
            for phase, total in line["seconds"].items():
                seconds = total - before.get(phase, 0.0) if before or phase not in _START else 0.0
                if phase == "step" and line["step"] > step:
                    lasted = max(0, min(kept, line["step"]) - step) / (line["step"] - step)
                    yield began, line["wrote"], "redone", seconds * (1 - lasted)
                    seconds *= lasted
                yield began, line["wrote"], phase, seconds
            before, step, began = line["seconds"], line["step"], line["wrote"]
        ended = began


def _add(bins: np.ndarray, begin: float, end: float, seconds: float) -> None:
    """Add seconds to the bins from `begin` to `end`, both counted in bins."""
    if seconds <= 0:
        return
    first, last = (int(np.clip(x, 0, len(bins) - 1)) for x in (begin, end))
    if first == last:
        bins[first] += seconds
        return
    edges = np.clip(np.arange(first, last + 2, dtype=float), begin, end)
    bins[first : last + 1] += seconds * np.diff(edges) / (edges[-1] - edges[0])


def starts(records: Sequence[Record], attempts: Sequence[Record]) -> list[dict[str, Any]]:
    """Each start of the run: when, where, from which step, up to which, and how it ended.

    It begins with the process, imports included. Runs of older code have goodput and no attempts.
    """
    found = []
    for a in attempts:
        code = a.get("code")
        if code is None:
            end = a.get("error") or "no end is recorded"
        else:
            meaning = Exit(code).meaning.partition(":")[0] if code in list(Exit) else "exit code"
            end = f"{meaning} ({code})" if code else meaning
        own = _process(a, records)
        found.append(
            {
                "number": a["attempt"],
                "began": _text(own["began"]) if own else a["began"],
                "ended": a.get("ended"),
                "host": a.get("host", ""),
                "processes": a.get("processes", 1),
                "from": a.get("from_step", 0),
                "to": a.get("step", own and own["step"]),
                "end": end,
                "error": a.get("error", "") if code else "",
                "good": code in (Exit.SUCCESS, Exit.INTERRUPTED, Exit.TERMINATED),
            }
        )
    return found


def _process(attempt: Record, records: Sequence[Record]) -> Record | None:
    """The last goodput record of the process of an attempt, which began before its attempt did."""
    began = datetime.datetime.fromisoformat(attempt["began"]).timestamp()
    own = [r for r in records if r["began"] <= began + 1 and r["wrote"] >= began - 1]
    return own[-1] if own else None


def _text(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
