"""Protocols of trackers, and the values of a run's records by name."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from lm.storage.epaths import StoragePath
from lm.telemetry import jsonl, metrics
from lm.telemetry.jsonl import Record

Status = Literal["finished", "stopped", "failed"]


class Tracker(Protocol):
    """A destination of a run's records; none of its methods waits for a network."""

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Add records of metrics.jsonl, evaluations.jsonl or layers.jsonl, all of them of `step`.

        Those of layers have the kind "layers" beside what the file has.
        """
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
        """The last step of each value and table that the run has; {} of a new run."""
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


def read_records(workdir: str) -> list[Record]:
    """The records of all files of a run, as `Tracker.write` gets them."""
    folder = StoragePath(workdir)
    layers = [{"kind": metrics.LAYERS, **r} for r in jsonl.read(folder / metrics.LAYERS_FILE)]
    return [*metrics.read(workdir), *jsonl.read(folder / metrics.EVALUATIONS_FILE), *layers]


def values_by_name(records: Sequence[Record]) -> dict[str, float]:
    """The numbers of one step's records as train/NAME, eval/SOURCE/NAME, evaluation/NAME/VALUE, and
    layers/STATISTIC/GROUP, with /LAYER where it has one for each; of layers, finite ones.
    """
    sources = metrics.short_names(
        list(dict.fromkeys(r["source"] for r in records if r["kind"] == metrics.EVAL))
    )
    values: dict[str, float] = {}
    for record in records:
        if (kind := record["kind"]) == metrics.LAYERS:
            flat = _flat({k: v for k, v in record.items() if k not in ("step", "kind")}, kind)
            values |= {value_name(name): x for name, x in flat if math.isfinite(x)}
            continue
        source = record.get("source")
        tag = kind if source is None else f"{kind}/{sources.get(source, source)}"
        for key, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
                values[value_name(f"{tag}/{key}")] = value
    return values


def _flat(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}/{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}/{number:02d}")
    else:
        yield name, float(value)  # of a file: "NaN" in a list


def tables_by_name(records: Sequence[Record]) -> dict[str, Sequence[Mapping[str, str]]]:
    """The samples of one step's records as evaluation/NAME/samples."""
    return {
        value_name(f"{r['kind']}/{r['source']}/samples"): r["samples"]
        for r in records
        if r.get("samples")
    }


def value_name(text: str) -> str:
    """`text` in the characters that all trackers allow, as a relative path."""
    parts = re.sub(r"[^\w./ -]", "_", text).split("/")
    return "/".join(part for part in parts if part.strip("."))
