"""File systems of buckets and of the local disk, and their errors in Python's own types."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import fsspec
import fsspec.config

from lm.storage.paths import BUCKETS, is_url

PathLike = str | os.PathLike[str]
_PACKAGE = {"gs": "gcsfs", "s3": "s3fs"}
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs")
_FOUND_BUCKETS: set[str] = set()
# Attempts of one request, in three minutes: with the six of gcsfs, one save in a hundred fails
# where a fifth of all requests do.
ATTEMPTS = 10
_OPTIONS = {
    "gs": {"use_listings_cache": False},
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {"retries": {"mode": "standard", "max_attempts": ATTEMPTS}},
    },
}


class StorageError(OSError):
    """A bucket does not answer, also after requests were repeated."""


def configure() -> None:
    """Give fsspec its options, also for the file systems that other libraries make with it."""
    for scheme, options in _OPTIONS.items():
        fsspec.config.conf.setdefault(scheme, {}).update(options)
    fsspec.register_implementation("gs", "lm.storage.gcs.FileSystem", clobber=True)


@functools.cache
def filesystem(scheme: str) -> fsspec.AbstractFileSystem:
    """Return fsspec's file system of "gs", "s3" or "file".

    Raises:
        ModuleNotFoundError: the package of the scheme is not installed.
    """
    configure()
    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        package = _PACKAGE[scheme]
        raise ModuleNotFoundError(
            f"{scheme}:// needs {package}: pip install 'lm[{scheme}]', or pip install {package}",
            name=package,
        ) from None


def open_filesystem(path: PathLike) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path, and the path as that file system spells it."""
    name = os.fspath(path)
    scheme, _, rest = name.partition("://")
    if is_url(name) and scheme in BUCKETS:
        return filesystem(scheme), rest.rstrip("/")
    return filesystem("file"), os.path.abspath(name)


@contextlib.contextmanager
def named_errors(path: PathLike) -> Iterator[None]:
    """Raise what a bucket's library raises as one of Python's errors of files, with the path."""
    name = os.fspath(path)
    if not is_url(name):
        yield
        return
    bucket = "/".join(name.split("/")[:3])
    try:
        yield
    except FileNotFoundError as error:
        check_bucket(path)
        raise FileNotFoundError(f"{name} does not exist") from error
    except (FileExistsError, IsADirectoryError, NotADirectoryError):
        raise
    except Exception as error:  # each library has its own family of errors, without a common root
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _CLIENTS:
            raise
        text = f"{type(error).__name__}: {error}".split("\n")[0]
        if _is_about_credentials(text):
            raise PermissionError(
                f"{name}: no access to {bucket} ({text}); "
                + (
                    "run `gcloud auth application-default login`, or give the service account of "
                    "this machine a role on the bucket"
                    if name.startswith("gs:")
                    else "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
                )
            ) from error
        raise StorageError(f"{name}: {text}") from error


def check_bucket(path: PathLike) -> None:
    """Raise FileNotFoundError where the bucket of a path is missing: where nothing is found, for an
    empty bucket and a missing one look alike. A local path has none.
    """
    (fs, name), url = open_filesystem(path), os.fspath(path)
    bucket = "/".join(url.split("/")[:3])
    if bucket in _FOUND_BUCKETS or not url.startswith(tuple(f"{scheme}://" for scheme in BUCKETS)):
        return
    try:
        fs.ls(name.partition("/")[0], detail=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{url}: there is no bucket {bucket}") from None
    except OSError:  # who may read some names need not be allowed to list all
        return
    _FOUND_BUCKETS.add(bucket)


def _is_about_credentials(text: str) -> bool:
    signs = (
        "credential",
        "forbidden",
        "unauthorized",
        "anonymous",
        "access denied",
        "invalid_grant",
    )
    return any(sign in text.lower() for sign in signs)
