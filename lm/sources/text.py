"""Text, JSON lines and tables: a document a file, a separated part of it, or a line.

A line of `.jsonl`, `.ndjson`, of `.json` that holds an object in its first line, or of a table
(`.tsv`, or `.txt` where the columns are numbers) is a document. Lines end at LF. Ids are names of
files, with `@offset` (bytes of uncompressed text) for a record. Units are ranges of bytes; a
compressed file is one, and is streamed.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping

from lm.sources import Document, Skipped, files
from lm.sources.records import LINES, UTF16, column_names, from_bytes

SUFFIXES = (".txt", ".md", ".py", *LINES)
_RANGE = 1 << 26  # bytes; a longer .jsonl file is read in ranges, by several workers


def form_of(suffix: str, columns: Mapping[str, str]) -> str:
    """Return the suffix, of a table where the columns of a .txt are numbers."""
    are_numbers = all(column.isdecimal() for column in column_names(columns))
    return ".tsv" if suffix == ".txt" and are_numbers else suffix


def ranges(file: files.DataFile, form: str, size: int | None) -> list[files.Range]:
    """Return the ranges of an uncompressed file of lines, of `size` bytes; any other is one."""
    size = size or _RANGE
    if form not in LINES or file.name.endswith(files.COMPRESSED):
        return [files.whole(file)]
    starts = range(0, max(file.size, 1), size)
    stops = [min(start + size, file.size) for start in starts]
    return [files.Range(a, b, b - a) for a, b in zip(starts, stops, strict=True)]


def read(
    file: files.DataFile,
    start: int,
    stop: int,
    form: str,
    columns: Mapping[str, str],
    separator: str,
) -> Iterator[Document | Skipped]:
    """Yield the records that begin at offsets `start` to `stop`, or the one of the file."""
    if form not in LINES and not separator:
        content = b"".join(files.blocks(file)).removeprefix(codecs.BOM_UTF8)
        yield from_bytes(file.name, content, form, columns)
        return
    if form == ".json" and not _has_objects_in_lines(file):
        detail = "no JSON object in its first line; jq -c '.[]' makes lines of a list"
        yield Skipped(file.name, "other_file_type", detail=detail)
        return
    empty = True
    for offset, record in _records(file, "" if form in LINES else separator, start, stop):
        empty = False
        if not offset:
            if record.startswith(UTF16):
                yield Skipped(file.name, "utf_16")
                return
            record = record.removeprefix(codecs.BOM_UTF8)
        record = record if form in LINES else record.strip()
        yield from_bytes(f"{file.name}@{offset}", record, form, columns)
    if empty and start == 0:
        yield Skipped(file.name, "empty")


def _has_objects_in_lines(file: files.DataFile) -> bool:
    """Return True if the first line is a JSON object, or the beginning of one as long as a block,
    or of an encoding that is reported later; also of an empty file.
    """
    block = b""
    for part in files.blocks(file):  # which may be small in a compressed file
        block += part
        if b"\n" in part or len(block) >= files.BLOCK:
            break
    block = block.removeprefix(codecs.BOM_UTF8)
    line, newline, _ = block.partition(b"\n")
    if not newline and len(block) >= files.BLOCK:
        return block.startswith(b"{")
    if not block or block.startswith(UTF16):
        return True
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _records(
    file: files.DataFile, separator: str, start: int, stop: int
) -> Iterator[tuple[int, bytes]]:
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
    for block in files.blocks(file, offset):
        buffer += block
        begin = 0
        while match := pattern.search(buffer, max(begin, searched)):
            if not skip:
                yield offset + begin, bytes(buffer[begin : match.start()])
            skip = False
            begin = match.end()
            if stop != files.WHOLE and offset + begin >= stop:
                return
        del buffer[:begin]
        offset += begin
        searched = max(len(buffer) - longest + 1, 0)
    if buffer and not skip:
        yield offset, bytes(buffer)
