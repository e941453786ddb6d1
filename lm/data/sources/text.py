"""Documents from text files, and from Python's own standard library.

A file is one document, or several with a separator; a line of `.jsonl` or of a table (`.tsv`, or
`.txt` where the columns are numbers) is one. Lines end at LF. Ids are paths below the folder or the
fixed part of the pattern, with `@offset` (bytes of uncompressed text) for a record: they, and the
split by their hash, do not depend on where the folder is. Unreadable ones are `Skipped`.
"""

import codecs
import functools
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lm.data.sources import Document, Skipped, Unit, files
from lm.data.sources.records import LINES, UTF16, column_names, from_bytes
from lm.storage.paths import expand_path

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".tsv")
# pydoc_data is one generated file of documentation, 7% of the corpus, and would be most of the
# held-out text if it fell there; encodings are mostly generated tables that differ in a few lines,
# so that those held out would be known from training.
_GENERATED = {"pydoc_data", "encodings"}
_NOT_CORPUS = frozenset({"site-packages", "dist-packages", "__pycache__"} | _GENERATED)
_TESTS = {"test", "tests", "idle_test"}
_RANGE = 1 << 26  # bytes; a longer .jsonl file is read in ranges, by several workers
_WHOLE = -1


@dataclass(frozen=True)
class TextSource:
    """The files of `spec`: a file, a folder, a pattern (`**` recurses), "stdlib" or "stdlib:all".

    columns: store field -> column or template (see `records`); files that are no tables have only
      the field "text".
    separator: between the documents of a file, where LF also matches CR LF; empty: a file is
      one document.
    """

    spec: str
    columns: Mapping[str, str]
    separator: str = ""

    def units(self) -> list[Unit]:
        root, names, _ = self._files
        units = []
        for name in names:
            stat = os.stat(root / name)
            stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
            form = self._form(name)
            if form and form not in LINES and list(self.columns) != ["text"]:
                raise ValueError(
                    f"{root / name}: a {form} file has only the field text, not "
                    f"{', '.join(self.columns)}; use .jsonl for several fields, or name the "
                    "columns of tab-separated lines by their numbers"
                )
            in_ranges = form in LINES and not name.endswith(files.COMPRESSED)
            step = _RANGE if in_ranges else max(stat.st_size, 1)
            for start in range(0, max(stat.st_size, 1), step):
                stop = min(start + step, stat.st_size) if in_ranges else _WHOLE
                size = min(step, stat.st_size - start)
                units.append(Unit(name, start, stop, size, stamp))
        return units

    def skipped_files(self) -> list[Skipped]:
        return self._files.skipped

    def document_ids(self, unit: Unit) -> list[str] | None:
        form = self._form(unit.name)
        if not form:
            return []
        return None if form in LINES or self.separator else [unit.name]

    def read(self, unit: Unit) -> Iterator[Document | Skipped]:
        path = _root(self.spec) / unit.name
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            stat = None
        if stat is None or unit.stamp != f"{stat.st_size}:{stat.st_mtime_ns}":
            raise ValueError(
                f"{path} was changed during the preparation; start again in a new --out"
            )
        form = self._form(unit.name)
        try:
            if not form:
                yield Skipped(unit.name, "other_file_type")
            elif form in LINES or self.separator:
                yield from self._read_records(path, unit, form)
            else:
                content = b"".join(files.blocks(path)).removeprefix(codecs.BOM_UTF8)
                yield from_bytes(unit.name, content, form, self.columns)
        except files.DamagedFile as error:
            yield Skipped(unit.name, "damaged_file", detail=str(error))
        except OSError as error:
            yield Skipped(unit.name, "unreadable", detail=error.strerror or "")

    def _read_records(self, path: Path, unit: Unit, form: str) -> Iterator[Document | Skipped]:
        separator = "" if form in LINES else self.separator
        empty = True
        for offset, record in _records(path, separator, unit.start, unit.stop):
            empty = False
            if not offset:
                if record.startswith(UTF16):
                    yield Skipped(unit.name, "utf_16")
                    return
                record = record.removeprefix(codecs.BOM_UTF8)
            record = record if form in LINES else record.strip()
            yield from_bytes(f"{unit.name}@{offset}", record, form, self.columns)
        if empty and unit.start == 0:
            yield Skipped(unit.name, "empty")

    def _form(self, name: str) -> str:
        """Return the suffix of the file's format; "" if it is unknown."""
        suffix = _suffix(name)
        are_numbers = all(column.isdecimal() for column in column_names(self.columns))
        return ".tsv" if suffix == ".txt" and are_numbers else suffix

    @functools.cached_property
    def _files(self) -> files.Listing:
        root = _root(self.spec)
        if self.spec in _STDLIB:
            excluded = _NOT_CORPUS if self.spec == "stdlib:all" else _NOT_CORPUS | _TESTS
            names = files.list_folder(root, excluded).names
            return files.Listing(root, [name for name in names if name.endswith(".py")], [])
        listing = files.find(self.spec)
        unknown = [name for name in listing.names if not _suffix(name)]
        if unknown and not os.path.isdir(expand_path(self.spec, "--data")):
            raise ValueError(f"{listing.root / unknown[0]}: unknown file type; known are {_KNOWN}")
        if len(unknown) == len(listing.names):
            raise ValueError(f"data {self.spec!r}: no files; known types are {_KNOWN}")
        return listing


_STDLIB = ("stdlib", "stdlib:all")
_KNOWN = f"{' '.join(SUFFIXES)}, and {' '.join(files.COMPRESSED)} of these"


def _root(spec: str) -> Path:
    """Return the folder that ids of `spec` are relative to."""
    return Path(sysconfig.get_path("stdlib")) if spec in _STDLIB else files.resolve(spec)[0]


def _suffix(name: str) -> str:
    """Return the suffix of the uncompressed file, "" if it is unknown."""
    for compressed in files.COMPRESSED:
        name = name.removesuffix(compressed)
    suffix = os.path.splitext(name)[1]
    return suffix if suffix in SUFFIXES else ""


def _records(path: Path, separator: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, record) of the records that begin at offsets `start` to `stop`.

    separator: "" is a line feed, the one that ranges can have; another one matches CR LF where it
    has LF. Time is linear for a record of any length. A separator at the end begins no record.
    """
    lines = separator.replace("\r\n", "\n").encode()
    pattern = re.compile(re.escape(lines).replace(b"\\\n", b"\r?\n") or b"\n")
    longest = len(lines) + lines.count(b"\n") or 1  # bytes of a separator
    offset = max(start - 1, 0)  # with the byte before, a record that begins at `start` is found
    skip = start > 0
    buffer = bytearray()
    searched = 0
    for block in files.blocks(path, offset):
        buffer += block
        begin = 0
        while match := pattern.search(buffer, max(begin, searched)):
            if not skip:
                yield offset + begin, bytes(buffer[begin : match.start()])
            skip = False
            begin = match.end()
            if stop != _WHOLE and offset + begin >= stop:
                return
        del buffer[:begin]
        offset += begin
        searched = max(len(buffer) - longest + 1, 0)
    if buffer and not skip:
        yield offset, bytes(buffer)
