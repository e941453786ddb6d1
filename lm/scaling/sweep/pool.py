"""Runs as processes of this machine, a few at a time, each done once whatever is killed.

    ROOT/NAME/              the folder of a run, as scripts/train.py makes it, and in it
              log.txt       its output
              outcome.json  how it ended; not there while it may go on
              sweep.lock    held by the process of the run for as long as it lives

A killed sweep leaves its runs alive. The next one waits for them at their locks, so that no run is
ever done by two processes; and since a run resumes from its last checkpoint, none is lost. The lock
is not that of scripts/train.py (lm/reliability/workdir_lock.py), which the process takes once
it has started: until then this one keeps others away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from lm import storage
from lm.exit_codes import Exit, restarts
from lm.reliability.stop_signals import StopSignals
from lm.reliability.workdir_lock import LOCK_FILE
from lm.scaling import run_table
from lm.scaling.sweep.space import Point

CODES = "codes"  # folder of exit codes, a file for each run, that a cluster's commands write
OUTCOME_FILE, SWEEP_LOCK_FILE = "outcome.json", "sweep.lock"
FINISHED, DIVERGED, FAILED, PRUNED = "finished", "diverged", "failed", "pruned"
RETRIES = 2  # after exit codes that ask for it
PAUSE = 0.2  # seconds between polls of the processes
GRACE = 300.0  # seconds from SIGTERM to SIGKILL: a save may take as long


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep: its point in the space, and the flags of scripts/train.py for it."""

    name: str
    point: Point
    arguments: list[str]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a run; message: its last error line, where it was no success."""

    status: str
    code: int
    message: str = ""


def read_outcome(root: Path, name: str, runs: str = "") -> Outcome | None:
    """Outcome of a run, None if it has not ended: as this machine or a cluster has recorded it (see
    cluster.py), or as its folder shows.

    runs: folder or URL of the runs' folders; `root` if empty.
    """
    found: list[Outcome | None] = []
    if (path := root / name / OUTCOME_FILE).exists():
        found.append(Outcome(**json.loads(path.read_text())))
    if (path := root / CODES / name).exists() and (text := path.read_text().strip()):
        found.append(_cluster_outcome(int(text)))
    if not found and run_table.is_finished(os.path.join(runs or root, name)):
        found.append(Outcome(FINISHED, Exit.SUCCESS))
    ended = [outcome for outcome in found if outcome is not None]
    return min(ended, key=lambda outcome: outcome.status != FINISHED, default=None)


def _cluster_outcome(code: int) -> Outcome | None:
    """Outcome of a run whose last process ended with `code`; None if it may go on."""
    if restarts(code) or code == Exit.INTERRUPTED:
        return None
    statuses: dict[int, str] = {Exit.SUCCESS: FINISHED, Exit.DIVERGED: DIVERGED}
    status = statuses.get(code, FAILED)
    return Outcome(status, code, "" if status == FINISHED else f"exit code {code}, on a cluster")


def record(root: Path, name: str, outcome: Outcome) -> None:
    text = json.dumps(dataclasses.asdict(outcome)) + "\n"
    storage.write_atomically(root / name / OUTCOME_FILE, text)


class _Active:
    """A run in a slot: waiting for its lock, or with a process."""

    def __init__(self, root: Path, run: Trial) -> None:
        self.run, self.folder = run, root / run.name
        self.process: subprocess.Popen[bytes] | None = None
        self.tries, self.is_pruned, self.is_announced = 0, False, False
        self.terminated_at: float | None = None  # when SIGTERM was sent
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, command: list[str]) -> bool:
        """Start the process; False if another one has the run."""
        with (self.folder / SWEEP_LOCK_FILE).open("w") as lock:
            if not _try_lock(lock) or not self._is_free():
                return False
            with (self.folder / "log.txt").open("ab") as log:
                self.process = subprocess.Popen(
                    [*command, *self.run.arguments, f"--workdir={self.folder}"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[lock.fileno()],  # the lock lives as long as the process
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on
                )
        self.tries += 1
        return True

    def _is_free(self) -> bool:
        """False if a run that was started by hand trains in the folder."""
        with (self.folder / LOCK_FILE).open("a") as lock:
            return _try_lock(lock)

    @property
    def code(self) -> int | None:
        """The exit code as a shell shows it; None while there is no process or it lives."""
        code = self.process.poll() if self.process is not None else None
        return 128 - code if code is not None and code < 0 else code

    def terminate(self) -> None:
        """Send SIGTERM, on which the process saves and ends."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.terminated_at = time.monotonic()

    def kill_if_overdue(self, grace: float) -> None:
        """Kill a process that got SIGTERM `grace` seconds ago, with all that it has started."""
        overdue = self.terminated_at is not None and time.monotonic() > self.terminated_at + grace
        if overdue and self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def outcome(self, code: int) -> Outcome | None:
        """The end of the run; None if it is to be started again."""
        if code == Exit.SUCCESS:
            return Outcome(FINISHED, code)
        if self.is_pruned:
            return Outcome(PRUNED, code)
        if restarts(code) and self.tries <= RETRIES:
            return None
        status = DIVERGED if code == Exit.DIVERGED else FAILED
        with (self.folder / "log.txt").open("rb") as log:
            return Outcome(status, code, last_error_line(log))

    def poll(
        self,
        command: list[str],
        should_prune: Callable[[Trial], bool],
        say: Callable[[str], object],
    ) -> Outcome | None:
        """Start the run, or look after its process; its outcome once it has ended."""
        if self.process is None:
            if not self.start(command) and not self.is_announced:
                say(f"{self.run.name}: runs already, started by another process; waiting for it")
                self.is_announced = True
            return None
        if (code := self.code) is None:
            if not self.is_pruned and should_prune(self.run):
                self.is_pruned = True
                self.terminate()
            return None
        if (outcome := self.outcome(code)) is None:
            say(f"{self.run.name}: exit code {code}; started again")
            self.process = None
        return outcome


def _try_lock(file: IO[str]) -> bool:
    """Take the lock of a file until it is closed; False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def last_error_line(log: IO[bytes]) -> str:
    """The last line with an error, else the last line."""
    log.seek(max(0, os.fstat(log.fileno()).st_size - 20_000))
    lines = [x for x in log.read().decode(errors="replace").splitlines() if x.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


def run_all(
    root: Path,
    runs: Iterator[Trial],
    *,
    slots: int,
    ended: Callable[[Trial, Outcome], object] = lambda run, outcome: None,
    should_prune: Callable[[Trial], bool] = lambda run: False,
    command: list[str] | None = None,
    grace: float = GRACE,
    say: Callable[[str], object] = print,
) -> signal.Signals | None:
    """Do all runs, `slots` at a time; return the signal that ended the sweep early.

    runs: in the order in which they start. ended: called for every run with an outcome, old or new.
    should_prune: polled; True for a run to stop. grace: seconds from SIGTERM to SIGKILL.
    """
    command = command or [sys.executable, "scripts/train.py"]
    active: list[_Active] = []
    with StopSignals() as signals:
        while not signals.received:
            while len(active) < slots and (run := next(runs, None)) is not None:
                if (outcome := read_outcome(root, run.name)) is not None:
                    ended(run, outcome)
                else:
                    active.append(_Active(root, run))
            if not active:
                break
            for one in list(active):
                one.kill_if_overdue(grace)
                if (outcome := one.poll(command, should_prune, say)) is not None:
                    record(root, one.run.name, outcome)
                    active.remove(one)
                    ended(one.run, outcome)
            time.sleep(PAUSE)
        for one in active:
            one.terminate()
        while any(one.process is not None and one.code is None for one in active):
            for one in active:
                one.kill_if_overdue(grace)
            time.sleep(PAUSE)
    return signals.received
