"""Watchdog: a thread that ends a process in which a phase makes no progress."""

from __future__ import annotations

import collections
import faulthandler
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import jax

from lm.config.schema import GuardConfig
from lm.exit_codes import Exit
from lm.parallel import process_group
from lm.storage.files import write_atomically
from lm.telemetry.phase_timer import PhaseTimer


class Watchdog:
    """A context that ends the process with `Exit.HUNG` when a phase exceeds its budget.

    The stacks of all threads are written to WORKDIR/stacks first. Every process has its own
    watchdog: the others wait for a stuck one in a collective, and their budgets run out too.
    """

    def __init__(self, config: GuardConfig, phases: PhaseTimer, workdir: str) -> None:
        self._config, self._phases = config, phases
        self._folder = f"{workdir}/stacks"
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=101)
        self._stop = threading.Event()
        self.on_end: Callable[[str], object] = lambda text: None  # called with what is known

    def __enter__(self) -> Watchdog:
        if self._config.watchdog:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def add_step(self, seconds: float) -> None:
        """Add the time of a step to the running median."""
        self._step_seconds.append(seconds)

    def budget(self, phase: str) -> float:
        """Seconds that a phase may take without progress."""
        c = self._config
        if phase == "step" and len(self._step_seconds) >= 3:
            return max(c.step_seconds, c.step_factor * statistics.median(self._step_seconds))
        if phase in ("step", "investigate"):  # the first steps may still compile
            phase = "compile"
        return getattr(c, f"{phase}_seconds", c.start_seconds)

    def _watch(self) -> None:
        c = self._config
        shortest = min(c.step_seconds, c.data_seconds, c.save_seconds, c.evaluate_seconds)
        while not self._stop.wait(min(1.0, shortest / 4)):
            start = self._phases.moment
            waited = time.monotonic() - start.since
            # read twice: no budget is exceeded if there was progress in between
            if waited > self.budget(start.phase) and self._phases.moment is start:
                self._end(start.phase, waited)

    def _end(self, phase: str, waited: float) -> None:
        process = jax.process_index()
        path = f"{self._folder}/process-{process}.txt"
        text = (
            f"process {process}: no progress for {waited:.0f} s in phase {phase!r}, whose budget "
            f"is {self.budget(phase):.0f} s (config.guard); stacks in {path}"
        )
        print(f"\nhung: {text}", file=sys.stderr, flush=True)
        try:
            with tempfile.TemporaryFile() as file:  # faulthandler wants a file descriptor
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                write_atomically(path, f"{text}\n\n".encode() + file.read())
            self.on_end(text)
        finally:
            os._exit(process_group.leave(Exit.HUNG, text))
