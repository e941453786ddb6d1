"""Protocols of trackers, and the values of a run's records by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from lm.telemetry import metrics
from lm.telemetry.jsonl import Record

Status = Literal["finished", "stopped", "failed"]


class Tracker(Protocol):
    """A destination of a run's records; none of its methods waits for a network."""

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Add records of metrics.jsonl, all of them of `step`."""
        ...

    def roll_back(self, step: int) -> None:
        """Prepare for the steps after `step`, which are done again."""
        ...

    def flush(self) -> None:
        """Return when all that was written to this run's folder is stored."""
        ...

    def close(self, status: Status) -> None: ...


class RemoteRun(Protocol):
    """A run at a tracker, through its client. Its methods may block, and raise anything."""

    def __init__(self, info: RunInfo, run_id: str) -> None:
        """Go on with the run of this id, which is the same in all processes, or begin it."""
        ...

    def last_steps(self) -> dict[str, int]:
        """The last step of each value that the run has; {} of a new run."""
        ...

    def log(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Add (step, values), in the order of steps, which are no earlier than those before."""
        ...

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Add a table of texts; every row has the same columns."""
        ...

    def picture(self, step: int, name: str, png: bytes) -> None: ...

    def close(self, status: Status) -> None: ...

    @staticmethod
    def abandon() -> None:
        """Undo what of the client would keep the process from ending, within seconds."""
        ...


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """The description of a run that trackers show."""

    workdir: str
    project: str
    tags: tuple[str, ...]
    notes: str
    config: Mapping[str, Any]  # nested, as in config.json
    code: Mapping[str, Any]  # lm.checkpoint.code_version

    @property
    def name(self) -> str:
        return self.workdir.rstrip("/").rpartition("/")[2]


def by_step(records: Iterable[Record]) -> dict[int, list[Record]]:
    """Records by their steps, in their order."""
    found: dict[int, list[Record]] = {}
    for record in records:
        found.setdefault(record["step"], []).append(record)
    return found


def values_by_name(records: Sequence[Record]) -> dict[str, float]:
    """The numbers of one step's records as train/NAME and eval/SOURCE/NAME."""
    sources = metrics.short_names(
        list(dict.fromkeys(r["source"] for r in records if "source" in r))
    )
    values = {}
    for record in records:
        kind = record["kind"]
        tag = f"{kind}/{sources[record['source']]}" if "source" in record else kind
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        values |= {value_name(f"{tag}/{k}"): v for k, v in numbers.items()}
    return values


def value_name(text: str) -> str:
    """`text` in the characters that all trackers allow, as a relative path."""
    parts = re.sub(r"[^\w./ -]", "_", text).split("/")
    return "/".join(part for part in parts if part.strip("."))
