"""Word vectors from a text file, for the rows of an embedding: GloVe's format (`word v1 ... vD` in
every line) and word2vec's (the same after a line with the numbers of words and of values).
"""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from collections.abc import Container, Iterable, Iterator
from typing import IO, cast

import numpy as np

from lm.storage.paths import expand_path
from lm.tokenizers.tokenizer import Tokenizer

PATH = "config.init.word_vectors"


@dataclasses.dataclass(frozen=True)
class WordVectors:
    """The vectors of those ids of a vocabulary whose text is a word of a file."""

    ids: np.ndarray  # int64 [n], ascending
    vectors: np.ndarray  # float32 [n, D]
    num_words: int  # in the file
    vocab_size: int

    def describe(self) -> str:
        share = len(self.ids) / self.vocab_size
        return (
            f"{len(self.ids):,} of {self.vocab_size:,} vocabulary entries ({share:.1%}) begin with "
            f"one of {self.num_words:,} word vectors"
        )


def load(name: str, tokenizer: Tokenizer, embed_dim: int) -> WordVectors:
    """Return the vectors of the file `name` (.gz: compressed; local or `gs://`) for a vocabulary.

    A word belongs to every id whose text is the word, without white space around it; case counts.
    Of repeated words the first counts. Vectors are not scaled: GloVe's entries have a deviation of
    about 0.4.

    Raises ValueError where vectors are not `embed_dim` wide, a line cannot be read, or no word is
    in the vocabulary.
    """
    from lm.storage.epaths import StoragePath  # costs 0.1 s: only where a file is read

    wanted: dict[bytes, list[int]] = {}
    for i in range(tokenizer.vocab_size):
        if word := tokenizer.decode_bytes([i]).strip():
            wanted.setdefault(word, []).append(i)
    found: dict[int, np.ndarray] = {}
    num_words = 0
    path = StoragePath(expand_path(name, PATH))
    if not path.is_file():
        raise ValueError(f"{PATH} ({name}): no such file")
    try:
        with path.open("rb") as file:
            packed = cast("IO[bytes]", file)
            stream = gzip.GzipFile(fileobj=packed) if name.endswith(".gz") else packed
            for word, vector in _vectors(stream, embed_dim, wanted):
                num_words += 1
                if vector is not None:
                    found |= dict.fromkeys(wanted.pop(word), vector)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{PATH} ({name}): damaged compressed file ({error})") from None
    except ValueError as error:
        raise ValueError(f"{PATH} ({name}): {error}") from None
    if not found:
        raise ValueError(
            f"{PATH} ({name}): none of its {num_words:,} words is in the vocabulary of tokenizer "
            f"{tokenizer.name} ({tokenizer.vocab_size:,})"
        )
    ids = np.sort(np.fromiter(found, np.int64))
    vectors = np.stack([found[i] for i in ids.tolist()])
    return WordVectors(ids, vectors, num_words, tokenizer.vocab_size)


def _vectors(
    stream: Iterable[bytes], embed_dim: int, wanted: Container[bytes]
) -> Iterator[tuple[bytes, np.ndarray | None]]:
    """Yield each word, and its vector if it is wanted; GloVe has words with spaces in them."""
    for number, line in enumerate(stream, start=1):
        word, *values = line.rstrip().rsplit(b" ", embed_dim)
        if number == 1:
            header = line.split()
            is_header = len(header) == 2 and all(part.isdigit() for part in header)
            width = int(header[1]) if is_header else len(header) - 1
            if width != embed_dim:
                raise ValueError(
                    f"it has vectors of {width} values; config.model.embed_dim is {embed_dim}"
                )
            if is_header:
                continue
        if len(values) != embed_dim:
            raise ValueError(
                f"line {number}: {len(values)} values after the word; config.model.embed_dim is "
                f"{embed_dim}"
            )
        vector = None
        if word in wanted:
            try:
                vector = np.array(values).astype(np.float32)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not np.isfinite(vector).all():
                raise ValueError(f"line {number}: not all values are finite")
        yield word, vector
