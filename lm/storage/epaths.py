"""Paths of etils, which Orbax takes, in the local file system, `gs://` and `s3://`."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from typing import IO, Any, Self

os.environ["EPATH_USE_TF"] = "false"  # TensorFlow's file system knows no s3:// and no emulator

import fsspec
from etils.epath import backend, gpath, stat_utils

from lm.storage import files, filesystems
from lm.storage.filesystems import PathLike
from lm.storage.paths import is_url


class _Bucket(type(backend.fsspec_backend)):
    """etils' operations in a bucket by `files`: its errors are those of files, and each costs one
    request, two at most. Folders need not be made there.
    """

    def fs(self, path: PathLike) -> fsspec.AbstractFileSystem:
        return filesystems.filesystem(os.fspath(path).partition("://")[0])

    def exists(self, path: PathLike) -> bool:
        return files.exists(path)

    def isdir(self, path: PathLike) -> bool:
        return bool(files.list_names(path))

    def listdir(self, path: PathLike) -> list[str]:
        return files.list_names(path)

    def open(self, path: PathLike, mode: str) -> IO[Any]:
        with filesystems.named_errors(path):
            return super().open(path, mode)

    def mkdir(self, path: PathLike, *, exist_ok: bool = False, mode: int | None = None) -> None:
        if not exist_ok and self.exists(path):
            raise FileExistsError(f"{os.fspath(path)} exists")

    makedirs = mkdir

    def remove(self, path: PathLike) -> None:
        files.delete_file(path)

    def rmtree(self, path: PathLike) -> None:
        files.delete(path)

    def glob(self, path: PathLike) -> list[str]:
        with filesystems.named_errors(path):
            return super().glob(path)

    def stat(self, path: PathLike) -> stat_utils.StatResult:
        with filesystems.named_errors(path):
            return super().stat(path)


_BUCKET = _Bucket()


class StoragePath(gpath.PosixGPath):
    """A path whose own characters are literal in `glob`, and which resolves URLs to themselves.

    etils takes the folder `runs/[x]*` for a pattern, and Orbax then finds none of its files there.
    """

    @property
    def _backend(self) -> backend.Backend:
        filesystems.configure()
        return _BUCKET if is_url(str(self)) else backend.os_backend

    def glob(self, pattern: str) -> Iterator[Self]:
        if is_url(str(self)):
            yield from super().glob(pattern)
        else:
            for path in glob.glob(os.path.join(glob.escape(str(self)), pattern)):
                yield self._new(path)

    def read_bytes(self) -> bytes:
        return files.read_bytes(self) if is_url(str(self)) else super().read_bytes()

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode() if is_url(str(self)) else super().read_text(encoding)

    def write_bytes(self, data: bytes) -> int:
        if not is_url(str(self)):
            return super().write_bytes(data)
        files.write_atomically(self, data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        if not is_url(str(self)):
            return super().write_text(data, encoding, errors)
        return self.write_bytes(data.encode())

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if not is_url(str(self)):
            super().touch(mode, exist_ok)
        elif not files.create(self, b"") and not exist_ok:
            raise FileExistsError(f"{self} exists")

    def resolve(self, strict: bool = False) -> Self:
        return self if is_url(str(self)) else super().resolve(strict)
