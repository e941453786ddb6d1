"""Processes that share out calls, and a line that says how far they are."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

T = TypeVar("T")


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_in_processes(
    function: Callable[..., T], calls: Sequence[tuple], *, num_workers: int | None
) -> Iterator[tuple[int, T]]:
    """Yields (i, function(*calls[i])) as calls finish.

    num_workers: processes; all cores if None.

    One worker is this process. Raises what a call raises, and ValueError if a worker is killed.
    """
    num_workers = min(num_workers or num_cores(), len(calls))
    if num_workers <= 1:
        for i, call in enumerate(calls):
            yield i, function(*call)
        return
    executor = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_init_worker,
    )
    try:
        futures = {executor.submit(function, *call): i for i, call in enumerate(calls)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, perhaps for want of memory; run again, with fewer "
            "workers: "
            "finished parts are kept"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _init_worker() -> None:
    """One thread of work; Ctrl-C is for the parent, and the worker ends with it, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Progress:
    """A line on stderr: share, speed and time left; rewritten on a terminal, else every 10 s."""

    def __init__(self, size: int, *, done: int):
        self._size = size
        self._done = self._num_bytes = self._num_tokens = 0
        self._start = self._shown = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        if done:
            print(f"{done} parts were finished before", file=sys.stderr)

    def add(self, size: int, *, num_bytes: int, num_tokens: int) -> None:
        """Counts a finished part of `size` planned bytes."""
        self._done += size
        self._num_bytes += num_bytes
        self._num_tokens += num_tokens
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._is_terminal else 10):
            self._shown = now
            self._show(now)

    def close(self) -> None:
        """Shows the last line, if there was anything to do."""
        if self._done:
            self._show(time.monotonic())
            if self._is_terminal:
                print(file=sys.stderr)

    def _show(self, now: float) -> None:
        seconds = max(now - self._start, 1e-3)
        left = seconds * (self._size - self._done) / max(self._done, 1)
        line = (
            f"{100 * self._done / max(self._size, 1):3.0f}%  {self._num_bytes / 1e6:,.1f} MB  "
            f"{self._num_bytes / 1e6 / seconds:.1f} MB/s  {self._num_tokens / seconds:,.0f} "
            "tokens/s  "
            f"{left:.0f} s left"
        )
        print(line, end="\r" if self._is_terminal else "\n", file=sys.stderr, flush=True)
