"""Comma-separated tables (RFC 4180) with the names of their columns in the first line.

A file is a unit, as a line feed in quotes begins no record; ids are `name@row`, from 0 on. Rows
with more or fewer values than columns are skipped.
"""

import csv
import io
from collections.abc import Iterator, Mapping

from lm.sources import Document, Skipped, files
from lm.sources.records import UTF16, from_record

_MAX_VALUE = 1 << 24  # characters; an opening quote that nothing closes would take the whole file


def ranges(file: files.DataFile) -> list[files.Range]:
    return [files.whole(file)]


def read(
    file: files.DataFile, start: int, stop: int, columns: Mapping[str, str]
) -> Iterator[Document | Skipped]:
    content = io.BufferedReader(files.stream(file))
    if content.peek(2).startswith(UTF16):
        yield Skipped(file.name, "utf_16")
        return
    # bytes that are no UTF-8 are found in each record by itself
    text = io.TextIOWrapper(content, "utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(_MAX_VALUE)
    try:
        rows = csv.reader(text, strict=True)
        names = next(rows, [])
        for number, values in enumerate(filter(None, rows)):
            document_id = f"{file.name}@{number}"
            if len(values) == len(names):
                yield from_record(document_id, dict(zip(names, values, strict=True)), columns)
            else:
                detail = f"{len(values)} values for {len(names)} columns"
                yield Skipped(document_id, "malformed_csv", detail=detail)
    except csv.Error as error:
        raise files.DamagedFile(str(error)) from error
    if not names:
        yield Skipped(file.name, "empty")
