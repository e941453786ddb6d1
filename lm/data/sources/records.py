"""Records (JSON objects, lines of a table, TFDS examples) to documents.

A field of a store is a column of the record, or a template with columns in braces:

    source=question
    source=translate English to Chinese: {en}
    source=question: {question} context: {context}

Columns of tab-separated lines have the numbers 1, 2, ... as names.
"""

import codecs
import json
import re
from collections.abc import Mapping

from lm.data.sources import Document, Skipped

LINES = (".jsonl", ".tsv")  # forms with a record in each line
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_COLUMN = re.compile(r"\{([^{}]+)\}")


def column_names(columns: Mapping[str, str]) -> list[str]:
    """Return the columns in `columns`: field -> column or template."""
    return [name for spec in columns.values() for name in _COLUMN.findall(spec) or [spec]]


def from_bytes(
    document_id: str, content: bytes, form: str, columns: Mapping[str, str]
) -> Document | Skipped:
    """Return the document of a line of ".jsonl" or ".tsv", or of a text; or the skipped record."""
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
    names = column_names(columns)
    if not isinstance(record, dict) or not all(name in record for name in names):
        fields = tuple(map(str, record)) if isinstance(record, dict) else ()
        return Skipped(document_id, "missing_field", fields)
    try:
        texts = {n: x.decode() if isinstance(x := record[n], bytes) else x for n in names}
    except UnicodeDecodeError:
        return Skipped(document_id, "invalid_utf8")
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
