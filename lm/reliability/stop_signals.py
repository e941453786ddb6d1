"""SIGINT and SIGTERM: the first one asks a run to save and end, a second one ends it at once.

`timeout` and schedulers signal a process and then its group: SIGTERM within `SAME` seconds of the
first one is no second one.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

from lm.exit_codes import Exit
from lm.parallel import process_group

SAME = 3.0
STOPS = {signal.SIGINT: Exit.INTERRUPTED, signal.SIGTERM: Exit.TERMINATED}


class StopSignals:
    """A context in which the first stop signal sets `received` and a second one ends the process.

    A thread reads the signals' numbers, so that the second one works while the main thread waits
    for a device. Ending at once is safe: checkpoints appear by one rename.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0  # time.monotonic()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def __enter__(self) -> StopSignals:
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # a handler must be set for the wakeup descriptor to be written; the thread does the work
        self._previous = {number: signal.signal(number, lambda *_: None) for number in STOPS}
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()  # ends the thread

    def _read(self) -> None:
        while data := self._reader.recv(1):
            if data[0] not in list(STOPS):
                continue
            again = self.received == data[0] == signal.SIGTERM
            if again and time.monotonic() < self._received_at + SAME:
                continue
            if self.received is not None:
                text = "second signal: ended without saving"
                print(f"\n{text}", file=sys.stderr, flush=True)
                os._exit(process_group.leave(STOPS[signal.Signals(data[0])], text))
            self._received_at = time.monotonic()
            self.received = signal.Signals(data[0])
