"""Trackers by their names in `config.log.trackers`: checked before a run starts, and opened."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from lm.storage import files
from lm.telemetry import metrics
from lm.telemetry.jsonl import Record
from lm.telemetry.trackers.background import Background
from lm.telemetry.trackers.local import JsonLines, TensorBoard
from lm.telemetry.trackers.mlflow_run import MlflowRun
from lm.telemetry.trackers.tracker import RemoteRun, RunInfo, Status, Tracker
from lm.telemetry.trackers.wandb_run import WandbRun

REMOTE: dict[str, type[RemoteRun]] = {"wandb": WandbRun, "mlflow": MlflowRun}
ID_FILE = "tracker_id"
REST_SECONDS = 600.0  # for a tracker that gets a whole run


def check(names: Sequence[str]) -> None:
    """Raises ValueError where a tracker's package is not installed or "jsonl" is missing."""
    if "jsonl" not in names:
        raise ValueError(
            f"config.log.trackers ({names}) must have 'jsonl': restarts, lm report and lm watch "
            "read metrics.jsonl, and so do trackers that lack records"
        )
    for name in names:
        if name in REMOTE and find_spec(name) is None:
            raise ValueError(
                f"config.log.trackers: {name!r} needs the package {name}: pip install {name}, or "
                "pip install -e '.[trackers]' for all trackers"
            )


class Trackers:
    """All trackers of a run in its lead process; the other processes have none."""

    def __init__(self, local: Sequence[Tracker] = (), remote: Sequence[Tracker] = ()) -> None:
        """local: in the run's folder."""
        self._local, self._remote = local, remote
        self._all = (*local, *remote)

    def write(self, step: int, records: Sequence[Record]) -> None:
        """Add records, all of them of `step`, as of `Tracker`."""
        for tracker in self._all:
            tracker.write(step, records)

    def roll_back(self, step: int) -> None:
        """Drop the records of steps after `step`, which are done again, where a tracker can."""
        for tracker in self._all:
            tracker.roll_back(step)

    def flush(self) -> None:
        """Return when all records are stored in the run's folder."""
        for tracker in self._all:
            tracker.flush()

    def close(self, status: Status) -> None:
        for tracker in self._all:
            tracker.close(status)

    def abort(self) -> None:
        """Close those behind a network, after an error that ends the run."""
        for tracker in self._remote:
            tracker.close("failed")


def open_trackers(
    names: Sequence[str],
    info: RunInfo,
    first_step: int,
    warn: Callable[[str], object],
    *,
    evaluates: bool = False,
) -> Trackers:
    """The trackers of a run that goes on after `first_step` steps.

    warn: is called, by threads, with what the user should know. evaluates: there will be records of
    evaluations.jsonl.
    """
    local: list[Tracker] = [JsonLines(info.workdir, first_step)]
    file = metrics.EVALUATIONS_FILE
    if evaluates or files.exists(f"{info.workdir}/{file}"):
        local.append(JsonLines(info.workdir, first_step, file, (metrics.EVALUATION,)))
    if "tensorboard" in names:
        local.append(TensorBoard(info.workdir))
    return Trackers(local, _open_remote(names, info, warn))  # which read the file of `local`


def send_rest(
    names: Sequence[str],
    info: RunInfo,
    warn: Callable[[str], object],
    *,
    step: int = 0,
    tables: Mapping[str, Sequence[Mapping[str, str]]] = {},
    pictures: Mapping[str, bytes] = {},
) -> None:
    """Send trackers behind a network what they lack of a run that has finished.

    tables, pictures: of its last `step`: {name: rows of texts by column}, {name: PNG}.
    """
    for tracker in _open_remote(names, info, warn):
        for name, rows in tables.items():
            tracker.table(step, name, rows)
        for name, png in pictures.items():
            tracker.picture(step, name, png)
        tracker.close("finished", REST_SECONDS)


def _open_remote(
    names: Sequence[str], info: RunInfo, warn: Callable[[str], object]
) -> list[Background]:
    kinds = {name: REMOTE[name] for name in names if name in REMOTE}
    if not kinds:
        return []
    run_id = _run_id(info.workdir)
    return [Background(name, kind, info, run_id, warn) for name, kind in kinds.items()]


def _run_id(workdir: str) -> str:
    """The id at all trackers of the run in a folder, of 16 hexadecimal digits; made if need be."""
    files.create(f"{workdir}/{ID_FILE}", uuid.uuid4().hex[:16])
    return files.read_bytes(f"{workdir}/{ID_FILE}").decode()
