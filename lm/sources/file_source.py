"""Documents from files, locally or in a bucket, and from Python's own standard library.

The suffix of a file, without that of its compression, says how it is read. Ids are paths below the
folder or the fixed part of the pattern, with the number or offset of the record: they, and the
split by their hash, do not depend on where the folder is. Unreadable ones are `Skipped`.
"""

import functools
import importlib.util
import os
import sysconfig
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

from lm.sources import (
    IMAGE,
    Document,
    Skipped,
    Unit,
    arrow,
    comma_separated,
    files,
    parquet,
    text,
    warc,
    webdataset,
)
from lm.sources.records import LINES
from lm.storage import files as storage
from lm.storage.paths import is_url

_FORMATS: dict[str, ModuleType] = {
    **dict.fromkeys(text.SUFFIXES, text),
    ".csv": comma_separated,
    ".parquet": parquet,
    ".arrow": arrow,
    ".tar": webdataset,
    ".tgz": webdataset,
    ".warc": warc,
    ".wet": warc,
}
_UNCOMPRESSED = (".parquet", ".arrow")  # which compress their columns
_PACKAGES = {".warc": ("warcio", "trafilatura", "lxml_html_clean"), ".wet": ("warcio",)}
KNOWN = (
    f"{' '.join(_FORMATS)}, and {' '.join(files.COMPRESSED)} of all but {' '.join(_UNCOMPRESSED)}"
)
# pydoc_data is one generated file of documentation, 7% of the corpus, and would be most of the
# held-out text if it fell there; encodings are mostly generated tables that differ in a few lines,
# so that those held out would be known from training.
_GENERATED = {"pydoc_data", "encodings"}
_NOT_CORPUS = frozenset({"site-packages", "dist-packages", "__pycache__"} | _GENERATED)
_TESTS = {"test", "tests", "idle_test"}
_STDLIB = ("stdlib", "stdlib:all")
_PICTURE_UNIT_BYTES = 1 << 16  # of a table that names pictures, which are much larger


@dataclass(frozen=True)
class FileSource:
    """The files of `spec`: a file, a folder, a pattern (`**` recurses), "stdlib" or "stdlib:all".

    columns: store field -> column or template (see `records`); files that are no tables have only
      the field "text".
    separator: between the documents of a file of text, where LF also matches CR LF; empty: a file
      is one document.
    """

    spec: str
    columns: Mapping[str, str]
    separator: str = ""

    def units(self) -> list[Unit]:
        listing = self._listing
        with ThreadPoolExecutor(16) as executor:  # the indices of files in a bucket
            ranges = executor.map(self._ranges, listing.files)
            return [
                Unit(file.name, start, stop, size, file.stamp)
                for file, found in zip(listing.files, ranges, strict=True)
                for start, stop, size in found
            ]

    def skipped_files(self) -> list[Skipped]:
        return self._listing.skipped

    def document_ids(self, unit: Unit) -> list[str] | None:
        form = self._form(unit.name)
        if not form:
            return []
        is_document = _FORMATS[form] is text and form not in LINES and not self.separator
        return [unit.name] if is_document else None

    def read(self, unit: Unit) -> Iterator[Document | Skipped]:
        folder = os.path.dirname(os.path.join(self._root, unit.name))
        for item in self._read(unit):
            picture = item.picture if isinstance(item, Document) else None
            if picture and isinstance(name := picture.content, str) and not is_url(name):
                picture = picture._replace(content=os.path.join(folder, name))
                item = item._replace(picture=picture)
            yield item

    def _read(self, unit: Unit) -> Iterator[Document | Skipped]:
        path = os.path.join(self._root, unit.name)
        form = self._form(unit.name)
        try:
            info = storage.stat(path)
        except FileNotFoundError:
            info = None
        if info is None or unit.stamp != info.stamp:
            raise ValueError(
                f"{path} was changed during the preparation; start again in a new --out"
            )
        file = files.DataFile(path, unit.name, *info)
        try:
            if not form:
                yield Skipped(unit.name, "other_file_type")
            elif _FORMATS[form] is text:
                options = (form, self.columns, self.separator)
                yield from text.read(file, unit.start, unit.stop, *options)
            else:
                yield from _FORMATS[form].read(file, unit.start, unit.stop, self.columns)
        except files.DamagedFile as error:
            yield Skipped(unit.name, "damaged_file", detail=str(error))
        except OSError as error:
            if is_url(path):  # a bucket that does not answer is no damage of the data
                raise
            yield Skipped(unit.name, "unreadable", detail=error.strerror or "")

    def _ranges(self, file: files.DataFile) -> list[files.Range]:
        form = self._form(file.name)
        if not form:
            return [files.whole(file)]
        lacking = [p for p in _PACKAGES.get(form, ()) if importlib.util.find_spec(p) is None]
        if lacking:
            raise ValueError(
                f"{file.path} needs {' and '.join(lacking)}: pip install {' '.join(lacking)}, or "
                "pip install 'lm[data]'"
            )
        if _FORMATS[form] is not text:
            try:
                if _FORMATS[form] is parquet:
                    return parquet.ranges(file, self._unit_bytes)
                return _FORMATS[form].ranges(file)
            except (files.DamagedFile, OSError) as error:
                if isinstance(error, OSError) and is_url(file.path):
                    raise
                return [files.whole(file)]  # `read` reports it
        if form not in LINES and list(self.columns) != ["text"]:
            raise ValueError(
                f"{file.path}: a {form} file has only the field text, not "
                f"{', '.join(self.columns)}; use .jsonl for several fields, or name the "
                "columns of tab-separated lines by their numbers"
            )
        return text.ranges(file, form, self._unit_bytes)

    @property
    def _unit_bytes(self) -> int | None:
        return _PICTURE_UNIT_BYTES if IMAGE in self.columns else None

    def _form(self, name: str) -> str:
        """Return the suffix of the file's format; "" if it is unknown."""
        return text.form_of(_suffix(name), self.columns)

    @functools.cached_property
    def _root(self) -> str:
        """The folder that ids are relative to."""
        if self.spec in _STDLIB:
            return sysconfig.get_path("stdlib")
        return files.resolve(self.spec)[0]

    @property
    def whole_folder(self) -> str | None:
        """The folder all of whose files are data, if one is named and not a pattern."""
        return self._root if files.resolve(self.spec)[1] is None else None

    @functools.cached_property
    def _listing(self) -> files.Listing:
        if self.spec in _STDLIB:
            excluded = _NOT_CORPUS if self.spec == "stdlib:all" else _NOT_CORPUS | _TESTS
            found = files.list_folder(self._root, excluded).files
            return files.Listing(self._root, [f for f in found if f.name.endswith(".py")], [])
        listing = files.find(self.spec)
        unknown = [file for file in listing.files if not _suffix(file.name)]
        if unknown and files.resolve(self.spec)[1] is not None:
            raise ValueError(f"{unknown[0].path}: unknown file type; known are {KNOWN}")
        if len(unknown) == len(listing.files):
            raise ValueError(f"data {self.spec!r}: no files; known types are {KNOWN}")
        return listing


def _suffix(name: str) -> str:
    """Return the suffix of the uncompressed file, "" if it is unknown."""
    stem = name
    for compressed in files.COMPRESSED:
        stem = stem.removesuffix(compressed)
    suffix = os.path.splitext(stem)[1]
    return suffix if suffix in _FORMATS and (stem == name or suffix not in _UNCOMPRESSED) else ""
