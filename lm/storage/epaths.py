"""Paths of etils, which Orbax takes, in the local file system, `gs://` and `s3://`."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from typing import Self

os.environ["EPATH_USE_TF"] = "false"  # TensorFlow's file system knows no s3:// and no emulator

from etils.epath import backend, gpath

from lm.storage import files
from lm.storage.paths import is_url


class StoragePath(gpath.PosixGPath):
    """A path whose own characters are literal in `glob`, and which resolves URLs to themselves.

    etils takes the folder `runs/[x]*` for a pattern, and Orbax then finds none of its files there.
    """

    @property
    def _backend(self) -> backend.Backend:
        files.configure()
        return backend.fsspec_backend if is_url(str(self)) else backend.os_backend

    def glob(self, pattern: str) -> Iterator[Self]:
        if is_url(str(self)):
            yield from super().glob(pattern)
        else:
            for path in glob.glob(os.path.join(glob.escape(str(self)), pattern)):
                yield self._new(path)

    def iterdir(self) -> Iterator[Self]:
        """Yield what is in the folder; nothing where an empty one is, which buckets do not keep."""
        if not is_url(str(self)):
            yield from super().iterdir()
            return
        for name in files.list_names(self):
            yield self._new(self, name)

    def rmtree(self, missing_ok: bool = False) -> None:
        if is_url(str(self)):
            files.delete(self)
        else:
            super().rmtree(missing_ok)

    def resolve(self, strict: bool = False) -> Self:
        return self if is_url(str(self)) else super().resolve(strict)
