"""The documents of a corpus, read in parts of similar size, or all in order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lm.preparation import filters as document_filters
from lm.preparation.corpus import Corpus
from lm.preparation.pictures import PictureFormat, captions, with_pixels
from lm.sources import Document, DocumentSource, Skipped, Unit, skipped_files

_MIN_PART, _MAX_PART = 1 << 20, 1 << 26  # bytes of source in a part
_MIN_PICTURE_PART = 1 << 16  # of a table that names pictures, which are much larger
FEW_DOCUMENTS = 100
_MAX_PARTS = 1024  # reached before parts grow beyond _MIN_PART
_MANY_PARTS = 1 << 14  # reached before parts grow beyond _MAX_PART
_MAX_SEEN = 1 << 19  # digests of a part that are kept in memory
Part = list[tuple[int, Unit]]  # number of the source, unit


def read_all(corpus: Corpus) -> Iterator[Document | Skipped]:
    """Yield the documents of all sources in order, and what was skipped."""
    for source in corpus.sources():
        yield from skipped_files(source)
        for unit in source.units():
            yield from source.read(unit)


def plan_parts(sources: Sequence[DocumentSource], *, with_pictures: bool = False) -> list[Part]:
    """Return the units of all sources, in order, grouped into parts of similar size."""
    smallest = _MIN_PICTURE_PART if with_pictures else _MIN_PART
    units = [(i, unit) for i, source in enumerate(sources) for unit in source.units()]
    total = sum(unit.size for _, unit in units)
    limit = max(min(max(total // _MAX_PARTS, smallest), _MAX_PART), total // _MANY_PARTS)
    parts: list[Part] = [[]]
    size = 0
    for i, unit in units:
        if parts[-1] and size + unit.size > limit:
            parts.append([])
            size = 0
        parts[-1].append((i, unit))
        size += unit.size
    return parts


def read_part(corpus: Corpus, part: Part) -> Iterator[tuple[Document | Skipped, bytes]]:
    """Yield (document or what was skipped, digest of the document), in order.

    A document with a field of white space alone is skipped; so is one that was among the last
    `_MAX_SEEN` of the part (later repetitions are found by their digests), and one that a filter
    drops, and a picture that cannot be read. The digest is of the text that the filters return, and
    of the pixels. The detail of a repeated document is its `split_key`.
    """
    sources, seen = corpus.sources(), set()
    filters = [_skip_white_space, *corpus.load_filters()]
    wanted = corpus.picture_format
    for i, unit in part:
        read = (_read_pictures(wanted, item) for item in sources[i].read(unit))
        for item in itertools.chain.from_iterable(read):
            digest = b""
            if isinstance(item, Document):
                item = document_filters.apply(filters, item)
            if isinstance(item, Document):
                digest = _digest(item)
                if digest in seen:
                    item = Skipped(item.id, "duplicate", detail=item.split_key)
                if len(seen) >= _MAX_SEEN:
                    seen.clear()
                seen.add(digest)
            yield item, digest


def _read_pictures(
    wanted: PictureFormat | None, item: Document | Skipped
) -> Sequence[Document | Skipped]:
    """Return the item with the pixels of its picture, once for each caption."""
    if wanted is None or isinstance(item, Skipped):
        return [item]
    found = with_pixels(item, wanted)
    return [found] if isinstance(found, Skipped) else captions(found)


def _skip_white_space(document: Document) -> Document | Skipped:
    is_white = any(text.isspace() for text in document.fields.values())
    return Skipped(document.id, "white_space") if is_white else document


def _digest(document: Document) -> bytes:
    """Return a hash of the fields, 16 bytes."""
    content = hashlib.sha256()
    for text in document.fields.values():
        encoded = text.encode()
        content.update(len(encoded).to_bytes(8, "big"))
        content.update(encoded)
    content.update(document.pixels())
    return content.digest()[:16]


def choose_split(corpus: Corpus) -> Corpus:
    """Return the corpus with split "tail" where it has fewer than `FEW_DOCUMENTS` of one field: by
    a hash, none of a few documents or most of the text may be held out.
    """
    if corpus.split == "tail" or corpus.fold or len(corpus.columns) > 1:
        return corpus
    read = (item for part in plan_parts(corpus.sources()) for item, _ in read_part(corpus, part))
    documents = (item for item in read if isinstance(item, Document))
    few = sum(1 for _ in itertools.islice(documents, FEW_DOCUMENTS)) < FEW_DOCUMENTS
    return replace(corpus, split="tail") if few and corpus.validation_fraction else corpus
