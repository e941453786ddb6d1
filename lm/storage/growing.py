"""Files that grow by appending, also in buckets, whose objects cannot.

A local file is appended to and flushed. In a bucket `metrics.jsonl` is what the file was when it
was opened last, and `metrics.jsonl.more/TOKEN-OFFSET` are the segments uploaded since, each
beginning at OFFSET of the whole. TOKEN is a hash of `metrics.jsonl`: rewriting it makes all older
segments void at once, so a kill at any moment leaves the old content or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from typing import BinaryIO

from lm.storage import files
from lm.storage.filesystems import PathLike, StorageError
from lm.storage.paths import is_url

SECONDS = 5.0  # between two uploads
MAX_SEGMENTS = 200  # then they become one object again
PART_BYTES = 4 << 20


def read(path: PathLike) -> bytes:
    """Return what was appended to a growing file up to now; empty if there is none."""
    base = _read_base(path)
    while is_url(path):
        content = base
        with contextlib.suppress(FileNotFoundError):  # the writer has just joined them
            for name in _segments(path, base):
                if int(name.partition("-")[2]) != len(content):
                    break
                content += files.read_bytes(f"{path}.more/{name}")
        before, base = base, _read_base(path)
        if base == before:
            return content
    return base


def _read_base(path: PathLike) -> bytes:
    try:
        return files.read_bytes(path)
    except FileNotFoundError:
        return b""


def _token(base: bytes) -> str:
    return hashlib.blake2b(base, digest_size=8).hexdigest()


def _segments(path: PathLike, base: bytes) -> list[str]:
    token = _token(base)
    return [name for name in files.list_names(f"{path}.more") if name.startswith(token)]


class _Uploads:
    """A thread that calls `upload` every `SECONDS`, also after a call that failed."""

    def __init__(self, upload: Callable[[], None]) -> None:
        self._upload, self._closed = upload, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="uploads")
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(SECONDS):
            with contextlib.suppress(OSError):
                self._upload()

    def stop(self) -> None:
        self._closed.set()
        self._thread.join()


class GrowingFile:
    """A file that begins as `content` and is appended to by one process.

    In a bucket, appended bytes are kept in memory and uploaded by a thread every `SECONDS`:
    appending never waits for the network. An error of the bucket is raised by `flush` and `close`,
    on which something depends.
    """

    def __init__(self, path: PathLike, content: bytes = b"") -> None:
        self._path = path
        self._local: BinaryIO | None = None
        files.write_atomically(path, content)
        if not is_url(path):
            self._local = open(path, "ab")  # noqa: SIM115 - closed by `close`
            return
        files.delete(f"{path}.more")
        self._token, self._length, self._num_segments = _token(content), len(content), 0
        self._pending = bytearray()
        self._pending_lock, self._upload_lock = threading.Lock(), threading.Lock()
        self._uploads = _Uploads(self._upload)

    def append(self, data: bytes) -> None:
        """Append bytes: at once to a local file, with the next upload in a bucket."""
        if self._local is not None:
            self._local.write(data)
            self._local.flush()
        else:
            with self._pending_lock:
                self._pending += data

    def flush(self) -> None:
        """Return when all that was appended is stored.

        Raises:
            StorageError: the bucket does not take it.
        """
        if self._local is None:
            self._upload()

    def close(self) -> None:
        """Flush, and make one object of the segments in a bucket; raises as `flush`."""
        if self._local is not None:
            self._local.close()
            return
        self._uploads.stop()
        self._upload(max_segments=1)

    def _upload(self, max_segments: int | None = None) -> None:
        with self._upload_lock:
            with self._pending_lock:
                data = bytes(self._pending)
            if data:
                segment = f"{self._path}.more/{self._token}-{self._length:016d}"
                files.write_atomically(segment, data)
                with self._pending_lock:
                    del self._pending[: len(data)]
                self._length += len(data)
                self._num_segments += 1
            if self._num_segments >= (max_segments or MAX_SEGMENTS):
                content = read(self._path)
                if _token(_read_base(self._path)) != self._token:
                    raise StorageError(f"{self._path}: another process has rewritten it")
                files.write_atomically(self._path, content)
                self._token, self._num_segments = _token(content), 0
                files.delete(f"{self._path}.more")


class RewrittenFile:
    """A binary file for a library that writes and flushes records, such as TensorBoard's.

    In a bucket it is rewritten whole every `SECONDS`, and goes on as `PATH.0001` and so on after
    `PART_BYTES`, so that a day of training is not uploaded again and again.
    """

    def __init__(self, path: str) -> None:
        self._path, self._number = path, 0
        self._local: BinaryIO | None = None
        if not is_url(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._local = open(path, "wb")  # noqa: SIM115 - closed by `close`
            return
        self._content, self._stored = bytearray(), 0
        self._lock = threading.Lock()
        self._uploads = _Uploads(self._upload)

    def write(self, data: bytes) -> int:
        if self._local is not None:
            return self._local.write(data)
        with self._lock:
            self._content += data
        return len(data)

    def flush(self) -> None:
        """Mark the end of a record."""
        if self._local is not None:
            self._local.flush()

    def close(self) -> None:
        if self._local is not None:
            self._local.close()
            return
        self._uploads.stop()
        self._upload()

    def _upload(self) -> None:
        with self._lock:
            data = bytes(self._content)
        if len(data) == self._stored:
            return
        part = f".{self._number:04d}" if self._number else ""
        files.write_atomically(self._path + part, data)
        self._stored = len(data)
        if len(data) >= PART_BYTES:
            with self._lock:
                del self._content[: len(data)]
            self._number, self._stored = self._number + 1, 0
