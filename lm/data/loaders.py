"""Iterators over the batches of consecutive steps, prepared ahead by threads or by tf.data."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from lm.config.schema import LoaderConfig

T = TypeVar("T")  # a batch, on the host or on devices
Make = Callable[[int], T]
Batches = Generator[tuple[int, T], None, None]


def run(make: Make[T], start: int, stop: int, loader: LoaderConfig) -> Batches[T]:
    """Yield (step, make(step)) of every step; an error of `make` is raised when its step is due."""
    kinds = {"tf.data": _tf_data, "thread": _threads}
    return kinds[loader.kind](make, start, stop, loader)


@contextlib.contextmanager
def importing(loader: LoaderConfig) -> Iterator[None]:
    """Import TensorFlow, if the loader needs it, in a thread beside the body (a compilation, say,
    which releases Python's lock); a missing module is reported when the loader runs.
    """
    if loader.kind != "tf.data":
        yield
        return

    def load() -> None:
        with contextlib.suppress(ImportError):
            import tensorflow as _  # noqa: F401

    thread = threading.Thread(target=load, name="import tensorflow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()  # before others import modules that this import is in the middle of


def _threads(make: Make[T], start: int, stop: int, loader: LoaderConfig) -> Batches[T]:
    executor = ThreadPoolExecutor(loader.num_workers, thread_name_prefix="batch")
    pending: collections.deque[Future[T]] = collections.deque()
    try:
        submitted = start
        for step in range(start, stop):
            while submitted < min(stop, step + loader.prefetch + 1):
                pending.append(executor.submit(make, submitted))
                submitted += 1
            yield step, pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _tf_data(make: Make[T], start: int, stop: int, loader: LoaderConfig) -> Batches[T]:
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        raise ValueError(
            "loader.kind=tf.data needs TensorFlow, which is not installed: install tensorflow-cpu, "
            "or set loader.kind=thread (the batches are the same)"
        ) from None
    tf.config.set_visible_devices([], "GPU")  # or TensorFlow takes the memory that JAX needs
    ready: dict[int, T] = {}  # tf.data schedules the work; arrays need no copy to tensors

    def load(step: np.ndarray) -> np.ndarray:
        ready[int(step)] = make(int(step))
        return step

    steps = tf.data.Dataset.range(start, stop).map(
        lambda step: tf.numpy_function(load, [step], tf.int64),
        num_parallel_calls=loader.num_workers,
        deterministic=True,
    )
    finished = steps.prefetch(loader.prefetch).as_numpy_iterator()
    for step in range(start, stop):
        try:
            next(finished)
        except tf.errors.OpError:
            make(step)  # pure: raises what it raised inside tf.data, as it was
            raise
        yield step, ready.pop(step)
