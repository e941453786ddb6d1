"""Files of a token store, opened when they are first read, of which ranges are read."""

from __future__ import annotations

import abc
import collections
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, cast, overload

import numpy as np

from lm.storage.filesystems import check_bucket
from lm.storage.paths import is_url, kvstore_spec

MANIFEST = "manifest.json"
BLOCK = 1024  # integers that are read together
_MAX_BLOCKS = 1 << 11  # kept of a store: 16 MB
_MAX_OPEN = 256  # files of all stores: the system allows some 1,000
_HASHED = 1 << 23  # bytes read at once
_INCOMPLETE = (
    f"not a complete token store (no {MANIFEST}); run scripts/prepare_data.py, again if it was "
    "interrupted"
)
S = TypeVar("S")
T = TypeVar("T")


class Array(Protocol):
    """Numbers in a file, of which some are read; an `np.ndarray` is one."""

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


class _RangedFiles(abc.ABC):
    """Files that are read by `fetch`, ranges of bytes; single numbers in blocks that are kept."""

    def __init__(self, location: str = "") -> None:
        self.location = location
        self._kept: collections.OrderedDict[tuple[str, int], np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

        self._checked: set[str] = set()

    def check(self, name: str, size: int) -> None:
        """Raise ValueError unless a file is there and has this size, once."""
        if name not in self._checked:
            if error := self.size_error(name, size):
                raise ValueError(
                    f"{self.location}/{name} {error}; the store is damaged: copy or prepare it "
                    "again"
                )
            self._checked.add(name)

    @abc.abstractmethod
    def size_error(self, name: str, size: int) -> str:
        """Return "" if a file is there and has this size."""

    @abc.abstractmethod
    def fetch(self, names: Sequence[str], limits: np.ndarray) -> Iterable[bytes]:
        """Return the bytes of ranges; limits: int64 [n, 2]."""

    def array(self, name: str, dtype: str, size: int) -> Array:
        self.check(name, size)
        return _BlockArray(self, name, dtype, size)

    def ranges(
        self, names: Sequence[str], dtype: str, sizes: Mapping[str, int], limits: np.ndarray
    ) -> list[np.ndarray]:
        self.map(lambda name: self.check(name, sizes[name]), dict.fromkeys(names))
        contents = self.fetch(names, limits * np.dtype(dtype).itemsize)
        return [np.frombuffer(content, dtype) for content in contents]

    def sha256(self, name: str, size: int) -> str:
        self.check(name, size)
        found = hashlib.sha256()
        for start in range(0, size, _HASHED):
            [content] = self.fetch([name], np.array([[start, min(start + _HASHED, size)]]))
            found.update(content)
        return found.hexdigest()

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        return list(map(function, items))

    def blocks(self, name: str, dtype: str, numbers: list[int], length: int) -> list[np.ndarray]:
        """Return blocks of `BLOCK` numbers of a file of `length`, from memory or from the file."""
        with self._lock:
            found = {n: self._kept[name, n] for n in numbers if (name, n) in self._kept}
        if missing := [n for n in numbers if n not in found]:
            starts = np.array(missing, np.int64) * BLOCK
            limits = np.stack([starts, np.minimum(starts + BLOCK, length)], 1)
            contents = self.fetch([name] * len(missing), limits * np.dtype(dtype).itemsize)
            for n, content in zip(missing, contents, strict=True):
                found[n] = np.frombuffer(content, dtype)
        with self._lock:
            for n in numbers:
                self._kept[name, n] = found[n]
                self._kept.move_to_end((name, n))
            while len(self._kept) > _MAX_BLOCKS:
                self._kept.popitem(last=False)
        return [found[n] for n in numbers]


class MemoryFiles(_RangedFiles):
    """Arrays by the names of files."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        super().__init__()
        self._arrays = arrays

    def absence(self) -> str:
        return "not in memory"

    def read(self, name: str) -> bytes | None:
        return self._arrays[name].tobytes() if name in self._arrays else None

    def array(self, name: str, dtype: str, size: int) -> np.ndarray:
        return self._arrays[name].view(dtype)

    def size_error(self, name: str, size: int) -> str:
        found = self._arrays[name].nbytes
        return "" if found == size else f"has {found} bytes, the manifest says {size}"

    def fetch(self, names: Sequence[str], limits: np.ndarray) -> list[bytes]:
        both = zip(names, limits.tolist(), strict=True)
        return [self._arrays[name].view(np.uint8)[a:b].tobytes() for name, (a, b) in both]


class _LocalFiles(_RangedFiles):
    def __init__(self, path: str):
        super().__init__(path)
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

    def size_error(self, name: str, size: int) -> str:
        file = self._path / name
        if not file.is_file():
            return f"is missing, the manifest says {size} bytes"
        found = file.stat().st_size
        return "" if found == size else f"has {found} bytes, the manifest says {size}"

    def fetch(self, names: Sequence[str], limits: np.ndarray) -> list[bytes]:
        files = {name: _opened(self, name) for name in dict.fromkeys(names)}
        both = zip(names, limits.tolist(), strict=True)
        return [os.pread(files[name].fileno(), b - a, a) for name, (a, b) in both]


@functools.lru_cache(maxsize=_MAX_OPEN)
def _opened(files: _LocalFiles, name: str) -> BinaryIO:
    """Return an open file of a store; it is closed when others are used and no thread reads it."""
    return cast(BinaryIO, open(f"{files.location}/{name}", "rb", buffering=0))


class _RemoteFiles(_RangedFiles):
    """Files behind a URL, read by byte range through TensorStore."""

    def __init__(self, url: str):
        import tensorstore

        super().__init__(url.rstrip("/"))
        self._store = tensorstore.KvStore.open(kvstore_spec(self.location)).result()

    def absence(self) -> str:
        check_bucket(self.location)
        return _INCOMPLETE

    def read(self, name: str) -> bytes | None:
        result = self._store.read(name).result()
        return result.value if result.state == "value" else None

    def size_error(self, name: str, size: int) -> str:
        # no call tells a size: the last byte must exist, and none after it
        positions = [size - 1, size] if size else []
        pending = [self._store.read(name, byte_range=slice(p, p + 1)) for p in positions]
        if [_exists(future) for future in pending] in ([], [True, False]):
            return ""
        return f"is missing or has not the {size} bytes that the manifest says"

    def fetch(self, names: Sequence[str], limits: np.ndarray) -> Iterable[bytes]:
        pending = [
            self._store.read(name, byte_range=slice(a, b)) if b > a else None
            for name, (a, b) in zip(names, limits.tolist(), strict=True)
        ]
        return (future.result().value if future else b"" for future in pending)

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        items = list(items)
        if len(items) < 2:
            return list(map(function, items))
        return list(_threads().map(function, items))


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


class _BlockArray:
    """Numbers of a file: slices are read as they are, others in blocks that are kept."""

    def __init__(self, files: _RangedFiles, name: str, dtype: str, size: int):
        self._files, self._name, self._dtype = files, name, dtype
        self._length = size // np.dtype(dtype).itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            limits = np.array([[start, max(start, stop)]]) * np.dtype(self._dtype).itemsize
            [content] = self._files.fetch([self._name], limits)
            return np.frombuffer(content, self._dtype)[::step]
        numbers, where = np.divmod(index, BLOCK)
        found = dict.fromkeys(numbers.ravel().tolist())
        if len(found) == 1:
            [only] = self._files.blocks(self._name, self._dtype, [*found], self._length)
            return only[where]
        if not found:
            return np.empty(index.shape, self._dtype)
        order = sorted(found)
        blocks = self._files.blocks(self._name, self._dtype, order, self._length)
        begins = np.cumsum([0, *map(len, blocks)], dtype=np.int64)
        return np.concatenate(blocks)[begins[np.searchsorted(order, numbers)] + where]
