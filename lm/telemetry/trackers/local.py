"""Trackers in the run's folder: files of records and TensorBoard's events."""

from __future__ import annotations

import html
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lm.storage.epaths import StoragePath
from lm.storage.growing import RewrittenFile
from lm.telemetry import jsonl, metrics
from lm.telemetry.trackers.tracker import Status, tables_by_name, values_by_name


class JsonLines:
    """The records of some kinds in a file of the run's folder: by default metrics.jsonl, of
    training and validation. Those of steps after `first_step` are dropped, and done again.

    Restarts, evaluations, `lm report`, `lm watch` and sweeps read these files, and so do trackers
    that lack records.
    """

    def __init__(
        self,
        workdir: str,
        first_step: int,
        file: str = metrics.METRICS_FILE,
        kinds: Sequence[str] = (metrics.TRAIN, metrics.EVAL),
    ) -> None:
        self._path, self._kinds = StoragePath(workdir) / file, kinds
        self._file = self._open(first_step)

    def _open(self, step: int) -> jsonl.Writer:
        kept = [record for record in jsonl.read(self._path) if record["step"] <= step]
        return jsonl.Writer(self._path, kept)

    def write(self, step: int, records: Sequence[jsonl.Record]) -> None:
        for record in records:
            if record["kind"] in self._kinds:
                self._file.append(record)

    def roll_back(self, step: int) -> None:
        self._file.close()
        self._file = self._open(step)

    def flush(self) -> None:
        self._file.flush()

    def close(self, status: Status) -> None:
        self._file.close()


class TensorBoard:
    """Scalars and tables as TensorBoard events; `tensorboard.summary.Writer` would import
    TensorFlow.

    TensorBoard itself drops the events of steps that come again.
    """

    def __init__(self, workdir: str) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        # Runs of one process within a second: in a bucket, one name would replace the other.
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._file = RewrittenFile(f"{workdir}/tensorboard/{name}")
        self._records = RecordWriter(self._file)

    def write(self, step: int, records: Sequence[jsonl.Record]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text import metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        event = event_pb2.Event(step=step, wall_time=time.time())  # pyright: ignore
        values = values_by_name(records).items()
        found: list[Any] = [{"tag": name, "simple_value": value} for name, value in values]
        for name, rows in tables_by_name(records).items():
            kind = metadata.create_summary_metadata(display_name="", description="")
            text = make_tensor_proto(_markdown(rows).encode())
            found.append({"tag": name, "metadata": kind, "tensor": text})
        event.summary.CopyFrom(summary_pb2.Summary(value=found))  # pyright: ignore
        self._records.write(event.SerializeToString())
        self._records.flush()

    def roll_back(self, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self, status: Status) -> None:
        self._file.close()


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of texts, which keep their lines."""
    names = list(rows[0])
    cells = [[html.escape(row[n]).replace("|", "&#124;") for n in names] for row in rows]
    lines = [names, ["---"] * len(names)]
    lines += [["<br>".join(text.splitlines()) for text in row] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
