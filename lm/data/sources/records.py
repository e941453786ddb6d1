"""Records (JSON objects, lines of a table, TFDS examples) to documents.

A field of a store is a column of the record, or a template with columns in braces:

    source=question
    source=translate English to Chinese: {en}
    source=question: {question} context: {context}

Columns of tab-separated lines have the numbers 1, 2, ... as names.
"""

import re
from collections.abc import Mapping

from lm.data.sources import Document, Skipped

_COLUMN = re.compile(r"\{([^{}]+)\}")


def column_names(columns: Mapping[str, str]) -> list[str]:
    """Return the columns in `columns`: field -> column or template."""
    return [name for spec in columns.values() for name in _COLUMN.findall(spec) or [spec]]


def are_numbers(columns: Mapping[str, str]) -> bool:
    """Return True if all columns are numbers: those of tab-separated lines."""
    return all(name.isdecimal() for name in column_names(columns))


def from_line(document_id: str, line: bytes, columns: Mapping[str, str]) -> Document | Skipped:
    """Return the document of a line of tab-separated columns, or the skipped line."""
    if not line.strip():
        return Skipped(document_id, "empty")
    try:
        values = line.decode().rstrip("\r").split("\t")
    except UnicodeDecodeError:
        return Skipped(document_id, "invalid_utf8")
    record = {str(number): value for number, value in enumerate(values, 1)}
    return from_record(document_id, record, columns)


def from_record(document_id: str, record: object, columns: Mapping[str, str]) -> Document | Skipped:
    """Return the document of a record (a JSON object), or the skipped record."""
    names = column_names(columns)
    if not isinstance(record, dict) or not all(name in record for name in names):
        fields = tuple(map(str, record)) if isinstance(record, dict) else ()
        return Skipped(document_id, "missing_field", fields)
    texts = {name: record[name] for name in names}
    if not all(isinstance(text, str) for text in texts.values()):
        return Skipped(document_id, "field_is_not_text")
    if not all(texts.values()):
        return Skipped(document_id, "empty")
    fields = {
        field: texts[spec] if spec in texts else _COLUMN.sub(lambda match: texts[match[1]], spec)
        for field, spec in columns.items()
    }
    try:
        for text in fields.values():
            text.encode()  # JSON can spell half a surrogate pair, which no UTF-8 has
    except UnicodeEncodeError:
        return Skipped(document_id, "invalid_utf8")
    return Document(document_id, fields)
