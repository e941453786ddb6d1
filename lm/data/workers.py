"""Processes that share out calls."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

T = TypeVar("T")


def run_in_processes(
    function: Callable[..., T], calls: Sequence[tuple], *, num_workers: int | None
) -> Iterator[tuple[int, T]]:
    """Yield (i, function(*calls[i])) as calls finish.

    num_workers: processes; all cores if None. One worker is this process.
    Raises what a call raises, and ValueError if a worker is killed.
    """
    num_workers = min(num_workers or len(os.sched_getaffinity(0)), len(calls))
    if num_workers <= 1:
        for i, call in enumerate(calls):
            yield i, function(*call)
        return
    executor = ProcessPoolExecutor(
        num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_init_worker
    )
    try:
        futures = {executor.submit(function, *call): i for i, call in enumerate(calls)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, perhaps for want of memory; run again, with fewer "
            "workers: finished parts are kept"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


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
