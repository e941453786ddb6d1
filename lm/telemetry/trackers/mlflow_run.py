"""A run at MLflow, at a server or in a local database, through the package mlflow.

Its client reads MLFLOW_TRACKING_URI and a server's credentials.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm.telemetry.trackers.tracker import RunInfo, Status

RUN_ID_TAG = "lm.run_id"
PARAMS, METRICS = 100, 1000  # of a request, at most
PARAM_CHARS, TAG_CHARS = 6000, 5000  # what MLflow takes of a value
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowRun:
    """Metrics by step. The tag lm.run_id says which run it is to a process that resumes it."""

    def __init__(self, info: RunInfo, run_id: str) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Param, RunTag  # pyright: ignore[reportMissingImports]

        self._client = client = mlflow.MlflowClient()
        found = client.get_experiment_by_name(info.project)
        experiment = found.experiment_id if found else client.create_experiment(info.project)
        runs = client.search_runs([experiment], f"tags.`{RUN_ID_TAG}` = '{run_id}'")
        tags = {RUN_ID_TAG: run_id, **_tags(info)}
        if runs:
            self._id = runs[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = client.create_run(experiment, run_name=info.name, tags=tags).info.run_id
        # parameters of a run cannot change: tags say how they did
        data = client.get_run(self._id).data
        params = {key: str(value)[:PARAM_CHARS] for key, value in _flat(info.config)}
        tags |= {f"changed.{k}": v for k, v in params.items() if data.params.get(k, v) != v}
        new = [Param(key, value) for key, value in params.items() if key not in data.params]
        for start in range(0, len(new), PARAMS):
            client.log_batch(self._id, params=new[start : start + PARAMS])
        client.log_batch(self._id, tags=[RunTag(k, v[:TAG_CHARS]) for k, v in tags.items()])
        client.log_dict(self._id, dict(info.config), "config.json")
        self._last_steps = {m.key: m.step for m in data.to_proto().metrics}

    def last_steps(self) -> dict[str, int]:
        return self._last_steps | self._last_tables()

    def _last_tables(self, folder: str | None = None) -> dict[str, int]:
        found: dict[str, int] = {}
        for file in self._client.list_artifacts(self._id, folder):
            if file.is_dir:
                found |= self._last_tables(file.path)
            elif table := re.fullmatch(r"(.+)_(\d+)\.json", file.path):
                found[table[1]] = max(int(table[2]), found.get(table[1], -1))
        return found

    def log(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        metrics = [Metric(k, float(v), now, step) for step, row in rows for k, v in row.items()]
        for start in range(0, len(metrics), METRICS):
            self._client.log_batch(self._id, metrics[start : start + METRICS])

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        self._client.log_table(self._id, columns, f"{name}_{step}.json")

    def picture(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        self._client.log_image(self._id, Image.open(io.BytesIO(png)), f"{name}_{step}.png")

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._id, STATUS[status])

    @staticmethod
    def abandon() -> None:
        pass


def _tags(info: RunInfo) -> dict[str, str]:
    """Tags of the run, those that MLflow's pages show among them."""
    code = {f"code.{name}": str(value) for name, value in info.code.items()}
    tags = {"lm.workdir": info.workdir, **code, **dict.fromkeys(info.tags, "true")}
    if info.notes:
        tags["mlflow.note.content"] = info.notes
    if info.code.get("commit"):
        tags["mlflow.source.git.commit"] = info.code["commit"]
    return tags


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
