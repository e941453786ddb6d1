"""What a run is doing now and what its time went to, in phases: one clock for the watchdog and for
goodput.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

# start: imports, config, data, self-check    init: the first state    compile: the train step
# restore: reading a checkpoint    data: waiting for a batch    step: everything between batches
# save: what a save blocks    evaluate    investigate: replays after a bad step
PHASES = (
    "start",
    "compile",
    "init",
    "restore",
    "data",
    "step",
    "save",
    "evaluate",
    "investigate",
)


@dataclasses.dataclass(frozen=True)
class PhaseStart:
    """The innermost phase, and when (time.monotonic) it began or last showed progress."""

    phase: str
    since: float


class PhaseTimer:
    """Seconds of every phase of this process; phases nest, and time counts for the innermost."""

    def __init__(self, began: float | None = None) -> None:
        """began: time.monotonic() at which "start", the phase outside of all others, began.

        What was before this call counts, but nobody watched over it: that budget starts now.
        """
        self.began = self._counted = time.monotonic() if began is None else began
        self._stack = ["start"]
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        # one attribute, so other threads see it whole
        self.moment = PhaseStart("start", time.monotonic())

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase not in self._seconds:
            raise KeyError(f"{phase!r} is no phase; there are {', '.join(PHASES)}")
        self._count()
        self._stack.append(phase)
        self.heartbeat()
        try:
            yield
        finally:
            self._count()
            self._stack.pop()
            self.heartbeat()

    def heartbeat(self) -> None:
        """Progress inside the current phase: its budget starts again."""
        self.moment = PhaseStart(self._stack[-1], time.monotonic())

    def seconds(self) -> dict[str, float]:
        """Seconds spent in every phase up to now; they sum to the time since `began`."""
        self._count()
        return dict(self._seconds)

    def _count(self) -> None:
        now = time.monotonic()
        self._seconds[self._stack[-1]] += now - self._counted
        self._counted = now
