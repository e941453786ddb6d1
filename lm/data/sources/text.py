"""Documents from text files, and from Python's own standard library.

One file is one document: `.txt`, `.md`, `.py`, and `.gz` or `.zst` of these. With a separator, a
file holds several. A line of `.jsonl` is one document, and so is one of a table: of `.tsv`, or of
`.txt` where the columns are numbers. Ids are paths below the folder, the fixed
part of the pattern or beside the file, with `@offset` (bytes of uncompressed text) for a record of
a file: they are the same wherever the folder lies, and so is the split by their hash.
"""

import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lm.data.sources import Document, Skipped, Unit
from lm.data.sources.records import are_numbers, from_line, from_record

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".tsv")
_LINES = (".jsonl", ".tsv")
_COMPRESSED = (".gz", ".zst")
# pydoc_data is one generated file of documentation, 7% of the corpus, and would be most of the
# held-out text if it fell there; encodings are mostly generated tables that differ in a few lines,
# so that those held out would be known from training.
_GENERATED = {"pydoc_data", "encodings"}
_NOT_CORPUS = {"site-packages", "dist-packages", "__pycache__"} | _GENERATED
_TESTS = {"test", "tests", "idle_test"}
_RANGE = 1 << 26  # bytes; a longer .jsonl file is read in ranges, by several workers
_BLOCK = 1 << 20
_WHOLE = -1


@dataclass(frozen=True)
class TextSource:
    """The files of `spec`: a file, a folder, a pattern (`**` recurses), "stdlib" or "stdlib:all".

    columns: store field -> column or template (see `records`); files that are no tables have only
      the field "text".
    separator: what stands between the documents of one file; empty: a file is one document.
    """

    spec: str
    columns: Mapping[str, str]
    separator: str = ""

    def units(self) -> list[Unit]:
        root, names = self._files()
        units = []
        for name in names:
            stat = os.stat(root / name)
            stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
            suffix = self._kind(name)
            if suffix and suffix not in _LINES and list(self.columns) != ["text"]:
                raise ValueError(
                    f"{root / name}: a {suffix} file has only the field text, not "
                    f"{', '.join(self.columns)}; use .jsonl for several fields, or name the "
                    "columns of tab-separated lines by their numbers"
                )
            in_ranges = suffix in _LINES and not name.endswith(_COMPRESSED)
            step = _RANGE if in_ranges else max(stat.st_size, 1)
            for start in range(0, max(stat.st_size, 1), step):
                stop = min(start + step, stat.st_size) if in_ranges else _WHOLE
                size = min(step, stat.st_size - start)
                units.append(Unit(name, start, stop, size, stamp))
        return units

    def read(self, unit: Unit) -> Iterator[Document | Skipped]:
        path = _root(self.spec) / unit.name
        stat = os.stat(path)
        if unit.stamp != f"{stat.st_size}:{stat.st_mtime_ns}":
            raise ValueError(
                f"{path} was changed during the preparation; start again in a new --out"
            )
        suffix = self._kind(unit.name)
        if not suffix:
            yield Skipped(unit.name, "other_file_type")
        elif suffix in _LINES or self.separator:
            yield from self._read_records(path, unit)
        else:
            yield _document(unit.name, b"".join(_blocks(path)))

    def _read_records(self, path: Path, unit: Unit) -> Iterator[Document | Skipped]:
        suffix = self._kind(unit.name)
        separator = b"\n" if suffix in _LINES else self.separator.encode()
        empty = True
        for offset, record in _records(path, separator, unit.start, unit.stop):
            empty = False
            record_id = f"{unit.name}@{offset}"
            if suffix == ".jsonl":
                yield _json_document(record_id, record, self.columns)
            elif suffix == ".tsv":
                yield from_line(record_id, record, self.columns)
            else:
                yield _document(record_id, record.strip())
        if empty and unit.start == 0:
            yield Skipped(unit.name, "empty")

    def _kind(self, name: str) -> str:
        """Returns the suffix that says how a file is read; "" if it is not a known one."""
        suffix = _suffix(name)
        return ".tsv" if suffix == ".txt" and are_numbers(self.columns) else suffix

    def _files(self) -> tuple[Path, list[str]]:
        """Returns the root and the sorted names below it."""
        root = _root(self.spec)
        if self.spec in ("stdlib", "stdlib:all"):
            excluded = _NOT_CORPUS if self.spec == "stdlib:all" else _NOT_CORPUS | _TESTS
            names = [name for name in _walk(root, excluded) if name.endswith(".py")]
        elif os.path.isdir(self.spec):
            names = list(_walk(root, set()))
        else:
            found = [self.spec] if os.path.isfile(self.spec) else _glob(self.spec)
            names = [Path(path).relative_to(root).as_posix() for path in found]
            unknown = [path for path in found if not _suffix(path)]
            if unknown:
                raise ValueError(f"{unknown[0]}: unknown file type; known are {_KNOWN}")
        if not any(_suffix(name) for name in names):
            kind = "no files" if os.path.isdir(self.spec) else "no such file, and no file matches"
            raise ValueError(f"data {self.spec!r}: {kind}; known types are {_KNOWN}")
        return root, sorted(names)


_KNOWN = f"{' '.join(SUFFIXES)}, and {' '.join(_COMPRESSED)} of these"


def _root(spec: str) -> Path:
    """Returns the folder that ids of `spec` are relative to."""
    if spec in ("stdlib", "stdlib:all"):
        return Path(sysconfig.get_path("stdlib"))
    if os.path.isdir(spec):
        return Path(spec)
    if os.path.isfile(spec):
        return Path(spec).parent
    parts = Path(spec).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])


def _glob(pattern: str) -> list[str]:
    return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]


def _walk(root: Path, excluded: set[str]) -> Iterator[str]:
    """Yields the names of all files below `root`, without hidden and excluded ones."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded and name[0] != "."]
        for name in files:
            if name[0] != ".":
                yield (Path(folder) / name).relative_to(root).as_posix()


def _suffix(name: str) -> str:
    """Returns the suffix of the uncompressed file, "" if it is not a known one."""
    for compressed in _COMPRESSED:
        name = name.removesuffix(compressed)
    suffix = os.path.splitext(name)[1]
    return suffix if suffix in SUFFIXES else ""


def _blocks(path: Path, offset: int = 0) -> Iterator[bytes]:
    """Yields the uncompressed content from `offset` on. Raises ValueError where it is damaged."""
    try:
        if path.suffix == ".zst":
            yield from _zstandard_blocks(path)
            return
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            file.seek(offset)
            while block := file.read(_BLOCK):
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged compressed file ({error})") from error


def _zstandard_blocks(path: Path) -> Iterator[bytes]:
    """Yields the content of all frames; zstandard's own reader takes a cut one for a whole."""
    import zstandard

    decompressor, is_whole = zstandard.ZstdDecompressor().decompressobj(), True
    try:
        with open(path, "rb") as file:
            while compressed := file.read(1 << 16):
                while compressed:
                    if decompressor.eof:
                        decompressor = zstandard.ZstdDecompressor().decompressobj()
                    yield decompressor.decompress(compressed)
                    compressed, is_whole = decompressor.unused_data, decompressor.eof
    except zstandard.ZstdError as error:
        raise ValueError(f"{path}: damaged compressed file ({error})") from error
    if not is_whole:
        raise ValueError(f"{path}: damaged compressed file (cut short)")


def _records(path: Path, separator: bytes, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, record) of the records that begin at offsets `start` to `stop`.

    The time is linear for a record of any length. A separator at the end begins no record. Ranges
    need a separator of one byte.
    """
    offset = max(start - 1, 0)  # with the byte before, a record that begins at `start` is found
    skip = start > 0
    buffer = bytearray()
    searched = 0
    for block in _blocks(path, offset):
        buffer += block
        begin = 0
        while (end := buffer.find(separator, max(begin, searched))) >= 0:
            if not skip:
                yield offset + begin, bytes(buffer[begin:end])
            skip = False
            begin = end + len(separator)
            if stop != _WHOLE and offset + begin >= stop:
                return
        del buffer[:begin]
        offset += begin
        searched = max(len(buffer) - len(separator) + 1, 0)
    if buffer and not skip:
        yield offset, bytes(buffer)


def _document(document_id: str, content: bytes) -> Document | Skipped:
    if not content:
        return Skipped(document_id, "empty")
    try:
        return Document(document_id, {"text": content.decode()})
    except UnicodeDecodeError:
        return Skipped(document_id, "invalid_utf8")


def _json_document(document_id: str, line: bytes, columns: Mapping[str, str]) -> Document | Skipped:
    if not line.strip():
        return Skipped(document_id, "empty")
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return Skipped(document_id, "invalid_utf8")
    except (json.JSONDecodeError, RecursionError):
        return Skipped(document_id, "malformed_json")
    return from_record(document_id, record, columns)
