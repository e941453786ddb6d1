"""Norms of stored arrays and of their differences, chunk by chunk."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lm.checkpoint.arrays import Index, StoredArray, StoredArrays
from lm.checkpoint.chunk_readers import for_each
from lm.checkpoint.manifest import Leaf
from lm.storage.epaths import StoragePath

BLOCK = 1 << 16  # values that are float64 at a time
Task = tuple[Sequence[StoredArray], Index]  # the arrays to read at an index


@dataclasses.dataclass
class Distance:
    """Sums over two arrays, a and b."""

    largest: float = 0.0  # of |a - b|
    squares: float = 0.0  # of a - b
    squares_of_a: float = 0.0

    @property
    def norm_of_a(self) -> float:
        return float(np.sqrt(self.squares_of_a))

    @property
    def relative(self) -> float:
        """The norm of the difference over that of a; inf or nan where that is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.sqrt(np.float64(self.squares) / np.float64(self.squares_of_a)))

    def add(self, other: Distance) -> None:
        self.largest = float(np.maximum(self.largest, other.largest))
        self.squares += other.squares
        self.squares_of_a += other.squares_of_a


def _distance(a: np.ndarray, b: np.ndarray | None) -> Distance:
    """The distance between two arrays, or between one and zero."""
    total = Distance()
    for start in range(0, a.size, BLOCK):
        end = start + BLOCK
        x = a.reshape(-1)[start:end].astype(np.float64)
        difference = x
        if b is not None:
            with np.errstate(invalid="ignore"):
                difference = x - b.reshape(-1)[start:end].astype(np.float64)
        squares, squares_of_a = np.vdot(difference, difference), np.vdot(x, x)
        largest = float(np.abs(difference).max())
        total.add(Distance(largest, float(squares), float(squares_of_a)))
    return total


def distances(folders: Sequence[StoragePath], leaves: Mapping[str, Leaf]) -> dict[str, Distance]:
    """The distance between the arrays of each leaf in two steps' files, or in one's and zero.

    Memory: that of `for_each`. Raises as `StoredArrays.open` and `arrays.result`.
    """
    stored = [StoredArrays(folder, leaves) for folder in folders]
    found = {name: Distance() for name in leaves}
    adding = threading.Lock()

    def tasks() -> Iterator[Task]:
        for name in leaves:
            arrays = [s.open(name) for s in stored]
            largest = max(arrays, key=lambda array: array.chunk_bytes)  # each chunk is read once
            for chunk in range(largest.num_chunks):
                yield arrays, largest.index(chunk)

    def add(task: Task) -> None:
        arrays, index = task
        values = [array.read(index) for array in arrays]
        distance = _distance(values[0], values[1] if len(values) > 1 else None)
        with adding:
            found[arrays[0].name].add(distance)

    for_each(tasks(), add, lambda task: sum(array.chunk_bytes for array in task[0]))
    return found
