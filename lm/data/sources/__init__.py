"""The contracts of a source: documents for preparation, rows for training.

A document source is split into units, each read by one worker. The list of units is a pure function
of the data (never of the number of workers or machines), and reading the units in order gives the
documents in order: so preparation is parallel, resumable and the same everywhere.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class Document(NamedTuple):
    """One document: an id that is the same on every machine, and its text by field.

    masked: counts of what filters have masked in it, by kind.
    """

    id: str
    fields: dict[str, str]
    masked: tuple[tuple[str, int], ...] = ()


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


@dataclass(frozen=True)
class RowLayout:
    """The rows that an objective takes.

    fields: of the store, in the order in which they follow each other in a document.
    lengths: one number: rows of so many tokens, in which the fields of a document follow each
      other. As many numbers as fields: each field has so many tokens of the row to itself, and a
      document has the same segment number in all of them.
    """

    lengths: tuple[int, ...]
    fields: tuple[str, ...] = ("text",)

    @property
    def length(self) -> int:
        """Tokens of a row, T of `Rows`."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Rows:
    """B rows of T tokens, packed from documents.

    ids: int32 [B, T], 0 in padding.
    segments: int32 [B, T], 1, 2, ... in every row, 0 in padding.
    positions: int32 [B, T], restart at 0 in every segment, also in the rest of a document that was
      cut; where fields have their own parts of the row, in every field.
    previous: int32 [B, T], the token before the cut where the rest of a document begins, else -1.
    fields: int32 [B, T], the number of each token's field; None where there is one.
    """

    ids: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    previous: np.ndarray
    fields: np.ndarray | None = None


class Span(NamedTuple):
    """A part of a row: tokens `start` to `stop` of a document, of all its fields together."""

    document: int
    id: str
    start: int
    stop: int


class RowSource(Protocol):
    """Rows for training, by index; pure and safe to call from several threads.

    bytes_per_token: UTF-8 bytes of the text per token, eos included; None where a row is not all
    of the text. truncation_summary: the documents of the store that are cut or dropped; "" if none
    is.
    """

    @property
    def bytes_per_token(self) -> float | None: ...

    @property
    def truncation_summary(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> Rows:
        """Return the rows with the indices `rows`: int64 [B]."""
        ...

    def documents(self, rows: np.ndarray) -> list[list[Span]]:
        """Return for each row the documents that it holds, in the order of its segments."""
        ...
