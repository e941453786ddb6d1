"""Deferred metrics: fetch the outputs of step n after dispatching step n + 1.

A host that waits for the loss of a step leaves its devices idle until it dispatches the next one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import jax
import numpy as np

from lm.types import StepInfo, Sums

Votes = jax.Array | np.ndarray | None  # see lm/parallel/consensus.py


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The outputs of a step, on the host."""

    step: int  # its number, from 0
    sums: dict[str, float]
    info: Mapping[str, np.ndarray]  # see lm/training/train_step.py
    votes: Votes
    seconds: float | None  # since the previous step; None after a pause and for the first step

    @property
    def bad(self) -> bool:
        return bool(self.info["bad"])


class DeferredMetrics:
    """Outputs of the last dispatched step, and the clock between steps."""

    def __init__(self) -> None:
        self._pending: tuple[int, Sums, StepInfo, Votes] | None = None
        self._clock: float | None = None
        self._paused = False

    def push(self, step: int, sums: Sums, info: StepInfo, votes: Votes = None) -> list[StepResult]:
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
            self._clock, self._paused = time.monotonic(), False

    def discard(self) -> None:
        """Forget the pending step."""
        self._pending = self._clock = None

    def _fetch(self) -> list[StepResult]:
        if self._pending is None:
            return []
        (step, *outputs), self._pending = self._pending, None
        sums, info, votes = jax.device_get(outputs)  # waits for the step
        now = time.monotonic()
        seconds = None if self._clock is None else now - self._clock
        self._clock = now
        host_sums = {name: float(value) for name, value in sums.items()}
        return [StepResult(step, host_sums, info, votes, seconds)]
