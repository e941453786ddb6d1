"""Web archives: the texts of WET files, and the main text of the pages of WARC files.

A file is a unit, read from beginning to end. Columns are `text`, `url`, `date` and `language` (of
Common Crawl's WET files, such as "eng,deu"). Ids are `name@number`, of the record in the file.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lm.sources import Document, Skipped, files
from lm.sources.records import from_record

if TYPE_CHECKING:
    from warcio.recordloader import ArcWarcRecord

_PAGES = ("text/html", "application/xhtml+xml")


def ranges(file: files.DataFile) -> list[files.Range]:
    return [files.whole(file)]


def read(
    file: files.DataFile, start: int, stop: int, columns: Mapping[str, str]
) -> Iterator[Document | Skipped]:
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    empty = True
    with files.stream(file) as content:
        records: Any = ArchiveIterator(content, no_record_parse=True, verify_http=False)
        records.INC_RECORD = ""  # what it would print of a record of another length than it says
        try:
            for number, record in enumerate(records):
                empty = False
                uri = record.rec_headers.get_header("WARC-Target-URI")
                if record.rec_type == "response" and uri:
                    record.http_headers = _http_headers(records.loader, uri, record)
                if record.rec_type in ("conversion", "response"):
                    yield _document(f"{file.name}@{number}", record, columns)
        except ArchiveLoadFailed as error:
            raise files.DamagedFile(str(error).partition("\n")[0]) from error
    if empty:
        yield Skipped(file.name, "empty")


def _http_headers(loader: Any, uri: str, record: "ArcWarcRecord") -> Any:
    try:
        return loader.load_http_headers("response", uri, record.raw_stream, record.length)
    except EOFError:
        return None


def _document(
    document_id: str, record: "ArcWarcRecord", columns: Mapping[str, str]
) -> Document | Skipped:
    content = record.content_stream().read()
    if record.length is None or record.raw_stream.limit:
        raise files.DamagedFile(f"cut short in {document_id}")
    text: str | bytes | None = content
    if record.rec_type == "response":
        text = _page_text(record, content)
        if text is None:
            return Skipped(document_id, "no_page")
    header = record.rec_headers.get_header
    found = {
        "text": text,
        "url": header("WARC-Target-URI"),
        "date": header("WARC-Date"),
        "language": header("WARC-Identified-Content-Language"),
    }
    return from_record(document_id, found, columns)


def _page_text(record: "ArcWarcRecord", content: bytes) -> str | None:
    """Return the main text of a page; "" where it has none, None of another answer."""
    import trafilatura

    http = record.http_headers
    kind = http and http.get_header("Content-Type", "").partition(";")[0].strip().lower()
    if not http or http.get_statuscode() != "200" or kind not in _PAGES:
        return None
    return trafilatura.extract(content) or ""
