"""Arrow files of a preparation: written whole or not at all, read batch by batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.storage import files as storage
from lm.storage.paths import is_url

if TYPE_CHECKING:
    import pyarrow as pa


def column(values: np.ndarray) -> pa.Array:
    """Return numbers as an Arrow array; `pa.array` would import pandas, which takes a second."""
    import pyarrow as pa

    kind, length = pa.from_numpy_dtype(values.dtype), len(values)
    if values.dtype == bool:
        values = np.packbits(values, bitorder="little")
    return pa.Array.from_buffers(kind, length, [None, pa.py_buffer(np.ascontiguousarray(values))])


def numbers(array: pa.Array) -> np.ndarray:
    """Return the integers of an Arrow array; its own `to_numpy` would import pandas."""
    dtype = np.dtype(str(array.type))
    content = array.buffers()[1]
    if not len(array) or content is None:
        return np.empty(0, dtype)
    return np.frombuffer(content, dtype)[array.offset : array.offset + len(array)]


def bytes_column(values: Sequence[bytes]) -> pa.Array:
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)


class ArrowWriter:
    """An Arrow file that appears whole after the block; the first batch gives its schema."""

    def __init__(self, path: str):
        self._writing, self._writer = storage.writing(path), None

    def __enter__(self) -> ArrowWriter:
        self._file = self._writing.__enter__()
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        import pyarrow as pa

        if self._writer is None:
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), batch.schema)
        self._writer.write_batch(batch)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._writer is not None and kind is None:
            self._writer.close()
        self._writing.__exit__(kind, error, trace)


class ArrowReader:
    """The reader of an Arrow file, of some columns alone where they are named."""

    def __init__(self, path: str, columns: Sequence[str] = ()):
        import pyarrow as pa

        opened = storage.open_file(path)
        self._file = opened.raw if is_url(path) else opened  # Arrow asks for what it needs
        options = None
        if columns:
            names = pa.ipc.open_file(self._file).schema.names
            options = pa.ipc.IpcReadOptions(included_fields=[names.index(c) for c in columns])
            self._file.seek(0, os.SEEK_SET)
        self._reader = pa.ipc.open_file(self._file, options=options)

    def __enter__(self) -> pa.ipc.RecordBatchFileReader:
        return self._reader

    def __exit__(self, *_: object) -> None:
        self._file.close()
