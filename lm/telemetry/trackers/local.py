"""Trackers in the run's folder: metrics.jsonl and TensorBoard's events."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from lm.storage.epaths import StoragePath
from lm.storage.growing import RewrittenFile
from lm.telemetry import jsonl, metrics
from lm.telemetry.trackers.tracker import Status, values_by_name


class JsonLines:
    """metrics.jsonl without the records of steps after `first_step`, which are done again.

    Restarts, evaluations, `lm report`, `lm watch` and sweeps read this file, and so do trackers
    that lack records.
    """

    def __init__(self, workdir: str, first_step: int) -> None:
        self._workdir = workdir
        self._file = self._open(first_step)

    def _open(self, step: int) -> jsonl.Writer:
        kept = [record for record in metrics.read(self._workdir) if record["step"] <= step]
        return jsonl.Writer(StoragePath(self._workdir) / metrics.METRICS_FILE, kept)

    def write(self, step: int, records: Sequence[jsonl.Record]) -> None:
        for record in records:
            self._file.append(record)

    def roll_back(self, step: int) -> None:
        self._file.close()
        self._file = self._open(step)

    def flush(self) -> None:
        self._file.flush()

    def close(self, status: Status) -> None:
        self._file.close()


class TensorBoard:
    """Scalars as TensorBoard events; `tensorboard.summary.Writer` would import TensorFlow.

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

        event = event_pb2.Event(step=step, wall_time=time.time())  # pyright: ignore
        values = values_by_name(records).items()
        scalars = [{"tag": name, "simple_value": value} for name, value in values]
        event.summary.CopyFrom(summary_pb2.Summary(value=scalars))  # pyright: ignore
        self._records.write(event.SerializeToString())
        self._records.flush()

    def roll_back(self, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self, status: Status) -> None:
        self._file.close()
