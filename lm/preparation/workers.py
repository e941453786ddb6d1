"""Processes that share out calls."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """A pool of processes, started when there is more than one call.

    num_workers: processes; all cores if None. One worker is this process.
    """

    def __init__(self, num_workers: int | None = None):
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        self._executor: ProcessPoolExecutor | None = None
        self._processes: set[multiprocessing.process.BaseProcess] = set()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:  # a call may take minutes
            for process in self._processes:
                process.terminate()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def run(self, function: Callable[[int], T], calls: Sequence[int]) -> Iterator[tuple[int, T]]:
        """Yield (i, function(i)) of every i in `calls` as they finish; a process that is free takes
        the next one.

        Raises what a call raises, and ValueError if a worker is killed. At Ctrl-C the context ends,
        and with it the calls that workers are in.
        """
        if self.num_workers <= 1 or len(calls) <= 1:
            for i in calls:
                yield i, function(i)
            return
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self.num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_init_worker,
            )
        try:
            # processes start in `submit`, and inherit the mask: Ctrl-C is the parent's alone
            others = {*multiprocessing.active_children()} - self._processes
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = {self._executor.submit(function, i): i for i in calls}
                self._processes = {*multiprocessing.active_children()} - others
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed, perhaps for want of memory; run again, with fewer "
                "workers: what is finished is kept"
            ) from error


def _init_worker() -> None:
    """Use one thread, leave Ctrl-C to the parent, and exit with it, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
