"""Records (JSON objects, lines of a table, rows, TFDS examples) to documents.

A field of a store is a column of the record, or a template with columns in braces:

    source=question
    source=translate English to Chinese: {en}
    source=question: {question} context: {context}

A column is a key, or a path of keys and of numbers in lists: `message.content`, `answers.text.0`.
Columns of tab-separated lines have the numbers 1, 2, ... as names. A list of messages is the text
of the dialogue (see `messages`). The field `IMAGE` is a picture, the path of its file or its bytes;
with it, a list of texts is several captions. The field `KEY` is a text and becomes `Document.key`.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm.sources import IMAGE, KEY, Document, Picture, Skipped
from lm.sources.messages import content_text, dialogue_text, is_dialogue

JSON_LINES = (".jsonl", ".ndjson", ".json")
LINES = (*JSON_LINES, ".tsv")  # forms with a record in each line
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_COLUMN = re.compile(r"\{([^{}]+)\}")
_MISSING = object()


def column_names(columns: Mapping[str, str]) -> list[str]:
    """Return the columns in `columns`: field -> column or template."""
    return [name for spec in columns.values() for name in _COLUMN.findall(spec) or [spec]]


def stored_columns(columns: Mapping[str, str], stored: Sequence[str]) -> list[str] | None:
    """Return those of a table's `stored` columns that `columns` are in; None if one is in none."""
    names = column_names(columns)
    found = [next((n for n in (name, name.split(".")[0]) if n in stored), None) for name in names]
    return None if None in found else sorted({name for name in found if name})


def value_at(record: object, path: str) -> Any:
    """Return the value of a column, null inside null, and `_MISSING` where there is none. A key
    that has dots itself comes before a path.
    """
    if isinstance(record, dict):
        if path in record:
            return record[path]
        first, dot, rest = path.partition(".")
        return value_at(record[first], rest) if dot and first in record else _MISSING
    if isinstance(record, list):
        first, dot, rest = path.partition(".")
        if first.isdecimal() and int(first) < len(record):
            return value_at(record[int(first)], rest) if dot else record[int(first)]
    return None if record is None else _MISSING


def text_columns(record: object) -> tuple[str, ...]:
    """Return the columns of a record that hold a text or a dialogue, the longest ones first."""
    found = list(_text_columns(record, ""))
    return tuple(name for name, _ in sorted(found, key=lambda column: -column[1]))


def _text_columns(record: object, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield (column, length), also of those in objects and lists."""
    for name, value in record.items() if isinstance(record, dict) else ():
        if isinstance(value, str | bytes):
            yield f"{prefix}{name}", len(value)
        elif is_dialogue(value):
            yield f"{prefix}{name}", sum(len(str(message["content"])) for message in value)
        else:  # of a list, the first text stands for all
            inner = dict(enumerate(value[:1])) if isinstance(value, list) else value
            yield from _text_columns(inner, f"{prefix}{name}.")


def from_bytes(
    document_id: str, content: bytes, form: str, columns: Mapping[str, str]
) -> Document | Skipped:
    """Return the document of a line of one of `LINES`, or of a text; or the skipped record."""
    if not (content.strip() if form in LINES else content):
        return Skipped(document_id, "empty")
    if content.startswith(UTF16):
        return Skipped(document_id, "utf_16")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return Skipped(document_id, "invalid_utf8")
    if form not in LINES:
        return Document(document_id, {"text": text})
    if form == ".tsv":
        record = {str(number): x for number, x in enumerate(text.rstrip("\r").split("\t"), 1)}
    else:
        try:
            record = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError):  # also of integers of more than 4,300 digits
            return Skipped(document_id, "malformed_json")
    return from_record(document_id, record, columns)


def from_record(document_id: str, record: object, columns: Mapping[str, str]) -> Document | Skipped:
    """Return the document of a record (an object; texts may be bytes), or the skipped record."""
    values = {name: value_at(record, name) for name in column_names(columns)}
    if not isinstance(record, dict) or any(value is _MISSING for value in values.values()):
        return Skipped(document_id, "missing_field", text_columns(record))
    picture, captions = None, ()
    if IMAGE in columns:
        image, columns = columns[IMAGE], {f: c for f, c in columns.items() if f != IMAGE}
        if not (content := _picture_content(values[image])):
            return Skipped(document_id, "no_picture")
        values = {name: values[name] for name in column_names(columns)}
        picture = Picture(content)
    try:
        if picture:
            of_text = {column for field, column in columns.items() if field != KEY}
            captions = {name: _captions(values[name]) for name in values if name in of_text}
            values |= {name: found[:1] for name, found in captions.items() if found}
            captions = tuple(text for found in captions.values() for text in found[1:])
        texts = {name: _text(name, value) for name, value in values.items()}
    except UnicodeDecodeError:
        return Skipped(document_id, "invalid_utf8")
    except ValueError as error:
        return Skipped(document_id, "field_is_not_text", detail=str(error))
    if not all(texts.values()):
        return Skipped(document_id, "empty")
    fields = {
        field: texts[spec] if spec in texts else _COLUMN.sub(lambda match: texts[match[1]], spec)
        for field, spec in columns.items()
    }
    try:
        for text in (*fields.values(), *captions):
            text.encode()  # JSON can spell half a surrogate pair, which no UTF-8 has
    except UnicodeEncodeError:
        return Skipped(document_id, "invalid_utf8")
    key, picture = fields.pop(KEY, ""), picture and picture._replace(captions=captions)
    return Document(document_id, fields, key=key, picture=picture)


def _picture_content(value: object) -> str | bytes | None:
    """Return the path or the bytes of a picture; `datasets` keeps both in a record of its own."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, str | bytes) else None


def _captions(value: object) -> list[str]:
    """Return the texts of a list of texts but the empty ones, and nothing of any other value."""
    if not isinstance(value, list) or not all(isinstance(text, str | bytes) for text in value):
        return []
    return [text for text in (_text("", x) for x in value) if text.strip()]


def _text(column: str, value: object) -> str:
    """Return the text of a column: "" of null. Raises ValueError for what is no text."""
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str | list | None):
        raise ValueError(f"{column} is of type {type(value).__name__}, no text")
    if isinstance(value, list) and len(value) > 1 and all(isinstance(x, str) for x in value):
        raise ValueError(f"{column} has {len(value)} texts: {column}.0 is the first")
    return dialogue_text(value) if is_dialogue(value) else content_text(value)
