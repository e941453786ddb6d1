"""Iterators over the batches of consecutive steps, prepared ahead by threads or by tf.data."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from lm.config.schema import LoaderConfig
from lm.types import HostBatch, HostTokens

Leaf = HostBatch | HostTokens | np.ndarray | None
T = TypeVar("T", bound=HostBatch | HostTokens)
Make = Callable[[int], HostBatch]
Batches = Generator[tuple[int, HostBatch], None, None]


def run(make: Make, start: int, stop: int, loader: LoaderConfig) -> Batches:
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

    def run_ahead() -> Batches:
        if start >= stop:
            return
        like = make(start)  # tf.data wants to know types and shapes before the first batch
        types = [array.dtype for array in leaves(like)]
        shapes = [array.shape for array in leaves(like)]

        def load(step: tf.Tensor) -> list[tf.Tensor]:
            arrays = tf.numpy_function(lambda step: leaves(make(int(step))), [step], types)
            return [
                tf.ensure_shape(array, shape) for array, shape in zip(arrays, shapes, strict=True)
            ]

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

    return run_ahead()


def leaves(tree: Leaf) -> list[np.ndarray]:
    """Return the arrays of a batch in the order of its fields, without those that are None."""
    if tree is None or isinstance(tree, np.ndarray):
        return [] if tree is None else [tree]
    return [leaf for f in dataclasses.fields(tree) for leaf in leaves(getattr(tree, f.name))]


def unflatten(like: T, arrays: Iterator[np.ndarray]) -> T:
    """Return a batch of the structure of `like` from the arrays of `leaves`."""

    def value(old: Leaf) -> Leaf:
        if old is None or isinstance(old, np.ndarray):
            return None if old is None else next(arrays)
        return unflatten(old, arrays)

    new = {f.name: value(getattr(like, f.name)) for f in dataclasses.fields(like)}
    return dataclasses.replace(like, **new)
