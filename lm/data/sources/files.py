"""Files of a folder or pattern for `text`, and their uncompressed content."""

import collections
import fnmatch
import glob
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lm.data.sources import Skipped
from lm.storage.paths import expand_path

COMPRESSED = (".gz", ".zst")
_BLOCK = 1 << 20
_MAX_WINDOW = 1 << 31  # bytes of memory that a zstd frame may ask for: `zstd --ultra --long=31`


class DamagedFile(ValueError):
    """A compressed file that cannot be uncompressed."""


class Listing(NamedTuple):
    """Sorted names of files relative to `root`, and the skipped entries."""

    root: Path
    names: list[str]
    skipped: list[Skipped]


def find(spec: str) -> Listing:
    """Return the files of a file, a folder or a pattern (`**` recurses).

    The name of an existing folder is not read as a pattern. Raises ValueError where `spec` is
    neither a file nor a folder and no file matches it.
    """
    root, pattern = resolve(spec)
    if pattern is None:
        return list_folder(root)
    if "**" in pattern:
        hidden = any(part.startswith(".") for part in pattern)
        entries = [
            (name, reason)
            for name, reason in _walk(root, frozenset(), hidden=hidden)
            if reason == "unreadable" or _matches(name.split("/"), pattern)
        ]
    else:
        found = glob.glob(os.path.join(glob.escape(str(root)), *pattern))
        names = [Path(name).relative_to(root).as_posix() for name in found]
        entries = [(name, _skip_reason(os.path.join(root, name))) for name in names]
    listing = _listing(root, [entry for entry in entries if entry[1] != "folder"])
    if not listing.names:
        raise ValueError(f"data {spec!r}: no such file, and no file matches")
    return listing


def list_folder(root: Path, excluded: frozenset[str] = frozenset()) -> Listing:
    """Return the files below a folder, without hidden ones and folders of the names `excluded`.

    Links to folders are followed, each folder once, under its own name where it is below `root`.
    """
    return _listing(root, list(_walk(root, excluded)))


def resolve(spec: str) -> tuple[Path, list[str] | None]:
    """Return the folder that names are relative to, and the parts of a pattern of files below it;
    None: all of its files. Raises ValueError for a file that is none or cannot be read.
    """
    path = expand_path(spec, "--data")
    if os.path.isdir(path):
        return Path(path), None
    if os.path.lexists(path):
        if reason := _skip_reason(path):
            raise ValueError(f"data {spec!r}: {_EXPLAINED[reason]}")
        return Path(path).parent, [glob.escape(os.path.basename(path))]
    parts = Path(path).parts
    fixed = 0  # parts before the first wildcard; the name of a folder has none
    while fixed < len(parts) - 1 and (
        not glob.has_magic(parts[fixed]) or os.path.isdir(Path(*parts[: fixed + 1]))
    ):
        fixed += 1
    return Path(*parts[:fixed]), list(parts[fixed:])


def blocks(path: Path, offset: int = 0) -> Iterator[bytes]:
    """Yield the uncompressed content from `offset` on; DamagedFile, OSError if it is unreadable."""
    if path.suffix == ".zst":
        yield from _zstandard_blocks(path)
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            file.seek(offset)
            while block := file.read(_BLOCK):
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedFile(str(error)) from error


_EXPLAINED = {
    "dangling_link": "a link to what is not there",
    "link_loop": "a link that leads to itself",
    "unreadable": "it may not be read",
    "not_a_file": "neither a file nor a folder",
}


def _listing(root: Path, entries: list[tuple[str, str]]) -> Listing:
    names = sorted(name for name, reason in entries if not reason)
    return Listing(root, names, sorted(Skipped(n, reason) for n, reason in entries if reason))


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


def _zstandard_blocks(path: Path) -> Iterator[bytes]:
    """Yield the content of all frames; zstandard's own reader does not notice a truncated file."""
    import zstandard

    frames = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    decompressor, is_whole = frames.decompressobj(), True
    try:
        with open(path, "rb") as file:
            while compressed := file.read(1 << 16):
                while compressed:
                    if decompressor.eof:
                        decompressor = frames.decompressobj()
                    yield decompressor.decompress(compressed)
                    compressed, is_whole = decompressor.unused_data, decompressor.eof
    except zstandard.ZstdError as error:
        raise DamagedFile(str(error)) from error
    if not is_whole:
        raise DamagedFile("cut short")
