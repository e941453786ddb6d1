"""Wall time of a process by phase: one clock for the watchdog and for goodput."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

PHASES = (
    "start",  # imports, config, data, self-check
    "compile",  # the train step
    "init",  # the first state
    "restore",  # reading a checkpoint
    "data",  # waiting for a batch
    "step",  # everything between batches
    "save",  # the part of a save that blocks
    "evaluate",
    "investigate",  # replays after a bad step
)


@dataclasses.dataclass(frozen=True)
class PhaseStart:
    """The innermost phase, and when (time.monotonic) it began or last showed progress."""

    phase: str
    since: float


class PhaseTimer:
    """Seconds of every phase of this process; phases nest, and time counts for the innermost."""

    def __init__(self, began: float | None = None) -> None:
        """began: time.monotonic() at which "start", the outermost phase, began.

        Time before this call counts, but the watchdog's budget for it starts now.
        """
        self.began = self._counted = time.monotonic() if began is None else began
        self._stack = ["start"]
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        # one attribute, so that the watchdog's thread sees both of its values change at once
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
        """Report progress inside the current phase: its budget starts again."""
        self.moment = PhaseStart(self._stack[-1], time.monotonic())

    def seconds(self) -> dict[str, float]:
        """Seconds spent in every phase up to now; they sum to the time since `began`."""
        self._count()
        return dict(self._seconds)

    def _count(self) -> None:
        now = time.monotonic()
        self._seconds[self._stack[-1]] += now - self._counted
        self._counted = now
