"""Deferred metrics: fetch the outputs of step n after dispatching step n + 1.

A host that waits for the loss of a step leaves its devices idle until it dispatches the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from lm.telemetry.scalars import Scalars

Votes = jax.Array | np.ndarray | None  # see lm/parallel/consensus.py


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The outputs of a step, on the host."""

    step: int  # its number, from 0
    sums: dict[str, float]
    info: Mapping[str, np.ndarray]  # see lm/training/train_step.py
    votes: Votes = None
    seconds: float | None = None  # since the previous step; None after a pause and for the first
    host_seconds: float | None = None  # of those, the main thread's outside of `waiting`
    host_cpu_seconds: float | None = None  # the time in which it had a core

    @property
    def bad(self) -> bool:
        return bool(self.info["bad"])

    @property
    def grad_norm(self) -> float:
        return float(self.info["grad_norm"])

    @property
    def loss(self) -> float:
        """The mean per token."""
        return self.sums["loss"] / max(self.sums["tokens"], 1.0)


def fetch(step: int, sums: Scalars, info: Scalars, votes: Votes = None) -> StepResult:
    """Wait for step number `step` and return its outputs."""
    host_sums, host_info, votes = jax.device_get((sums, info, votes))
    return StepResult(step, {name: float(x) for name, x in host_sums.items()}, host_info, votes)


class DeferredMetrics:
    """Outputs of the last dispatched step, and the clock of the main thread between steps."""

    def __init__(self) -> None:
        self._pending: tuple[int, Scalars, Scalars, Votes] | None = None
        self._clock: tuple[float, float] | None = None  # time.monotonic(), time.thread_time()
        self._waited = 0.0
        self._paused = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the main thread waits for data or a device."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def push(
        self, step: int, sums: Scalars, info: Scalars, votes: Votes = None
    ) -> list[StepResult]:
        """Store the outputs of step number `step` and return those of the step before, if any."""
        results = self._fetch()
        self._pending = (step, sums, info, votes)
        return results

    def flush(self) -> list[StepResult]:
        """Wait for the last step and return it; stop the clock until `resume`."""
        results = self._fetch()
        self._clock, self._paused = None, True
        return results

    def resume(self) -> None:
        """Restart the clock after `flush`."""
        if self._paused:
            self._start_clock()
            self._paused = False

    def discard(self) -> None:
        """Forget the pending step."""
        self._pending = self._clock = None

    def _fetch(self) -> list[StepResult]:
        if self._pending is None:
            return []
        pending, self._pending = self._pending, None
        with self.waiting():
            result = fetch(*pending)
        before, waited = self._clock, self._waited
        wall, cpu = self._start_clock()
        if before is None:
            return [result]
        seconds, cpu = wall - before[0], cpu - before[1]
        times = {"seconds": seconds, "host_seconds": seconds - waited, "host_cpu_seconds": cpu}
        return [dataclasses.replace(result, **times)]

    def _start_clock(self) -> tuple[float, float]:
        self._clock, self._waited = (time.monotonic(), time.thread_time()), 0.0
        return self._clock
