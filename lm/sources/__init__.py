"""Documents from files, tables, archives and data sets: the contract of a source.

A source is split into units, each read by one worker. The list of units is a pure function
of the data (never of the number of workers or machines), and reading the units in order gives the
documents in order: so preparation is parallel, resumable and the same everywhere.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

IMAGE, KEY = "<image>", "<key>"  # store fields by which columns name a picture and `Document.key`


class Picture(NamedTuple):
    """The picture of a document.

    content: the path of its file, the bytes of one, or the pixels, uint8 [H, W, 3]. captions: those
    after the first, each of which is a document of its own with the same picture.
    """

    content: str | bytes | np.ndarray
    captions: tuple[str, ...] = ()


class Document(NamedTuple):
    """One document: an id that is the same on every machine, and its text by field.

    masked: counts of what filters have masked in it, by kind. key: documents of one key are in the
    same split; "": of one id. picture: None in a corpus of text.
    """

    id: str
    fields: dict[str, str]
    masked: tuple[tuple[str, int], ...] = ()
    key: str = ""
    picture: Picture | None = None

    @property
    def split_key(self) -> str:
        """The text by whose hash the split of the document is chosen."""
        return self.key or self.id

    def pixels(self) -> bytes:
        """Return the pixels of the picture, once it is decoded; b"" without one."""
        content = None if self.picture is None else self.picture.content
        return content.tobytes() if isinstance(content, np.ndarray) else b""


class Skipped(NamedTuple):
    """A file or record that is no document, with the reason.

    fields: of a record without a wanted field, those that it has. detail: what else helps the user.
    """

    id: str
    reason: str
    fields: tuple[str, ...] = ()
    detail: str = ""


class Unit(NamedTuple):
    """Records `start` to `stop` of the file or split `name`, about `size` bytes of text.

    `stamp` changes when the data behind the unit changes (size and time of a file, version of a
    data set).
    """

    name: str
    start: int
    stop: int
    size: int
    stamp: str


class DocumentSource(Protocol):
    """Raw text, for preparation: picklable, deterministic in order, read unit by unit.

    Two methods more, for what is known without reading, may be missing: `skipped_files()`, a list
    of what is in no unit (dangling links, hidden files), and `document_ids(unit)`, the ids of the
    documents of a unit, or None.
    """

    def units(self) -> list[Unit]:
        """Return all units in order. Raises ValueError where the source is missing or empty."""
        ...

    def read(self, unit: Unit, /) -> Iterator[Document | Skipped]:
        """Yield the documents of one unit in order, and what had to be skipped."""
        ...


def skipped_files(source: DocumentSource) -> list[Skipped]:
    return getattr(source, "skipped_files", list)()


def document_ids(source: DocumentSource, unit: Unit) -> Iterable[str] | None:
    return getattr(source, "document_ids", lambda _: None)(unit)
