"""Threads that read chunks of checkpoints, in bounded memory."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
READERS = 8  # a bucket answers each request after a while
MAX_BYTES = 256 << 20  # of values that are read at once


def for_each(tasks: Iterator[T], work: Callable[[T], None], num_bytes: Callable[[T], int]) -> None:
    """Call `work` with all tasks in `READERS` threads, until the first error, which is raised.

    Tasks are taken one by one. num_bytes: what a task reads; those at work have `MAX_BYTES`
    together, and a larger one is by itself.
    """
    taking, failed = threading.Lock(), threading.Event()
    memory = _Budget(MAX_BYTES)

    def run() -> None:
        try:
            while True:
                with taking:
                    if failed.is_set() or (task := next(tasks, None)) is None:
                        return
                with memory.reserved(num_bytes(task)):
                    work(task)
        except BaseException:
            failed.set()
            raise

    with concurrent.futures.ThreadPoolExecutor(READERS, "read") as executor:
        running = [executor.submit(run) for _ in range(READERS)]
    for each in running:
        each.result()


class _Budget:
    """Memory that threads share; one that wants more than is free waits."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        size = min(size, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()
