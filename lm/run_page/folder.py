"""Records of a run's folder, local or in a bucket, and what they say of the run's state."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import time
from collections.abc import Callable
from typing import Any

from lm.exit_codes import Exit
from lm.reliability import attempts
from lm.storage import files
from lm.storage.epaths import StoragePath
from lm.telemetry import goodput, jsonl, metrics
from lm.telemetry.jsonl import Record
from lm.telemetry.progress import format_duration

CONFIG_FILE = "config.json"
SILENCE = 180.0  # seconds without a record after which a run is not said to be running
FINISHED, RUNNING, STOPPED, FAILED, UNKNOWN = "finished", "running", "stopped", "failed", "unknown"


class NoRun(FileNotFoundError):
    """A folder holds no run."""


@dataclasses.dataclass(frozen=True)
class State:
    """`kind` is one of the words above, `text` a sentence about it."""

    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of a run; each file is read when it is first asked for."""

    workdir: str
    read_records: Callable[[str], list[Record]] = jsonl.read

    @property
    def name(self) -> str:
        return StoragePath(self.workdir).resolve().name

    def check(self) -> None:
        """Raise NoRun where the folder holds neither a config nor metrics."""
        if not (self.config or self.metrics):
            raise NoRun(f"{self.workdir} holds no run: there is no {CONFIG_FILE} in it")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return self.read_json(CONFIG_FILE)

    @functools.cached_property
    def overview(self) -> dict[str, Any]:
        """`lm.training.describe.overview`; {} of a run that has none."""
        return self.read_json(metrics.OVERVIEW_FILE)

    @functools.cached_property
    def metrics(self) -> list[Record]:
        return self.read_lines(metrics.METRICS_FILE)

    @functools.cached_property
    def train(self) -> list[Record]:
        return [r for r in self.metrics if r["kind"] == "train"]

    @functools.cached_property
    def evals(self) -> list[Record]:
        return [r for r in self.metrics if r["kind"] == "eval"]

    @functools.cached_property
    def evaluations(self) -> list[Record]:
        """Those of `config.evaluations`."""
        return self.read_lines(metrics.EVALUATIONS_FILE)

    @functools.cached_property
    def goodput(self) -> list[Record]:
        return self.read_lines(goodput.GOODPUT_FILE)

    @functools.cached_property
    def attempts(self) -> list[Record]:
        return attempts.merge(self.read_lines(attempts.ATTEMPTS_FILE))

    @functools.cached_property
    def layers(self) -> list[Record]:
        return self.read_lines(metrics.LAYERS_FILE)

    @property
    def step(self) -> int:
        """The number of steps known to be done."""
        return max(r["step"] for r in [{"step": 0}, *self.metrics[-1:], *self.goodput[-1:]])

    @property
    def num_steps(self) -> int | None:
        """The length of the run, where it is known."""
        configured = self.config.get("train", {}).get("num_steps")
        return self.overview.get("num_steps", configured)

    def read_lines(self, name: str) -> list[Record]:
        return self.read_records(f"{self.workdir}/{name}")

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a file; {} where there is none."""
        try:
            return json.loads(files.read_bytes(f"{self.workdir}/{name}"))
        except FileNotFoundError:
            return {}

    def read_text(self, name: str) -> str:
        """The text of a file; "" where there is none."""
        try:
            return files.read_bytes(f"{self.workdir}/{name}").decode(errors="replace")
        except FileNotFoundError:
            return ""

    def names(self, folder: str) -> list[str]:
        """The names in a folder of the run; none where there is no such folder."""
        return files.list_names(f"{self.workdir}/{folder}")

    @property
    def last_sign(self) -> float:
        """Seconds since 1970 of the last record with a time; 0 where none has one."""
        wrote = [r["wrote"] for r in self.goodput[-1:]]
        last = [a for a in self.attempts[-1:] for a in (a["began"], a.get("ended")) if a]
        return max([*wrote, *map(_seconds, last)], default=0.0)

    def state(self, now: float | None = None) -> State:
        """The state by the last attempt: `attempts.jsonl`.

        now: seconds since 1970; None: now."""
        if not self.attempts:
            return State(
                UNKNOWN,
                "no start is recorded yet: its processes import, read data and compile first",
            )
        last = self.attempts[-1]
        if (code := last.get("code")) is None:
            silent = (time.time() if now is None else now) - self.last_sign
            if silent < SILENCE:
                return State(RUNNING, f"running since {last['began']}")
            text = (
                f"no end is recorded, and nothing was written for {duration(silent)}: it was killed"
            )
            return State(UNKNOWN, f"{text}, or takes as long for a log window")
        if code == Exit.SUCCESS:
            return State(FINISHED, f"finished at {last['ended']}")
        meaning = Exit(code).meaning if code in list(Exit) else f"exit code {code}"
        if code in (Exit.INTERRUPTED, Exit.TERMINATED):
            return State(STOPPED, f"{meaning.partition(' (')[0]}; the same command goes on")
        return State(FAILED, f"{meaning}; {last.get('error', '')}".strip("; "))


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def duration(seconds: float) -> str:
    """Seconds as 3d04h, and below a day as `format_duration`."""
    days, rest = divmod(seconds, 86400)
    return f"{int(days)}d{int(rest // 3600):02d}h" if days else format_duration(seconds)


def is_sweep(workdir: str) -> bool:
    return files.exists(f"{workdir}/sweep.json")
