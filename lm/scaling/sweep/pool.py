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
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from lm.exit_codes import Exit, restarts
from lm.reliability.stop_signals import StopSignals
from lm.reliability.workdir_lock import LOCK_FILE
from lm.scaling import run_table
from lm.scaling.sweep.space import Point
from lm.storage.files import write_atomically

CODES = "codes"  # folder of exit codes, a file for each run, that a cluster's commands write
LOG_FILE, OUTCOME_FILE, SWEEP_LOCK_FILE = "log.txt", "outcome.json", "sweep.lock"
FINISHED, DIVERGED, FAILED, PRUNED = "finished", "diverged", "failed", "pruned"
STATUSES: dict[int, str] = {Exit.SUCCESS: FINISHED, Exit.DIVERGED: DIVERGED}  # else failed
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
    status = STATUSES.get(code, FAILED)
    return Outcome(status, code, "" if status == FINISHED else f"exit code {code}, on a cluster")


def record(root: Path, name: str, outcome: Outcome) -> None:
    text = json.dumps(dataclasses.asdict(outcome)) + "\n"
    write_atomically(root / name / OUTCOME_FILE, text)


def _start(root: Path, run: Trial, command: Sequence[str]) -> subprocess.Popen[bytes] | None:
    """Start the process of a run; None if another process has it."""
    folder = root / run.name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as lock:
        if not _try_lock(lock):  # started by hand
            return None
    with (folder / SWEEP_LOCK_FILE).open("w") as lock:
        if not _try_lock(lock):
            return None
        with (folder / LOG_FILE).open("ab") as log:
            return subprocess.Popen(
                [*command, *run.arguments, f"--workdir={folder}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],  # the lock lives as long as the process
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on
            )


def _try_lock(file: IO[str]) -> bool:
    """Take the lock of a file until it is closed; False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def last_error_line(path: Path) -> str:
    """The last line of a log with an error, else the last line."""
    with path.open("rb") as log:
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
    command: Sequence[str] = (sys.executable, "scripts/train.py"),
    grace: float = GRACE,
    say: Callable[[str], object] = print,
) -> signal.Signals | None:
    """Do all runs, `slots` at a time; return the signal that ended the sweep early.

    runs: in the order in which they start. ended: called for every run with an outcome, old or new.
    should_prune: polled; True for a run to stop. grace: seconds from SIGTERM to SIGKILL.
    """
    with StopSignals() as signals:

        def train(run: Trial) -> Iterator[bool]:
            """Train a run in processes, one after the other; yield True at each poll until the run
            has ended, or the process of a sweep that is stopped.
            """
            is_announced, tries = False, 0
            while True:
                while (process := _start(root, run, command)) is None:
                    if not is_announced:
                        say(f"{run.name}: runs already, started by another process; waiting for it")
                        is_announced = True
                    yield True
                    if signals.received:
                        return
                is_pruned, deadline = False, math.inf
                while (code := process.poll()) is None:
                    if time.monotonic() > deadline:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                    elif deadline == math.inf and (signals.received or should_prune(run)):
                        is_pruned = not signals.received
                        process.terminate()  # on which it saves
                        deadline = time.monotonic() + grace
                    yield True
                if signals.received:
                    return
                tries += 1
                code = 128 - code if code < 0 else code  # as a shell shows it
                if code == Exit.SUCCESS or is_pruned or not restarts(code) or tries > RETRIES:
                    break
                say(f"{run.name}: exit code {code}; started again")
            status = PRUNED if is_pruned and code else STATUSES.get(code, FAILED)
            failed = status in (DIVERGED, FAILED)
            message = last_error_line(root / run.name / LOG_FILE) if failed else ""
            outcome = Outcome(status, code, message)
            record(root, run.name, outcome)
            ended(run, outcome)

        active: list[Iterator[bool]] = []
        while True:
            while not signals.received and len(active) < slots:
                if (run := next(runs, None)) is None:
                    break
                if (outcome := read_outcome(root, run.name)) is not None:
                    ended(run, outcome)
                else:
                    active.append(train(run))
            if not active:
                return signals.received
            active = [training for training in active if next(training, False)]
            time.sleep(PAUSE)
