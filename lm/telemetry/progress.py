"""A progress line on the terminal, and the short forms of durations and quantities in it.

Neither tqdm nor rich draws this one: tqdm writes a carriage return for each update into a log file
too, and rich writes nothing at all there.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import TextIO

SEPARATOR = " · "  # between the parts of a progress line


class Progress:
    """One line, redrawn in place on a terminal; elsewhere a line every `pause` seconds at most."""

    def __init__(self, stream: TextIO = sys.stderr, pause: float = 10.0) -> None:
        self._stream, self._pause, self._last_shown = stream, pause, -math.inf
        self.is_terminal = stream.isatty()

    def show(self, text: str, *, keep: bool = False, final: bool = False) -> None:
        """Draw the line.

        keep: a terminal keeps it, and the next one is drawn below it. final: as `keep`, and written
        elsewhere without waiting for `pause`.
        """
        now = time.monotonic()
        if self.is_terminal:
            line = _truncate(text, shutil.get_terminal_size().columns - 1)
            self._write("\r\x1b[K" + line + ("\n" if keep or final else ""))
        elif final or now - self._last_shown >= self._pause:
            self._write(text + "\n")
        else:
            return
        self._last_shown = now

    def clear(self) -> None:
        """Erase the line from the terminal."""
        if self.is_terminal:
            self._write("\r\x1b[K")

    def note(self, text: str) -> None:
        """Write a permanent line above the progress line."""
        self._write(("\r\x1b[K" if self.is_terminal else "") + text + "\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _truncate(text: str, width: int) -> str:
    """As many leading parts of a line as fit into `width` characters."""
    while len(text) > width and SEPARATOR in text:
        text = text.rpartition(SEPARATOR)[0]
    return text[:width]


def format_duration(seconds: float) -> str:
    """Seconds as 1h02m, 3m20s or 12s, and nan as `?`."""
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_quantity(value: float) -> str:
    """1234567 -> 1.23M."""
    value = float(f"{value:.3g}")  # 999,999 is 1M
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"
