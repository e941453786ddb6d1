"""Batches of consecutive steps, prepared ahead of their use: by threads, or by tf.data."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from lm.config.schema import LoaderConfig
from lm.types import HostBatch

Make = Callable[[int], HostBatch]
Batches = Generator[tuple[int, HostBatch], None, None]


def run(make: Make, start: int, stop: int, loader: LoaderConfig) -> Batches:
    """(step, make(step)) of every step from `start`; an error of `make` is raised when its step is
    due.
    """
    kinds = {"tf.data": _tf_data, "thread": _threads}
    return kinds[loader.kind](make, start, stop, loader)


@contextlib.contextmanager
def importing(loader: LoaderConfig) -> Iterator[None]:
    """Import what the loader needs beside the body, such as a compilation, which leaves Python to
    others: TensorFlow takes seconds. What is missing is reported when the loader runs.
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


def _threads(make: Make, start: int, stop: int, loader: LoaderConfig) -> Batches:
    executor = ThreadPoolExecutor(loader.num_workers, thread_name_prefix="batch")
    pending: collections.deque[Future[HostBatch]] = collections.deque()
    try:
        submitted = start
        for step in range(start, stop):
            while submitted < min(stop, step + loader.prefetch + 1):
                pending.append(executor.submit(make, submitted))
                submitted += 1
            yield step, pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _tf_data(make: Make, start: int, stop: int, loader: LoaderConfig) -> Batches:
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
    return _run_tf_data(tf, make, start, stop, loader)


def _run_tf_data(tf: Any, make: Make, start: int, stop: int, loader: LoaderConfig) -> Batches:
    if start >= stop:
        return
    like = make(start)  # tf.data wants to know types and shapes before the first batch
    types = [array.dtype for array in leaves(like)]
    shapes = [array.shape for array in leaves(like)]

    def load(step: Any) -> Any:
        arrays = tf.numpy_function(lambda step: leaves(make(int(step))), [step], types)
        return [tf.ensure_shape(array, shape) for array, shape in zip(arrays, shapes, strict=True)]

    dataset = tf.data.Dataset.range(start, stop)
    dataset = dataset.map(load, num_parallel_calls=loader.num_workers, deterministic=True)
    batches = dataset.prefetch(loader.prefetch).as_numpy_iterator()
    for step in range(start, stop):
        try:
            arrays = next(batches)
        except tf.errors.OpError:
            make(step)  # pure: raises what it raised inside tf.data, as it was
            raise
        yield step, unflatten(like, iter(arrays))


def leaves(tree: Any) -> list[np.ndarray]:
    """The arrays of a batch in the order of its fields; fields that are None have none."""
    if tree is None or isinstance(tree, np.ndarray):
        return [] if tree is None else [tree]
    return [leaf for f in dataclasses.fields(tree) for leaf in leaves(getattr(tree, f.name))]


def unflatten(like: Any, arrays: Iterator[np.ndarray]) -> Any:
    """A batch of the structure of `like` from the arrays of `leaves`."""
    if like is None or isinstance(like, np.ndarray):
        return None if like is None else next(arrays)
    return type(like)(
        **{f.name: unflatten(getattr(like, f.name), arrays) for f in dataclasses.fields(like)}
    )
