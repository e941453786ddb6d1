"""Whole files, wherever they lie: read, written atomically, created once, listed, copied, deleted.

Every function takes a local path, `gs://BUCKET/NAME` or `s3://BUCKET/NAME`. Requests are repeated
with growing, random pauses by gcsfs and botocore; a folder of a bucket is the common beginning of
its objects' names, and is never cached, as other hosts write there, too.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import uuid
from collections.abc import Iterator, Sequence, Set
from typing import Any, BinaryIO, NamedTuple, cast

from lm.storage.filesystems import PathLike, check_bucket, named_errors, open_filesystem
from lm.storage.paths import is_url

BLOCK = 8 << 20  # bytes of a request when a file of a bucket is read from beginning to end
_PART_BYTES = 32 << 20  # of an upload in parts


def read_bytes(path: PathLike, start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes of a file, or those from `start` to `end`.

    Raises:
        FileNotFoundError: there is no such file or bucket.
        PermissionError: the bucket is not open to this user.
        StorageError: it does not answer.
    """
    fs, name = open_filesystem(path)
    with named_errors(path):
        return cast(bytes, fs.cat_file(name, start=start, end=end))


def read_ranges(ranges: Sequence[tuple[PathLike, int | None, int | None]]) -> list[bytes]:
    """Return the bytes of many ranges (file, start, end) of one file system, read side by side."""
    if not ranges:
        return []
    fs, _ = open_filesystem(ranges[0][0])
    paths = [open_filesystem(path)[1] for path, _, _ in ranges]
    starts, ends = ([r[i] for r in ranges] for i in (1, 2))
    with named_errors(ranges[0][0]):
        return fs.cat_ranges(paths, starts, ends, on_error="raise")


def exists(path: PathLike) -> bool:
    """Return True if there is a file or folder of this name."""
    fs, name = open_filesystem(path)
    with named_errors(path):
        if found := fs.exists(name):
            return found
        check_bucket(path)
    return False


class FileInfo(NamedTuple):
    """The size of a file in bytes, and a text that changes when its content does."""

    size: int
    stamp: str


def _info(found: dict[str, Any]) -> FileInfo:
    """Return what a listing says: the stamp is a generation or hash, else the time of a change."""
    keys = ("generation", "ETag", "etag", "mtime")
    stamp = next(str(found[key]) for key in keys if found.get(key))
    return FileInfo(int(found["size"]), f"{found['size']}:{stamp.strip(chr(34))}")


def stat(path: PathLike) -> FileInfo:
    """Return the size and stamp of a file.

    Raises:
        FileNotFoundError: no file has this name; a folder may.
    """
    if not is_url(path):
        found = os.stat(path)
        return FileInfo(found.st_size, f"{found.st_size}:{found.st_mtime_ns}")
    fs, name = open_filesystem(path)
    with named_errors(path):
        found = fs.info(name)
        if found["type"] != "file":
            raise FileNotFoundError(name)
        return _info(found)


def is_folder(path: PathLike) -> bool:
    """Return True if there is a folder of this name: in a bucket, one with a file in it."""
    if not is_url(path):
        return os.path.isdir(path)
    fs, name = open_filesystem(path)
    with named_errors(path):
        return fs.isdir(name)


def find(folder: PathLike, depth: int | None = None) -> dict[str, FileInfo]:
    """Return the files below a folder of a bucket by their names relative to it, sorted.

    depth: the largest number of parts of a name; None: any. Raises FileNotFoundError where there is
    no such bucket.
    """
    fs, name = open_filesystem(folder)
    with named_errors(folder):
        found: dict[str, Any] = fs.find(name, maxdepth=depth, detail=True)  # pyright: ignore
        if not found:  # an empty folder is none, and a missing bucket looks like one
            check_bucket(folder)
    below = {entry.removeprefix(name).lstrip("/"): info for entry, info in found.items()}
    kept = {entry: info for entry, info in below.items() if entry and not entry.endswith("/")}
    return {entry: _info(info) for entry, info in sorted(kept.items())}


class _Ranges(io.RawIOBase):
    """A file of a bucket, of which each read is a request for a range."""

    def __init__(self, path: PathLike, size: int):
        self._path, self._at, self._size = path, 0, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = read_bytes(self._path, self._at, end) if self._at < end else b""
        if self._at < end and not data:  # else the rest would be missing, silently
            raise ConnectionError(f"{self._path}: no bytes from {self._at} on, of {self._size}")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_file(path: PathLike, size: int | None = None) -> io.BufferedReader:
    """Open a file to read it, in blocks of `BLOCK` bytes where it is in a bucket; its `raw` reads
    what it is asked for. Errors are those of `read_bytes`.

    size: of the file; where it is not given, one more request asks for it.
    """
    if not is_url(path):
        return open(path, "rb")
    return io.BufferedReader(_Ranges(path, stat(path).size if size is None else size), BLOCK)


def list_names(folder: PathLike) -> list[str]:
    """Return the names in a folder, sorted; none if there is no such folder.

    Raises:
        FileNotFoundError: there is no such bucket.
    """
    fs, name = open_filesystem(folder)
    with named_errors(folder):
        try:
            found = fs.ls(name, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            found = []
        if not found:
            check_bucket(folder)
    below = [entry.rstrip("/") for entry in found if entry.rstrip("/") != name]  # itself: of a file
    return sorted({posixpath.basename(entry) for entry in below} - {""})


def total_size(folder: PathLike) -> int:
    """Return the bytes of all files in a folder."""
    fs, name = open_filesystem(folder)
    with named_errors(folder):
        found: dict[str, Any] = fs.find(name, detail=True)  # pyright: ignore
    return sum(info["size"] for info in found.values())


def make_private_folder(path: str) -> None:
    """Make a local folder that only this user may read, and those above it, if it is not there.

    Raises:
        PermissionError: it is another user's.
    """
    os.makedirs(path, mode=0o700, exist_ok=True)
    if os.stat(path).st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user; name another folder")


def delete(path: PathLike) -> None:
    """Delete a file, or a folder with all that is in it; nothing if there is neither."""
    fs, name = open_filesystem(path)
    with named_errors(path), contextlib.suppress(FileNotFoundError):
        if not is_url(path):
            fs.rm(name, recursive=True)
        elif found := fs.find(name):  # `rm` would ask for each folder in it, too
            fs.rm(found)


def delete_file(path: PathLike) -> None:
    """Delete a file, with one request in a bucket.

    Raises:
        FileNotFoundError: there is no such file.
    """
    fs, name = open_filesystem(path)
    with named_errors(path):
        fs.rm_file(name)


def make_folder(folder: PathLike) -> None:
    """Make a folder, with those above it; of a bucket, make sure that it can be written to."""
    if not is_url(folder):
        os.makedirs(folder, exist_ok=True)
        return
    write_atomically(f"{folder}/.writable", b"")
    delete(f"{folder}/.writable")


def keep_only(folder: PathLike, names: Set[str]) -> None:
    """Delete all files below a folder but those of these names, relative to it with `/`."""
    fs, root = open_filesystem(folder)
    with named_errors(folder):
        for path in fs.find(root):
            if path[len(root) + 1 :] not in names:
                fs.rm_file(path)
    for path, _, _ in [] if is_url(folder) else os.walk(root, topdown=False):
        if not os.listdir(path):
            os.rmdir(path)


def move_folder(folder: PathLike, to: PathLike) -> None:
    """Move a folder to a name that nothing has yet: a rename, or a copy inside a bucket.

    A bucket's files are at the new name before the first is deleted at the old one.
    """
    if not is_url(folder):
        os.rename(folder, to)
        return
    (fs, name), (_, new) = open_filesystem(folder), open_filesystem(to)
    with named_errors(folder):
        found = fs.find(name)
        if not found:
            raise FileNotFoundError(folder)
        fs.copy(found, [new + entry.removeprefix(name) for entry in found])
        fs.rm(found)


def write_atomically(path: PathLike, content: str | bytes | memoryview) -> None:
    """Write a file that is there whole or as it was, whatever is killed and however many write it.

    A local file is synced under another name and renamed; objects of a bucket appear whole by
    themselves. Missing folders are made. Text is UTF-8.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_url(path):
        fs, name = open_filesystem(path)
        with named_errors(path):
            fs.pipe_file(name, bytes(data))
        return
    with _synced(os.fspath(path), data) as temporary:
        os.replace(temporary, path)


class _Upload(io.RawIOBase):
    """An object of a bucket, written in parts; there is none before `finish`."""

    def __init__(self, path: PathLike) -> None:
        fs, name = open_filesystem(path)
        self._path = path
        with named_errors(path):
            self._file = cast(Any, fs.open(name, "wb", block_size=_PART_BYTES))

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        with named_errors(self._path):
            return self._file.write(data)

    def finish(self) -> None:
        with named_errors(self._path):
            self._file.close()

    def discard(self) -> None:
        self._file.closed = True  # or the object would be completed when it is collected
        with contextlib.suppress(Exception):  # parts of a failed upload expire
            self._file.discard()


@contextlib.contextmanager
def writing(path: PathLike) -> Iterator[BinaryIO]:
    """Yield a file of any size to write to; it is there whole after the block, or as it was where
    the block raises or is killed.
    """
    if is_url(path):
        upload = _Upload(path)
        try:
            yield cast(BinaryIO, upload)
        except BaseException:
            upload.discard()
            raise
        upload.finish()
        return
    name = os.fspath(path)
    with _temporary(name) as temporary:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name)


def create(path: PathLike, content: str | bytes) -> bool:
    """Write a file that is not there yet; return False, and change nothing, if it is.

    Of many that create the same file at once, one gets True.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_url(path):
        fs, name = open_filesystem(path)
        with named_errors(path):
            try:
                fs.pipe_file(name, data, mode="create")
            except FileExistsError:
                return False
        return True
    with _synced(os.fspath(path), data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    return True


@contextlib.contextmanager
def _synced(path: str, data: bytes | memoryview) -> Iterator[str]:
    """Yield the name of a synced file with `data` beside `path`; it is gone after the block."""
    with _temporary(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary


@contextlib.contextmanager
def _temporary(path: str) -> Iterator[str]:
    """Yield a new name beside `path`, in a folder that is made; it is gone after the block."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
