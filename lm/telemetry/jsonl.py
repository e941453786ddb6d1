"""Strict JSON, and files of one object a line, whose last line a kill or a full disk may have cut.

JSON has no numbers for nan and infinity, and strict readers refuse what Python writes for them:
they are the strings "NaN", "Infinity" and "-Infinity", as in protobuf's JSON, and `read` returns
them as floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from lm.storage import growing
from lm.storage.filesystems import PathLike

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
Record = dict[str, Any]


def read(path: PathLike) -> list[Record]:
    """The objects of all complete lines; none if there is no file."""
    return parse(growing.read(path))


def parse(content: bytes) -> list[Record]:
    """The objects of all complete lines of a file's content."""
    lines = content.decode().split("\n")
    # after the last newline comes a line that was cut, or ""
    return [json.loads(line, object_hook=_with_floats) for line in lines[:-1]]


def _with_floats(record: Record) -> Record:
    return {k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}


def dumps(value: object, **options: Any) -> str:
    """Strict JSON of `value`, whatever floats it holds; `options` are those of `json.dumps`."""
    return json.dumps(_encodable(value), allow_nan=False, **options)


def _encodable(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _encodable(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def line(record: Mapping[str, object]) -> str:
    return dumps(record) + "\n"


class Writer:
    """A file that grows by records; one that is not `active` writes nothing."""

    def __init__(
        self, path: PathLike, records: Iterable[Mapping[str, object]], *, active: bool = True
    ) -> None:
        """Replace the file by `records`, at once, and open it for more: a record that is appended
        to a line that was cut would be lost with it.
        """
        content = "".join(map(line, records)).encode()
        self._file = growing.GrowingFile(path, content) if active else None

    def append(self, record: Mapping[str, object]) -> None:
        """Append one record: a kill loses none of a local file, some seconds' of a bucket's."""
        if self._file is not None:
            self._file.append(line(record).encode())

    def flush(self) -> None:
        """Return when all records are stored."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
