"""Files of a token store, opened when they are first read: mapped from a disk, ranges of a URL."""

from __future__ import annotations

import collections
import functools
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar, overload

import numpy as np

from lm.storage.files import check_bucket
from lm.storage.paths import is_url, kvstore_spec

MANIFEST = "manifest.json"
BLOCK = 1024  # integers that are read from a URL together
_MAX_BLOCKS = 1 << 13  # kept of the URLs of a store: 64 MB
_MAX_MAPPED = 256  # files of all stores: the system allows some 1,000 open ones
_HASHED = 1 << 23  # bytes read at once
_INCOMPLETE = (
    f"not a complete token store (no {MANIFEST}); run scripts/prepare_data.py, again if it was "
    "interrupted"
)
S = TypeVar("S")
T = TypeVar("T")


class Array(Protocol):
    """Numbers in a file, of which some are read: a mapped `np.ndarray` is one."""

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: slice, /) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: np.ndarray, /) -> np.ndarray: ...
    def __getitem__(self, index: slice | np.ndarray, /) -> np.ndarray: ...


class StoreFiles(Protocol):
    """The files of a folder, by name; sizes are checked when a file is first opened."""

    def absence(self) -> str:
        """Return why there is no manifest."""
        ...

    def read(self, name: str) -> bytes | None:
        """Return a whole file, None if there is none."""
        ...

    def array(self, name: str, dtype: str, size: int) -> Array:
        """Return the content of a file of `size` bytes.

        Raises:
            ValueError: it is missing or has another size.
        """
        ...

    def ranges(
        self, names: Sequence[str], dtype: str, sizes: Mapping[str, int], limits: np.ndarray
    ) -> list[np.ndarray]:
        """Return a range of numbers from each file; limits: int64 [n, 2]."""
        ...

    def sha256(self, name: str, size: int) -> str:
        """Return the hash of a file, which is read in blocks."""
        ...

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """Return the function's results, side by side where they wait for a network."""
        ...


def open_files(path: str) -> StoreFiles:
    return _RemoteFiles(path) if is_url(path) else _LocalFiles(path)


class _Arrays:
    """Files whose content is in the address space: ranges are slices."""

    def array(self, name: str, dtype: str, size: int) -> np.ndarray:
        raise NotImplementedError

    def ranges(
        self, names: Sequence[str], dtype: str, sizes: Mapping[str, int], limits: np.ndarray
    ) -> list[np.ndarray]:
        arrays = {name: self.array(name, dtype, sizes[name]) for name in dict.fromkeys(names)}
        return [arrays[n][a:b] for n, (a, b) in zip(names, limits.tolist(), strict=True)]

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        return list(map(function, items))


class MemoryFiles(_Arrays):
    """Arrays by the names of files."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays

    def absence(self) -> str:
        return "not in memory"

    def read(self, name: str) -> bytes | None:
        return self._arrays[name].tobytes() if name in self._arrays else None

    def array(self, name: str, dtype: str, size: int) -> np.ndarray:
        return self._arrays[name].view(dtype)

    def sha256(self, name: str, size: int) -> str:
        return hashlib.sha256(self._arrays[name].tobytes()).hexdigest()


class _LocalFiles(_Arrays):
    def __init__(self, path: str):
        self._path = Path(path)

    def absence(self) -> str:
        if self._path.is_symlink() and not self._path.exists():
            return f"a link to {os.readlink(self._path)}, which is not there"
        if not self._path.exists():
            out = self._path.parent
            return (
                "no such folder; make the store with scripts/prepare_data.py --data=TEXT "
                f"--tokenizer=FILE --out={out}, or with all that it needs by `make pretrain`"
            )
        if not self._path.is_dir():
            return "a file, not the folder of a token store"
        inside = [path.parent.name for path in sorted(self._path.glob(f"*/{MANIFEST}"))]
        if inside:
            return f"not a token store but a folder of some: name one of {', '.join(inside)} in it"
        return _INCOMPLETE

    def read(self, name: str) -> bytes | None:
        file = self._path / name
        return file.read_bytes() if file.is_file() else None

    def array(self, name: str, dtype: str, size: int) -> np.ndarray:
        return np.frombuffer(_mapped(self, name, size), dtype)

    def sha256(self, name: str, size: int) -> str:
        self._check(name, size)
        with open(self._path / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def open(self, name: str, size: int) -> mmap.mmap | bytes:
        self._check(name, size)
        if not size:  # an empty file cannot be mapped
            return b""
        with open(self._path / name, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _check(self, name: str, size: int) -> None:
        file = self._path / name
        if not file.is_file():
            raise _damaged(file, f"is missing, the manifest says {size} bytes")
        if (found := file.stat().st_size) != size:
            raise _damaged(file, f"has {found} bytes, the manifest says {size}")


@functools.lru_cache(maxsize=_MAX_MAPPED)
def _mapped(files: _LocalFiles, name: str, size: int) -> mmap.mmap | bytes:
    """Return a file's content; one that is not used for long is closed when its arrays are gone."""
    return files.open(name, size)


def _damaged(file: object, error: str) -> ValueError:
    return ValueError(f"{file} {error}; the store is damaged: copy or prepare it again")


class _RemoteFiles:
    """Files behind a URL, read by byte range through TensorStore."""

    def __init__(self, url: str):
        import tensorstore

        self._url = url.rstrip("/")
        self._store = tensorstore.KvStore.open(kvstore_spec(self._url)).result()
        self._checked: set[str] = set()
        self._blocks: collections.OrderedDict[tuple[str, int], np.ndarray] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def absence(self) -> str:
        check_bucket(self._url)
        return _INCOMPLETE

    def read(self, name: str) -> bytes | None:
        result = self._store.read(name).result()
        return result.value if result.state == "value" else None

    def array(self, name: str, dtype: str, size: int) -> Array:
        self._check(name, size)
        return _RemoteArray(self, name, dtype, size)

    def ranges(
        self, names: Sequence[str], dtype: str, sizes: Mapping[str, int], limits: np.ndarray
    ) -> list[np.ndarray]:
        self.map(lambda name: self._check(name, sizes[name]), dict.fromkeys(names))
        return self.fetch(names, dtype, limits)

    def fetch(self, names: Sequence[str], dtype: str, limits: np.ndarray) -> list[np.ndarray]:
        pending = [
            self._store.read(name, byte_range=slice(a, b)) if b > a else None
            for name, (a, b) in zip(
                names, (limits * np.dtype(dtype).itemsize).tolist(), strict=True
            )
        ]
        contents = (future.result().value if future else b"" for future in pending)
        return [np.frombuffer(content, dtype) for content in contents]

    def sha256(self, name: str, size: int) -> str:
        self._check(name, size)
        found = hashlib.sha256()
        for start in range(0, size, _HASHED):
            limits = np.array([[start, min(start + _HASHED, size)]])
            found.update(self.fetch([name], "u1", limits)[0].data)
        return found.hexdigest()

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        items = list(items)
        if len(items) < 2:
            return list(map(function, items))
        return list(_threads().map(function, items))

    def blocks(self, name: str, dtype: str, numbers: np.ndarray, length: int) -> list[np.ndarray]:
        """Return blocks of `BLOCK` numbers, from memory or side by side from the URL."""
        keys = [(name, number) for number in numbers.tolist()]
        with self._lock:
            found = {key: self._blocks[key] for key in keys if key in self._blocks}
        missing = [key for key in keys if key not in found]
        starts = np.array([number for _, number in missing], np.int64) * BLOCK
        limits = np.stack([starts, np.minimum(starts + BLOCK, length)], 1)
        read = self.fetch([name] * len(missing), dtype, limits)
        found |= dict(zip(missing, read, strict=True))
        with self._lock:
            for key in keys:
                self._blocks[key] = found[key]
                self._blocks.move_to_end(key)
            while len(self._blocks) > _MAX_BLOCKS:
                self._blocks.popitem(last=False)
        return [found[key] for key in keys]

    def _check(self, name: str, size: int) -> None:
        """Raise ValueError unless the last byte exists and none after it: no call tells a size."""
        if name not in self._checked:
            positions = [size - 1, size] if size else []
            pending = [self._store.read(name, byte_range=slice(p, p + 1)) for p in positions]
            exists = [_exists(future) for future in pending]
            if exists not in ([], [True, False]):
                error = f"is missing or has not the {size} bytes that the manifest says"
                raise _damaged(f"{self._url}/{name}", error)
            self._checked.add(name)


def _exists(future: object) -> bool:
    try:
        return future.result().state == "value"  # pyright: ignore[reportAttributeAccessIssue]
    except ValueError as error:
        if "OUT_OF_RANGE" in str(error):
            return False
        raise


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(64, thread_name_prefix="store")


class _RemoteArray:
    """Numbers of a remote file: slices are read as they are, others in blocks that are kept."""

    def __init__(self, files: _RemoteFiles, name: str, dtype: str, size: int):
        self._files, self._name, self._dtype = files, name, dtype
        self._length = size // np.dtype(dtype).itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            start, stop, _ = index.indices(self._length)
            limits = np.array([[start, max(start, stop)]])
            return self._files.fetch([self._name], self._dtype, limits)[0]
        numbers, where = np.unique(index // BLOCK, return_inverse=True)
        if not len(numbers):
            return np.empty(0, self._dtype)
        found = self._files.blocks(self._name, self._dtype, numbers, self._length)
        begins = np.cumsum([0, *map(len, found)], dtype=np.int64)
        return np.concatenate(found)[begins[where] + index % BLOCK]
