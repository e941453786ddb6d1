"""The two contracts of a source: documents for preparation, rows for training.

A document source is split into units. A unit is the smallest piece that one worker reads; the list
of units is a pure function of the data (never of the number of workers or machines), and reading
the units in order gives the documents in order. That is what makes preparation parallel, resumable
and the same everywhere.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np


class Document(NamedTuple):
    """One document: an id that is the same on every machine, and its text by field."""

    id: str
    fields: dict[str, str]


class Skipped(NamedTuple):
    """A record that is no document: counted by its reason, never dropped in silence.

    fields: of a record without a wanted field, those that it has.
    detail: what helps to understand the first ones, if there is more to say.
    """

    id: str
    reason: str
    fields: tuple[str, ...] = ()
    detail: str = ""


class Unit(NamedTuple):
    """A piece of a source: records `start` to `stop` of `name`, about `size` bytes of text.

    `stamp` changes when the data behind the unit changes (size and time of a file, version of a
    data set).
    """

    name: str
    start: int
    stop: int
    size: int
    stamp: str


class DocumentSource(Protocol):
    """Raw text, for preparation: picklable, deterministic in order, read unit by unit."""

    def units(self) -> list[Unit]:
        """Returns all units in order. Raises ValueError where the source is missing or empty."""
        ...

    def read(self, unit: Unit, /) -> Iterator[Document | Skipped]:
        """Yields the documents of one unit in order, and what had to be skipped."""
        ...


@runtime_checkable
class ListedSource(Protocol):
    """A source of which more is known before it is read."""

    def skipped_files(self) -> list[Skipped]:
        """Returns what lies among the data and is in no unit: links to nothing, hidden files."""
        ...

    def document_ids(self, unit: Unit, /) -> Iterable[str] | None:
        """Returns the ids of the documents of a unit, None where only reading it would tell."""
        ...


@dataclass(frozen=True)
class RowLayout:
    """What an objective wants rows to be.

    fields: of the store, in the order in which the parts of a document stand.
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

    ids: int32 [B, T], 0 where there is padding.
    segments: int32 [B, T], 1, 2, ... in every row, 0 where there is padding.
    positions: int32 [B, T], restart at 0 in every segment, also in a document continued from the
    row before; where fields lie apart, in every field.
    previous: int32 [B, T], where a segment begins inside its document (the rest of one that was
    cut) the token just before it in the document, else -1.
    fields: int32 [B, T], which field of its document a token is from; None where there is one.
    """

    ids: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    previous: np.ndarray
    fields: np.ndarray | None = None


class Source(Protocol):
    """Rows for training, by index; pure and safe to call from several threads."""

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> Rows:
        """Returns the rows with the indices `rows`: int64 [B]."""
        ...
