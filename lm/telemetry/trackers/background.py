"""A tracker behind a network: a thread sends it the records, and a run never waits for it.

The tracker is asked what it has when its run is opened, and gets from the files of the run's folder
(metrics.jsonl, evaluations.jsonl, layers.jsonl) what it lacks: after a kill, whatever its client
still held; after an outage, what came up meanwhile. Steps that a restart or a rollback does again
are not sent again, since no tracker takes a step back: it keeps their first values.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

from lm.telemetry.jsonl import Record
from lm.telemetry.trackers.tracker import (
    RemoteRun,
    RunInfo,
    Status,
    by_step,
    read_records,
    tables_by_name,
    value_name,
    values_by_name,
)

QUEUE_ITEMS = 10_000
CATCH_UP_ROWS = 200  # of a request
CLOSE_SECONDS = 20.0  # for what the tracker has not taken when the run ends
PAUSES = (1.0, 60.0)  # seconds before it is tried again: the first, doubled up to the last


@dataclasses.dataclass(frozen=True)
class _Values:
    step: int
    values: Mapping[str, float]
    tables: Mapping[str, Sequence[Mapping[str, str]]]

    @classmethod
    def of(cls, step: int, records: Sequence[Record]) -> _Values:
        return cls(step, values_by_name(records), tables_by_name(records))


@dataclasses.dataclass(frozen=True)
class _Table:
    step: int
    name: str
    rows: Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class _Picture:
    step: int
    name: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class _End:
    status: Status


_Item = _Values | _Table | _Picture | _End


class Background:
    """The thread of one tracker, and its queue."""

    def __init__(
        self,
        name: str,
        kind: type[RemoteRun],
        info: RunInfo,
        run_id: str,
        warn: Callable[[str], object],
    ) -> None:
        self._name, self._kind, self._info, self._run_id = name, kind, info, run_id
        self._warn, self._has_warned = warn, False
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._newest = (-1, 0)  # the last step that was written, and its number of records
        self._behind = threading.Event()  # it lacks records that the queue does not have
        self._closing, self._stopped = threading.Event(), threading.Event()
        self._last_steps: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"tracker {name}")
        self._thread.start()

    # ---- the run's thread ----

    def write(self, step: int, records: Sequence[Record]) -> None:
        last, count = self._newest
        self._newest = (step, len(records) + (count if step == last else 0))
        if not self._put(_Values.of(step, records)):
            self._behind.set()

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        self._put(_Table(step, value_name(name), rows))

    def picture(self, step: int, name: str, png: bytes) -> None:
        self._put(_Picture(step, value_name(name), png))

    def roll_back(self, step: int) -> None:
        self._newest = (-1, 0)

    def flush(self) -> None:
        pass

    def close(self, status: Status, seconds: float | None = None) -> None:
        """Wait until it has all records or fails once more, for `seconds` at most, by default
        CLOSE_SECONDS.
        """
        self._queue.put(_End(status))
        self._closing.set()
        self._thread.join(CLOSE_SECONDS if seconds is None else seconds)
        self._stopped.set()
        if self._thread.is_alive():
            self._warn_once("has not taken all records")
            self._kind.abandon()

    def _put(self, item: _Item) -> bool:
        if self._queue.qsize() < QUEUE_ITEMS:
            self._queue.put(item)
            return True
        self._warn_once(f"does not take its records, {QUEUE_ITEMS} wait for it")
        return False

    # ---- the tracker's thread ----

    def _run(self) -> None:
        pause, longest = PAUSES
        item: _Item | None = None
        while not self._stopped.is_set():
            try:
                run = self._kind(self._info, self._run_id)
                self._last_steps = run.last_steps()
                self._behind.set()
                pause = PAUSES[0]
                while not isinstance(item, _End):
                    if self._behind.is_set():
                        self._catch_up(run)
                    if item is not None:
                        self._send(run, item)
                    item = self._queue.get()
                if self._behind.is_set():
                    self._catch_up(run)
                run.close(item.status)
                return
            except Exception as error:  # whatever a client raises: it must not end the run
                text = str(error).strip().partition("\n")[0]
                self._warn_once(f"fails and is tried again: {type(error).__name__}: {text}")
                if self._closing.is_set():
                    return
                self._closing.wait(pause)
                pause = min(2 * pause, longest)

    def _send(self, run: RemoteRun, item: _Item) -> None:
        match item:
            case _Values():
                self._log(run, [item])
            case _Table(step, name, rows):
                run.table(step, name, rows)
            case _Picture(step, name, png):
                run.picture(step, name, png)

    def _log(self, run: RemoteRun, rows: Iterable[_Values]) -> None:
        """Send the values and tables of rows that it lacks; no two rows are of one step."""
        known, new, tables = self._last_steps, [], []
        for row in rows:
            values = {k: v for k, v in row.values.items() if known.get(k, -1) < row.step}
            if values:
                new.append((row.step, values))
            lacking = {k: v for k, v in row.tables.items() if known.get(k, -1) < row.step}
            tables += [(row.step, name, table) for name, table in lacking.items()]
        if new:
            run.log(new)
        for step, values in new:
            known |= dict.fromkeys(values, step)
        for step, name, table in tables:
            run.table(step, name, table)
            known[name] = step

    def _catch_up(self, run: RemoteRun) -> None:
        """Send what the run's files have and the tracker lacks."""
        while not self._stopped.is_set():
            self._behind.clear()
            newest, found = self._newest, by_step(read_records(self._info.workdir))
            steps = dict(sorted(found.items()))
            rows = [_Values.of(step, records) for step, records in steps.items()]
            for start in range(0, len(rows), CATCH_UP_ROWS):
                self._log(run, rows[start : start + CATCH_UP_ROWS])
            last = max(steps, default=-1)
            if (last, len(steps.get(last, ()))) >= newest and not self._behind.is_set():
                return
            self._stopped.wait(1.0)  # a bucket gets its records after some seconds

    def _warn_once(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(
                f"config.log.trackers: {self._name} {text}. Training goes on. What it lacks is in "
                "the run's folder, and is sent when it answers or when the same command runs again"
            )
