"""What may happen to a run from outside: so far, being asked to stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT
EXIT_TERMINATED = 143  # 128 + SIGTERM


class StopSignals:
    """The first SIGINT or SIGTERM in this context sets `received`; a second one is fatal."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = signal.Signals(number)
        for each, old in self._old.items():
            signal.signal(each, old)

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 0 without a signal."""
        if self.received is None:
            return 0
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_TERMINATED
