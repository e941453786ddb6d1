"""Files of a folder, pattern or bucket, and their uncompressed content as a stream."""

import collections
import fnmatch
import glob
import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lm.sources import Skipped
from lm.storage import files as storage
from lm.storage.paths import BUCKETS, expand_path, is_url

COMPRESSED = (".gz", ".zst")
BLOCK = 1 << 20
_GZIP = 16 + zlib.MAX_WBITS
_MAX_WINDOW = 1 << 31  # bytes of memory that a zstd frame may ask for: `zstd --ultra --long=31`
# Written beside the data by `datasets` and by Spark.
_METADATA = re.compile(r"(dataset_info|state|dataset_dict)\.json|_SUCCESS|.*\.lock")


class DamagedFile(ValueError):
    """A file that cannot be uncompressed, or that is not of the format that its name says."""


class DataFile(NamedTuple):
    """A file by its path, its name relative to the folder of the source, and its `stat`."""

    path: str
    name: str
    size: int
    stamp: str


class Range(NamedTuple):
    """A unit of a file, before it has a name: `size` bytes of it, from `start` to `stop`."""

    start: int
    stop: int
    size: int


WHOLE = -1  # the end of a file, of which no index was read


def whole(file: DataFile) -> Range:
    return Range(0, WHOLE, file.size)


class Listing(NamedTuple):
    """The files below `root`, sorted by name, and the skipped entries."""

    root: str
    files: list[DataFile]
    skipped: list[Skipped]


def find(spec: str) -> Listing:
    """Return the files of a file, a folder or a pattern (`**` recurses), locally or in a bucket.

    The name of an existing folder is not read as a pattern. Raises ValueError where `spec` is
    neither a file nor a folder and no file matches it.
    """
    root, pattern = resolve(spec)
    if is_url(root):
        listing = _find_in_bucket(root, pattern)
    elif pattern is None:
        return list_folder(root)
    elif "**" in pattern:
        hidden = any(part.startswith(".") for part in pattern)
        listing = _listing(
            root,
            [
                (name, reason)
                for name, reason in _walk(Path(root), frozenset(), hidden=hidden)
                if reason == "unreadable" or _matches(name.split("/"), pattern)
            ],
        )
    else:
        found = glob.glob(os.path.join(glob.escape(root), *pattern))
        names = [Path(name).relative_to(root).as_posix() for name in found]
        listing = _listing(root, [(n, _skip_reason(os.path.join(root, n))) for n in names])
    if not listing.files and pattern is not None:
        raise ValueError(f"data {spec!r}: no such file, and no file matches")
    return listing


def list_folder(root: str, excluded: frozenset[str] = frozenset()) -> Listing:
    """Return the files below a folder, without hidden ones and folders of the names `excluded`.

    Links to folders are followed, each folder once, under its own name where it is below `root`.
    """
    return _listing(root, list(_walk(Path(root), excluded)))


def resolve(spec: str) -> tuple[str, list[str] | None]:
    """Return the folder that names are relative to, and the parts of a pattern of files below it;
    None: all of its files. Raises ValueError for a file that is none or cannot be read.
    """
    path = expand_path(spec, "--data")
    if not is_url(path):
        parts, is_folder = Path(path).parts, os.path.isdir(path)
    elif path.startswith(tuple(f"{scheme}://" for scheme in BUCKETS)):
        scheme, _, rest = path.rstrip("/").partition("://")
        bucket, *names = rest.split("/")
        parts = (f"{scheme}://{bucket}", *names)
        is_folder = not names or storage.is_folder(path)
    else:
        raise ValueError(f"data {spec!r}: name a local path, gs:// or s3://")
    if is_folder:
        return _join(parts), None
    if not is_url(path) and os.path.lexists(path):
        if reason := _skip_reason(path):
            raise ValueError(f"data {spec!r}: {_EXPLAINED[reason]}")
        return str(Path(path).parent), [glob.escape(os.path.basename(path))]
    if is_url(path) and glob.has_magic(path) and _is_file(path):
        return _join(parts[:-1]), [glob.escape(parts[-1])]
    fixed = 0  # parts before the first wildcard; the name of a folder has none
    while fixed < len(parts) - 1 and (
        not glob.has_magic(parts[fixed]) or storage.is_folder(_join(parts[: fixed + 1]))
    ):
        fixed += 1
    return _join(parts[:fixed]), list(parts[fixed:])


def stream(file: DataFile) -> io.RawIOBase:
    """Return the uncompressed content as a file that is read forward; a read may return less than
    it is asked for, so that nothing before a damage is lost.
    """
    return _Blocks(blocks(file))


class _Blocks(io.RawIOBase):
    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._left = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if (block := next(self._blocks, None)) is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def blocks(file: DataFile, offset: int = 0) -> Iterator[bytes]:
    """Yield the uncompressed content, from `offset` on where the file is not compressed.

    Raises DamagedFile, and OSError if it is unreadable.
    """
    with open_file(file) as content:
        if file.name.endswith(".zst"):
            yield from _zstandard_blocks(content)
        elif file.name.endswith((".gz", ".tgz")):
            try:
                yield from _decompressed(content, lambda: zlib.decompressobj(_GZIP))
            except zlib.error as error:
                raise DamagedFile(str(error)) from error
        else:
            content.seek(offset)
            while block := content.read(BLOCK):
                yield block


def open_file(file: DataFile) -> io.BufferedReader:
    return storage.open_file(file.path, file.size)


_EXPLAINED = {
    "dangling_link": "a link to what is not there",
    "link_loop": "a link that leads to itself",
    "unreadable": "it may not be read",
    "not_a_file": "neither a file nor a folder",
}


def _listing(root: str, entries: list[tuple[str, str]]) -> Listing:
    names = sorted(name for name, reason in entries if not reason)
    paths = [os.path.join(root, name) for name in names]
    found = [DataFile(p, n, *storage.stat(p)) for p, n in zip(paths, names, strict=True)]
    skipped = sorted(Skipped(n, reason) for n, reason in entries if reason not in ("", "folder"))
    return Listing(root, found, skipped)


def _find_in_bucket(root: str, pattern: list[str] | None) -> Listing:
    depth = None if pattern is None or "**" in pattern else len(pattern)
    found, skipped = [], set()
    for name, info in storage.find(root, depth).items():
        parts = name.split("/")
        hidden = next((i for i, part in enumerate(parts, 1) if part.startswith(".")), None)
        if pattern is None and hidden:
            skipped.add(Skipped("/".join(parts[:hidden]), "hidden"))
        elif pattern is not None and not _matches(parts, pattern):
            continue
        elif _METADATA.fullmatch(parts[-1]) and depth is None:
            skipped.add(Skipped(name, "metadata"))
        else:
            found.append(DataFile(f"{root}/{name}", name, *info))
    return Listing(root, found, sorted(skipped))


def _join(parts: Sequence[str]) -> str:
    return "/".join(parts) if parts and is_url(parts[0]) else str(Path(*parts))


def _is_file(path: str) -> bool:
    try:
        storage.stat(path)
    except FileNotFoundError:
        return False
    return True


def _skip_reason(path: str) -> str:
    """Return the reason why a path is no readable file: "" if it is one, "folder" of a folder."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "dangling_link"
    except PermissionError:
        return "unreadable"
    except OSError:  # too many levels of links
        return "link_loop"
    if stat.S_ISDIR(mode):
        return "folder"
    return "" if stat.S_ISREG(mode) else "not_a_file"


def _walk(
    root: Path, excluded: frozenset[str], *, hidden: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield (name, reason to skip it or "") of everything below `root`, each folder once."""
    seen: set[tuple[int, int]] = set()
    folders, links = collections.deque([""]), collections.deque[str]()
    while folders or links:  # links last: folders below `root` are read under their own names
        folder = folders.popleft() if folders else links.popleft()
        try:
            found = os.stat(root / folder)
            if (key := (found.st_dev, found.st_ino)) in seen:
                yield folder, "folder_seen_before"
                continue
            seen.add(key)
            entries = sorted(os.listdir(root / folder))
        except OSError:
            yield folder or ".", "unreadable"
            continue
        for entry in entries:
            name = f"{folder}/{entry}" if folder else entry
            if entry.startswith(".") and not hidden:
                yield name, "hidden"
            elif _METADATA.fullmatch(entry):
                yield name, "metadata"
            elif (reason := _skip_reason(os.path.join(root, name))) != "folder":
                yield name, reason
            elif entry not in excluded:
                (links if os.path.islink(root / name) else folders).append(name)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Return True if the parts of a name match a pattern, by the rules of `glob`."""
    if not pattern:
        return not parts
    if pattern[0] == "**" and _matches(parts, pattern[1:]):
        return True
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    if pattern[0] == "**":
        return _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _zstandard_blocks(file: BinaryIO) -> Iterator[bytes]:
    import zstandard

    frames = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    try:
        yield from _decompressed(file, frames.decompressobj)
    except zstandard.ZstdError as error:
        raise DamagedFile(str(error)) from error


def _decompressed(file: BinaryIO, new: Callable[[], Any]) -> Iterator[bytes]:
    """Yield the content of all members or frames, each read by a decompressor of its own; the
    readers of `gzip` and `zstandard` give up what is before the damage, or do not notice it.
    """
    decompressor, is_whole = new(), True
    while compressed := file.read(1 << 16):
        while compressed:
            if decompressor.eof:
                if not (compressed := compressed.lstrip(b"\0")):  # padding, as gzip allows
                    break
                decompressor = new()
            if block := decompressor.decompress(compressed):
                yield block
            compressed, is_whole = decompressor.unused_data, decompressor.eof
    if not is_whole:
        raise DamagedFile("cut short")
