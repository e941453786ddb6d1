"""Path for Orbax, which finds its files by glob patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from typing import Self

from etils.epath import gpath

from lm.storage import is_url


class LiteralPath(gpath.PosixGPath):
    """A path whose own characters are literal in `glob`.

    etils takes the folder `runs/[x]*` for a pattern, and Orbax then finds none of its files there.
    """

    def glob(self, pattern: str) -> Iterator[Self]:
        if is_url(str(self)):
            yield from super().glob(pattern)
        else:
            for path in glob.glob(os.path.join(glob.escape(str(self)), pattern)):
                yield self._new(path)
