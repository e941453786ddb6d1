"""The contract of rows for training, by index."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


@dataclass(frozen=True)
class RowLayout:
    """The rows that an objective takes.

    fields: of the store, in the order in which they follow each other in a document.
    lengths: one number: rows of so many tokens, in which the fields of a document follow each
      other. As many numbers as fields: each field has so many tokens of the row to itself, and a
      document has the same segment number in all of them.
    image_size: height and width of the picture of every row; None: there are none. With pictures, a
      row is one document.
    num_ids: ids that rows may have, where they are no text; None: those of the tokenizer.
    """

    lengths: tuple[int, ...]
    fields: tuple[str, ...] = ("text",)
    image_size: int | None = None
    num_ids: int | None = None

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
    images: uint8 [B, height, width, 3], the picture of each row's document; 0 in an empty row; None
      where the layout asks for none.
    """

    ids: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    previous: np.ndarray
    fields: np.ndarray | None = None
    images: np.ndarray | None = None


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
