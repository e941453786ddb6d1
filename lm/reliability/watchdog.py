"""What watches over a run: a lock on its folder, signals from outside, and a thread that notices
when nothing moves.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import faulthandler
import fcntl
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from etils import epath

from lm.config.schema import GuardConfig
from lm.exit_codes import Exit, RunError
from lm.parallel import process_group
from lm.parallel.sharding import Rules
from lm.telemetry.phase_timer import PhaseTimer

STOPS = {signal.SIGINT: Exit.INTERRUPTED, signal.SIGTERM: Exit.TERMINATED}
LOCK_FILE = "lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what file systems without them say


class WorkdirLocked(RunError):
    """Another process trains in the run's folder."""


@contextlib.contextmanager
def lock_workdir(workdir: str, *, active: bool = True) -> Iterator[None]:
    """Keeps the run's folder for this process: two that train there at once would cut each other's
    metrics and checkpoints.

    The lock is the kernel's (flock): it ends with the process, however that ends. Object stores and
    some network file systems have none.

    Raises:
        WorkdirLocked: another process has it.
    """
    if not active or "://" in workdir:
        yield
        return
    path = Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise WorkdirLocked(
                f"{workdir}: {file.read() or 'another process'} trains there; wait until it ends, "
                "or give another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


class StopSignals:
    """The first SIGINT or SIGTERM in this context sets `received`; a second one ends the process
    at once.

    A thread reads the numbers, so that the second one works while the main thread waits for a
    device. Ending at once is safe: checkpoints appear by one rename.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def __enter__(self) -> StopSignals:
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOPS:
            self._old[number] = signal.signal(number, _ignore)  # the thread does the work
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # ends the thread

    def _read(self) -> None:
        while data := self._reader.recv(1):
            if data[0] not in list(STOPS):
                continue
            if self.received is not None:
                text = "second signal: ended without saving"
                print(f"\n{text}", file=sys.stderr, flush=True)
                os._exit(process_group.leave(STOPS[signal.Signals(data[0])], text))
            self.received = signal.Signals(data[0])


def _ignore(number: int, frame: FrameType | None) -> None:
    del number, frame


@dataclasses.dataclass(frozen=True)
class Vote:
    """What one process, or any of them, wants at the end of a step."""

    signal: signal.Signals | None = None  # saving and ending
    save: bool = False


class Consensus:
    """One small all-gather a step, by which every process learns the same about all of them.

    Each puts in its vote and the seconds in which it, not its devices, held up the step. With one
    process there is nothing to ask.
    """

    def __init__(self, rules: Rules) -> None:
        mesh = rules.mesh
        self._by_device = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        self._gather = jax.jit(lambda x: x, out_shardings=rules.sharding())
        self._owners = [device.process_index for device in mesh.devices.flat]

    def start(self, vote: Vote, seconds: float) -> Any:
        """Starts the vote; what it returns is for `result`."""
        mine = np.array([[float(vote.signal or 0), float(vote.save), seconds]], np.float32)
        if jax.process_count() == 1:
            return mine
        shape = (len(self._owners), mine.shape[1])
        return self._gather(jax.make_array_from_callback(shape, self._by_device, lambda _: mine))

    def collect(self, votes: Any) -> tuple[Vote, int, float]:
        """(what anybody wants, the slowest process, how much later it was than the fastest)."""
        number, save, seconds = np.asarray(votes).T
        vote = Vote(signal.Signals(int(number.max())) if number.any() else None, bool(save.any()))
        slowest = self._owners[int(seconds.argmax())] if len(seconds) > 1 else 0
        return vote, slowest, float(seconds.max() - seconds.min())


class Watchdog:
    """A thread that ends the process with `Exit.HUNG` when a phase is over its budget, after
    writing the stacks of all threads to WORKDIR/stacks.

    Every process has its own: one that is stuck leaves the others waiting for it in a collective,
    and theirs run out too.
    """

    def __init__(self, config: GuardConfig, phases: PhaseTimer, workdir: str) -> None:
        self._config, self._phases = config, phases
        self._folder = epath.Path(workdir) / "stacks"
        self._steps: collections.deque[float] = collections.deque(maxlen=101)
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._config.watchdog:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()

    def stepped(self, seconds: float) -> None:
        """Takes the time of a step into the running median."""
        self._steps.append(seconds)

    def budget(self, phase: str) -> float:
        """Seconds that a phase may go on without progress."""
        c = self._config
        if phase == "step":
            if len(self._steps) < 3:
                return c.compile_seconds
            return max(c.step_seconds, c.step_factor * statistics.median(self._steps))
        return {
            "compile": c.compile_seconds,
            "data": c.data_seconds,
            "save": c.save_seconds,
            "evaluate": c.evaluate_seconds,
            "investigate": c.compile_seconds,
        }.get(phase, c.start_seconds)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._shortest() / 4)):
            moment = self._phases.moment
            waited = time.monotonic() - moment.since
            # read twice: progress since then means that all is well
            if waited > self.budget(moment.phase) and self._phases.moment is moment:
                self._end(moment.phase, waited)

    def _shortest(self) -> float:
        c = self._config
        return min(c.step_seconds, c.data_seconds, c.save_seconds, c.evaluate_seconds)

    def _end(self, phase: str, waited: float) -> None:
        me = jax.process_index()
        path = self._folder / f"process-{me}.txt"
        text = (
            f"process {me}: no progress for {waited:.0f} s in phase {phase!r}, whose budget is "
            f"{self.budget(phase):.0f} s (config.guard); stacks in {path}"
        )
        print(f"\nhung: {text}", file=sys.stderr, flush=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(path, "w") as file:
                file.write(f"{text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            os._exit(process_group.leave(Exit.HUNG, text))
