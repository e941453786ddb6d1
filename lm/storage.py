"""The door to storage: paths of runs, stores and checkpoints in the spelling of the libraries that
open them, and atomic writes.

Every legal name means itself, also with characters that are special in URLs and patterns.
"""

from __future__ import annotations

import os
import urllib.parse
import uuid

_DRIVERS = {"gs": "gcs", "s3": "s3"}  # of TensorStore
_SCHEMES = (*_DRIVERS, "file", "http", "https", "memory")


def is_url(path: str) -> bool:
    """Return True if `path` is a URL: the path of a local folder may have `://` in it, too."""
    return path.partition("://")[0] in _SCHEMES and "://" in path


def expand(path: str, name: str) -> str:
    """Return the path with `~` expanded, as a shell would; ValueError where it is empty.

    name: the config path or flag that gave it, for the error.
    """
    if not path.strip():
        raise ValueError(f"{name}: {path!r} is no path; name a file or folder")
    return path if is_url(path) else os.path.expanduser(path)


def kvstore(folder: str) -> dict[str, str]:
    """Return TensorStore's spec of a folder: a local path, `gs://` or `s3://` (both without
    escapes), `file://` or `http://` (both URLs, with %20 for a space).
    """
    folder = folder.rstrip("/") + "/"
    if not is_url(folder):
        return {"driver": "file", "path": os.path.abspath(folder) + "/"}
    scheme, _, rest = folder.partition("://")
    if scheme == "file":
        return {"driver": "file", "path": urllib.parse.unquote(rest)}
    if scheme == "memory":
        return {"driver": "memory", "path": rest}
    if scheme not in _DRIVERS:
        return {"driver": "http", "base_url": folder}
    bucket, _, path = rest.partition("/")
    return {"driver": _DRIVERS[scheme], "bucket": bucket, "path": path}


def write_atomically(path: str | os.PathLike[str], content: str | bytes | memoryview) -> None:
    """Write a file that is there whole or as it was, whatever is killed and however many write it.

    A local file is synced under another name and renamed; objects of `gs://` and the like appear
    whole by themselves. Missing folders are made. Text is UTF-8.
    """
    data = content.encode() if isinstance(content, str) else content
    name = os.fspath(path)
    if is_url(name):
        from etils import epath  # costs 0.1 s

        remote = epath.Path(name)
        remote.parent.mkdir(parents=True, exist_ok=True)
        remote.write_bytes(bytes(data))
        return
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    temporary = f"{name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def printable(name: str) -> str:
    """Return a name for the screen: bytes that are no UTF-8 as \\xff, no line breaks."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return text.replace("\r", "\\r").replace("\n", "\\n")
