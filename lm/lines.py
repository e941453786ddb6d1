"""Files of one JSON object a line, whose last line a kill or a full disk may have cut."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """The objects of the whole lines, none where there is no file."""
    path = epath.Path(path)
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is cut, or ""


def line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


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
