"""Orbax on `s3://`, which its file layer knows as little as a local path.

Orbax writes through TensorStore, which has a driver for S3, but asks for it by four private
functions that know only `gs://`. S3 keeps the same promises (objects appear whole, reads see the
last write), so it takes the same way: a folder without renames, complete with its commit file.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from lm.storage.paths import BUCKETS, kvstore_spec

_PREFIXES = tuple(f"{scheme}://" for scheme in BUCKETS)


@functools.cache
def enable() -> None:
    """Make Orbax take `s3://` wherever it takes `gs://`."""
    of_gcs = gcs_utils.get_kvstore_for_gcs

    def kvstore(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return of_gcs(path)
        spec = kvstore_spec(path)
        return spec | {"path": spec["path"].rstrip("/")}  # may be a file, as `_sharding`

    def normalize(path: str) -> str:
        scheme, found, rest = path.partition("://")
        return f"{scheme}://{os.path.normpath(rest)}" if found else os.path.normpath(path)

    for module, name, value in (
        (gcs_utils, "_GCS_PATH_PREFIX", _PREFIXES),
        (gcs_utils, "get_kvstore_for_gcs", kvstore),
        (tensorstore_utils, "_use_gcs_driver", lambda path: path.startswith(_PREFIXES)),
        (tensorstore_utils, "_normalize_path", normalize),
    ):
        if not hasattr(module, name):
            raise NotImplementedError(f"this orbax-checkpoint has no {module.__name__}.{name}")
        setattr(module, name, value)
