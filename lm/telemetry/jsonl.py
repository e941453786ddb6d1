"""Strict JSON, and files of one object a line, whose last line a kill or a full disk may have cut.

JSON has no numbers for nan and infinity, and strict readers refuse what Python writes for them:
they are the strings "NaN", "Infinity" and "-Infinity", as in protobuf's JSON, and `read` gives
them back as floats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects of the whole lines, none where there is no file."""
    path = epath.Path(path)
    lines = path.read_text().split("\n") if path.exists() else [""]
    # what follows the last newline is cut, or ""
    return [json.loads(line, object_hook=_with_floats) for line in lines[:-1]]


def _with_floats(record: dict[str, Any]) -> dict[str, Any]:
    return {k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` with the options given, of strict JSON whatever floats are in `value`."""
    return json.dumps(_plain(value), allow_nan=False, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def line(record: Mapping[str, Any]) -> str:
    return dumps(record) + "\n"


def reopen(path: epath.PathLike, kept: Iterable[Mapping[str, Any]]) -> Any:
    """Replaces the file by these records, and opens it for more.

    What is appended to a line that was cut would be lost with it, so this comes first. A kill
    leaves the old file or the new one.
    """
    path = epath.Path(path)
    new = path.parent / f"{path.name}.new"
    new.write_text("".join(line(record) for record in kept))
    new.replace(path)
    return path.open("a")
