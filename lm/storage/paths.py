"""Paths of runs, stores and checkpoints, in the spelling of the libraries that open them.

Every legal name means itself, also with characters that are special in URLs and patterns.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from typing import Any

BUCKETS = {"gs": "gcs", "s3": "s3"}  # scheme of the URL -> TensorStore's driver
_SCHEME_OF = {"gs": "gs", "gcs": "gs", "s3": "s3", "s3a": "s3"}  # as people write them
_MISTYPED = re.compile(r"(?!gs://|s3://)((?i:gs|gcs|s3a|s3)):/")
_SCHEMES = (*BUCKETS, "file", "http", "https", "memory")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return True if `path` is a URL: the path of a local folder may have `://` in it, too."""
    path = os.fspath(path)
    return path.partition("://")[0] in _SCHEMES and "://" in path


def expand_path(path: str, name: str) -> str:
    """Return the path with `~` expanded, as a shell would; of a bucket without slashes that name
    nothing, which would be other objects there: `gs://b/run/` is the folder `gs://b/run`.

    name: the config path or flag that gave it, for the error.

    Raises:
        ValueError: it is empty, or a bucket without a name.
    """
    if not path.strip():
        raise ValueError(f"{name}: {path!r} is no path; name a file or folder")
    scheme, found, rest = path.partition("://")
    if found and scheme in BUCKETS and not rest.partition("/")[0]:
        raise ValueError(f"{name}: {path!r} names no bucket; write {scheme}://BUCKET/FOLDER")
    if mistyped := _MISTYPED.match(path):  # else it would be a local folder, silently
        scheme = _SCHEME_OF[mistyped[1].lower()]
        raise ValueError(f"{name}: {path!r} is no bucket's URL; write {scheme}://BUCKET/FOLDER")
    if found and scheme in BUCKETS:
        return f"{scheme}://{'/'.join(filter(None, rest.split('/')))}"
    return path if is_url(path) else os.path.expanduser(path)


def expand_local_path(path: str, name: str) -> str:
    """As `expand_path`, of a file or folder that is written on this machine's disk alone.

    Raises:
        ValueError: it is empty, or in a bucket.
    """
    if is_url(path):
        raise ValueError(
            f"{name}: {path!r} is in a bucket, and this is written locally; name a local path, "
            "and copy it there"
        )
    return expand_path(path, name)


def kvstore_spec(folder: str) -> dict[str, Any]:
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
    if scheme not in BUCKETS:
        return {"driver": "http", "base_url": folder}
    bucket, _, path = rest.partition("/")
    spec: dict[str, Any] = {"driver": BUCKETS[scheme], "bucket": bucket, "path": path}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        # botocore reads these variables by itself, TensorStore none of them
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        spec |= {"endpoint": endpoint, "aws_region": region}
    if scheme == "s3" and "AWS_ACCESS_KEY_ID" in os.environ:
        # else it looks for files first, and prints an error for each that is not there
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def printable(name: str) -> str:
    """Return a name for the screen: bytes that are no UTF-8 as \\xff, no line breaks."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return text.replace("\r", "\\r").replace("\n", "\\n")
