"""Arrays of a checkpoint's files, opened and read in chunks on a host without devices."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from lm.checkpoint.manifest import Damaged, Leaf
from lm.checkpoint.step_files import Unreadable
from lm.storage.epaths import StoragePath
from lm.storage.paths import kvstore_spec

if TYPE_CHECKING:
    import tensorstore as ts

T_co = TypeVar("T_co", covariant=True)
Index = tuple[slice, ...]
INDEX_BYTES = 64 << 20  # of the files' indices that are kept in memory
_UNREADABLE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class StoredArrays:
    """The arrays of a step's folder, for one pass over files that do not change meanwhile.

    The index of Orbax's files is read once for all arrays, and small neighbours with one request.
    """

    def __init__(self, folder: StoragePath, leaves: Mapping[str, Leaf]) -> None:
        import tensorstore as ts

        self._folder, self._leaves = folder, leaves
        self._context = ts.Context({"cache_pool#index": {"total_bytes_limit": INDEX_BYTES}})

    def open(self, name: str) -> StoredArray:
        """The array of a leaf; Damaged where it can't be opened, or has another shape or dtype than
        the manifest says.
        """
        import tensorstore as ts

        item, path = name.split(".", 1)
        kvstore = {
            "driver": "ocdbt",
            "base": kvstore_spec(str(self._folder / item)),
            "path": f"{path}/",
            "cache_pool": "cache_pool#index",
            "experimental_read_coalescing_threshold_bytes": 1 << 20,
            "experimental_read_coalescing_merged_bytes": 8 << 20,
            "experimental_read_coalescing_interval": "5ms",
        }
        spec = {
            "driver": "zarr",
            "kvstore": kvstore,
            "recheck_cached_metadata": False,
            "recheck_cached_data": False,
        }
        array = result(ts.open(spec, open=True, read=True, context=self._context), name)
        stored, leaf = Leaf(tuple(array.shape), array.dtype.name), self._leaves[name]
        if str(stored) != str(leaf):
            raise Damaged(f"{name}: stored as {stored}, the manifest says {leaf}")
        return StoredArray(name, leaf, array)

    def read(self, name: str) -> np.ndarray:
        """All values of a leaf; raises as `open` and `result`."""
        return self.open(name).read()


class StoredArray:
    """An array in chunks, each of which is stored as one value; counted in C order."""

    def __init__(self, name: str, leaf: Leaf, array: ts.TensorStore) -> None:
        chunk = array.chunk_layout.read_chunk.shape or (0,) * len(leaf.shape)
        self.name, self.leaf, self._array = name, leaf, array
        self._chunk = tuple(c or n or 1 for c, n in zip(chunk, leaf.shape, strict=True))
        self._grid = tuple(-(-n // c) for n, c in zip(leaf.shape, self._chunk, strict=True))
        self.num_chunks = math.prod(self._grid)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the largest chunk."""
        sizes = map(min, self._chunk, self.leaf.shape)
        return math.prod(sizes) * self._array.dtype.numpy_dtype.itemsize

    def index(self, chunk: int) -> Index:
        """The chunk's indices in the array."""
        at = np.unravel_index(chunk, self._grid) if self._grid else ()
        corner = [int(i) * c for i, c in zip(at, self._chunk, strict=True)]
        bounds = zip(corner, self._chunk, self.leaf.shape, strict=True)
        return tuple(slice(a, min(a + c, n)) for a, c, n in bounds)

    def offset(self, chunk: int) -> int:
        """Bytes of the values in all chunks before this one."""
        before, thickness = 0, self._array.dtype.numpy_dtype.itemsize
        for dim, part in enumerate(self.index(chunk)):
            before += thickness * part.start * math.prod(self.leaf.shape[dim + 1 :])
            thickness *= part.stop - part.start
        return before

    def chunks_from(self, first_byte: int, end_byte: int) -> range:
        """The chunks whose `offset` is between two, found by arithmetic."""
        chunks = range(self.num_chunks)
        bounds = (first_byte, end_byte)
        return range(*(bisect.bisect_left(chunks, at, key=self.offset) for at in bounds))

    def start(self, index: Index | None = None) -> Future[np.ndarray]:
        """Start reading the values at `index`, or all."""
        return (self._array if index is None else self._array[index]).read()

    def read(self, index: Index | None = None) -> np.ndarray:
        """The values at `index`, or all; raises as `result`."""
        return np.asarray(result(self.start(index), self.name))


class Future(Protocol[T_co]):
    """A future of TensorStore."""

    def result(self) -> T_co: ...


def result(future: Future[T_co], name: str) -> T_co:
    """The result of a future of TensorStore.

    Raises:
        Unreadable: it may not be read, or its storage doesn't answer.
        Damaged: the file is damaged or missing: TensorStore raises a ValueError for either.
    """
    try:
        return future.result()
    except ValueError as error:
        if str(error).startswith(_UNREADABLE):
            raise Unreadable(f"{name}: {first_line(error)}") from None
        raise Damaged(f"{name}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """An error's message as one line of limited length: TensorStore appends all its settings."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = text.split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    return text if len(text) <= 400 else f"{text[:150]} … {text[-240:]}"
