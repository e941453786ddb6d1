"""Arrow's streams and files, as `datasets` of Hugging Face keeps them; ids are `name@offset.row`.

Units are consecutive record batches, about 64 MB of the file. Both forms are a row of messages,
each with its length at its beginning, so that the batches are found without reading them:
https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format
"""

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lm.sources import Document, Skipped, files
from lm.sources.records import from_record, stored_columns, text_columns

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 4 << 20  # of a table, that are Python objects at one time
_UNIT_BYTES = 1 << 26
_MAGIC = b"ARROW1\0\0"  # of a file; a stream has none
_CONTINUED = b"\xff\xff\xff\xff"


@contextlib.contextmanager
def arrow_errors() -> Iterator[None]:
    """Raise what pyarrow raises for damaged content as `DamagedFile`."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise files.DamagedFile(str(error).partition("\n")[0]) from error
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise  # of the disk or the bucket
        raise files.DamagedFile(str(error).partition("\n")[0]) from error


def ranges(file: files.DataFile) -> list[files.Range]:
    """Return the offsets of the record batches of each unit; a small file is one."""
    if file.size <= _UNIT_BYTES:
        return [files.whole(file)]
    with files.open_file(file) as opened, arrow_errors():
        schema, at = _read_schema(opened.raw, file.size)
        if _has_dictionaries(schema):  # a batch is not read without those before it
            return [files.whole(file)]
        found, start = [], at
        while True:
            header, body = _read_header(opened.raw, at, file.size, 4096)
            if not header:
                break
            at += len(header) + body
            if at - start >= _UNIT_BYTES:
                found.append(files.Range(start, at, at - start))
                start = at
    return [*found, files.Range(start, at, at - start)] if at > start else found


def read(
    file: files.DataFile, start: int, stop: int, columns: Mapping[str, str]
) -> Iterator[Document | Skipped]:
    with files.open_file(file) as opened, arrow_errors():
        schema, first = _read_schema(opened, file.size)
        wanted = stored_columns(columns, schema.names)
        labels, empty = class_labels(schema), True
        for at, batch in _batches(opened, file.size, schema, start or first, stop):
            empty = empty and not batch.num_rows
            if wanted is None:
                yield from missing_columns(_checked(batch), batch.num_rows, f"{file.name}@{at}.", 0)
                continue
            batch = _checked(batch.select(wanted))
            step = max(batch.num_rows * BATCH_BYTES // max(batch.nbytes, 1), 1)
            for row in range(0, batch.num_rows, step):
                part = batch.slice(row, step)
                yield from batch_documents(part, f"{file.name}@{at}.", row, columns, labels)
        if empty and start == 0:
            yield Skipped(file.name, "empty")


def class_labels(schema: "pa.Schema") -> dict[str, list[str]]:
    """Return the names of the classes of columns that `datasets` keeps as numbers."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = [*metadata["info"]["features"].items()]
        return {name: f["names"] for name, f in features if f.get("_type") == "ClassLabel"}
    except (ValueError, LookupError, TypeError, AttributeError):  # of another library, or damaged
        return {}


def batch_documents(
    batch: "pa.RecordBatch",
    prefix: str,
    row: int,
    columns: Mapping[str, str],
    labels: Mapping[str, list[str]],
) -> Iterator[Document | Skipped]:
    """Yield the documents of rows, the first of which has the number `row`."""
    try:
        records = batch.to_pylist()
    except UnicodeDecodeError:  # of one of them
        if batch.num_rows == 1:
            yield Skipped(f"{prefix}{row}", "invalid_utf8")
            return
        for i in range(batch.num_rows):
            yield from batch_documents(batch.slice(i, 1), prefix, row + i, columns, labels)
        return
    for i, record in enumerate(records, row):
        for name in labels.keys() & record.keys():
            number = record[name]
            is_known = isinstance(number, int) and 0 <= number < len(labels[name])
            record[name] = labels[name][number] if is_known else None
        yield from_record(f"{prefix}{i}", record, columns)


def missing_columns(
    batch: "pa.RecordBatch", num_rows: int, prefix: str, row: int
) -> Iterator[Skipped]:
    """Yield the rows of a table without a wanted column, which has those of its first row."""
    first = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        with contextlib.suppress(ValueError):  # of a time that is none of Python's
            first[name] = column[0].as_py() if num_rows else None
    found = text_columns(first)
    for i in range(row, row + num_rows):
        yield Skipped(f"{prefix}{i}", "missing_field", found)


def _checked(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """Return a batch whose offsets lie inside of it, with texts as bytes, that are not decoded yet.

    Arrow trusts what it reads: without the check a damaged file can end the process.
    """
    import pyarrow as pa

    bytes_of = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    columns = [c.view(bytes_of[c.type]) if c.type in bytes_of else c for c in batch.columns]
    batch = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
    batch.validate(full=True)
    return batch


def _start(file: Any) -> int:
    """Return the offset of the first message, in a file or a stream."""
    file.seek(0)
    return len(_MAGIC) if file.read(len(_MAGIC)) == _MAGIC else 0


def _read_schema(file: Any, file_size: int) -> "tuple[pa.Schema, int]":
    """Return the schema, and the offset after its message."""
    import pyarrow as pa

    start = _start(file)
    header, body = _read_header(file, start, file_size, 8)
    schema = pa.ipc.read_schema(pa.ipc.read_message(pa.py_buffer(header + file.read(body))))
    return schema, start + len(header) + body


def _has_dictionaries(schema: "pa.Schema") -> bool:
    return "dictionary<" in str(schema)  # also inside of lists and structs


def _read_header(file: Any, at: int, file_size: int, num_bytes: int) -> tuple[bytes, int]:
    """Return all of the message at an offset but its body, and the length of that; b"" and 0 at the
    end of the messages.

    num_bytes: read at once; 8 or what is likely to be enough, where each read is a request.
    """
    file.seek(at)
    head = file.read(num_bytes) or b""
    length = int.from_bytes(head[4:8], "little")
    if not length:
        return b"", 0
    if head[:4] != _CONTINUED:
        raise files.DamagedFile(f"no message of Arrow at offset {at}")
    header = head[: 8 + length] + (file.read(max(8 + length - len(head), 0)) or b"")
    try:  # a table of flatbuffers, whose field number 3, if it has one, is the body's length
        table = 8 + int.from_bytes(header[8:12], "little")
        fields = table - struct.unpack_from("<i", header, table)[0]
        size, *found = struct.unpack_from("<HHHHHH", header, fields)
        field = found[4] if size > 2 * 5 else 0
        body = struct.unpack_from("<q", header, table + field)[0] if field else 0
    except struct.error as error:
        raise files.DamagedFile(f"no message of Arrow at offset {at}") from error
    if body < 0 or at + 8 + length + body > file_size:
        raise files.DamagedFile(f"cut short in the message at offset {at}")
    return header, body


def _batches(
    file: Any, file_size: int, schema: "pa.Schema", start: int, stop: int
) -> "Iterator[tuple[int, pa.RecordBatch]]":
    """Yield (offset, batch) from `start` to `stop`; their numbers where there are dictionaries."""
    import pyarrow as pa

    if _has_dictionaries(schema):
        file.seek(_start(file))
        yield from enumerate(pa.ipc.open_stream(file))
        return
    while stop == files.WHOLE or start < stop:
        header, body = _read_header(file, start, file_size, 8)
        if not header:
            return
        message = pa.ipc.read_message(pa.py_buffer(header + file.read(body)))
        yield start, pa.ipc.read_record_batch(message, schema)
        start += len(header) + body
