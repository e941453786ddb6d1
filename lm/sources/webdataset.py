"""WebDataset: a tar with a document for each sample, the files that share a name up to its dot.

A tar is a unit, read from beginning to end. Columns of a sample are the names after the dot:
`txt`, a text (also under the name `text`); `json`, an object, whose keys are columns, too; others
that `--field` names are text. Pictures and sounds are passed over. Ids are `name@sample`.
"""

import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, Self

from lm.sources import Document, Skipped, files
from lm.sources.records import column_names, from_record

_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")


class _Header(tarfile.TarInfo):
    """A header that is one, where `tarfile` takes a damaged or missing one for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except _HEADER_ERROR as error:
            if isinstance(error, _END):
                raise
            raise files.DamagedFile(str(error)) from error


_HEADER_ERROR, _END = tarfile.HeaderError, vars(tarfile)["EOFHeaderError"]


def ranges(file: files.DataFile) -> list[files.Range]:
    return [files.whole(file)]


def read(
    file: files.DataFile, start: int, stop: int, columns: Mapping[str, str]
) -> Iterator[Document | Skipped]:
    names = column_names(columns)
    wanted = {"txt", "json"} | {name.split(".")[0] for name in names} | set(names)
    empty = True
    for key, members in itertools.groupby(_members(file, wanted), lambda member: member[0]):
        empty = False
        yield _document(f"{file.name}@{key}", {kind: data for _, kind, data in members}, columns)
    if empty:
        yield Skipped(file.name, "empty")


def _members(file: files.DataFile, wanted: set[str]) -> Iterator[tuple[str, str, bytes]]:
    """Yield (sample, kind, content) of each member; of other kinds without content."""
    with files.stream(file) as content:
        try:
            with tarfile.open(fileobj=content, mode="r|", tarinfo=_Header) as tar:
                while member := tar.next():
                    vars(tar)["members"] = []  # else it keeps the headers of all
                    named = _NAME.fullmatch(member.name)
                    if not member.isfile() or not named or named[1].startswith("__"):
                        continue
                    kind, opened = named[2].lower(), None
                    if kind in wanted and (opened := tar.extractfile(member)):
                        yield named[1], kind, opened.read()
                    else:
                        yield named[1], "", b""
        except tarfile.TarError as error:
            raise files.DamagedFile(str(error)) from error


def _document(
    document_id: str, members: dict[str, bytes], columns: Mapping[str, str]
) -> Document | Skipped:
    record: dict[str, Any] = {kind: data for kind, data in members.items() if kind}
    if "json" in record:
        try:
            record["json"] = json.loads(record["json"])
        except (ValueError, RecursionError):
            return Skipped(document_id, "malformed_json")
        if isinstance(record["json"], dict):
            record = record["json"] | record
    if "txt" in record:
        record["text"] = record["txt"]
    return from_record(document_id, record, columns)
