"""Goodput: the share of a run's wall time, across restarts, spent on steps that lasted.

Each lead process of a run appends a line to goodput.jsonl as it begins and at every log line, so
that a kill loses little. Steps after the checkpoint that its successor starts from were done twice
(`redone`), and between the two nothing ran (`down`).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence

from lm.storage.epaths import StoragePath
from lm.telemetry import energy, jsonl
from lm.telemetry.energy import Energy, EnergyMeter
from lm.telemetry.jsonl import Record
from lm.telemetry.phase_timer import PHASES, PhaseTimer

GOODPUT_FILE = "goodput.jsonl"


def process_start() -> float:
    """time.monotonic() at which this process started, imports included; now, where that is unknown
    (but on Linux).
    """
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return time.monotonic()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


class Goodput:
    """Writer of goodput.jsonl, of one process if it is `active`, with the energy that `meter`
    counts.
    """

    def __init__(
        self,
        workdir: str,
        phases: PhaseTimer,
        *,
        first_step: int,
        meter: EnergyMeter | None = None,
        active: bool = True,
    ) -> None:
        path = StoragePath(workdir) / GOODPUT_FILE
        self._before = jsonl.read(path)
        self._file = jsonl.Writer(path, self._before, active=active)
        self._phases, self._first_step, self._meter = phases, first_step, meter
        self._began = time.time() - (time.monotonic() - phases.began)
        self.write(first_step)  # a process that is killed before its first log line counts, too

    def write(self, step: int) -> GoodputReport:
        """Write the seconds of every phase up to now, and return the report of the run.

        step: the number of steps done.
        """
        record = {
            "began": round(self._began, 3),  # identifies the process
            "wrote": round(time.time(), 3),
            "first_step": self._first_step,
            "step": step,
            "seconds": {k: round(v, 3) for k, v in self._phases.seconds().items() if v},
        }
        if self._meter is not None:
            record["energy"] = self._meter.record(time.monotonic() - self._phases.began)
        self._file.append(record)
        return report([*self._before, record])

    def flush(self) -> None:
        """Return when all records are stored."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclasses.dataclass(frozen=True)
class GoodputReport:
    """Seconds since the run first began: productive ones, and losses by name; and energy, of the
    processes that recorded it.
    """

    wall: float
    productive: float
    losses: dict[str, float]  # phases, `redone` and `down`
    processes: int
    energy: Energy | None = None

    @property
    def goodput(self) -> float:
        return self.productive / self.wall if self.wall else 0.0

    def __str__(self) -> str:
        largest = sorted(self.losses.items(), key=lambda item: -item[1])
        parts = [f"{k} {100 * v / self.wall:.1f}%" for k, v in largest if v >= 0.0005 * self.wall]
        starts = f"{self.processes} start{'s' if self.processes > 1 else ''}"
        return f"goodput {100 * self.goodput:.1f}% of {self.wall:.0f} s, {starts}; lost to " + (
            ", ".join(parts) or "nothing"
        )


def read(workdir: str) -> GoodputReport | None:
    """The report of a run's folder; None before anything was written."""
    records = jsonl.read(StoragePath(workdir) / GOODPUT_FILE)
    return report(records) if records else None


def report(records: Sequence[Record]) -> GoodputReport:
    """The report of the records of all processes, in order; at least one.

    The last one of each counts. A step counts as redone when a later process started at or before
    it; its time is the mean step time of the process that did it first.
    """
    records = list({record["began"]: record for record in records}.values())
    losses = dict.fromkeys([*PHASES, "redone", "down"], 0.0)
    del losses["step"]
    productive = 0.0
    for i, record in enumerate(records):
        seconds, in_steps = record["seconds"], record["seconds"].get("step", 0.0)
        for phase in losses:
            losses[phase] += seconds.get(phase, 0.0)
        steps = record["step"] - record["first_step"]
        kept = min([record["step"], *(r["first_step"] for r in records[i + 1 :])])
        share = max(0, kept - record["first_step"]) / steps if steps else 0.0
        productive += in_steps * share
        losses["redone"] += in_steps * (1 - share)
        if i:
            losses["down"] += max(0.0, record["began"] - records[i - 1]["wrote"])
    wall = records[-1]["wrote"] - records[0]["began"]
    used = [record["energy"] for record in records if "energy" in record]
    spent = energy.total(used) if used else None
    return GoodputReport(wall, productive, losses, len(records), spent)
