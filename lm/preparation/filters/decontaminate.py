"""Decontamination: documents that share 13 words in a row with an item of an evaluation set.

Words are those of `ngrams.py`: case, punctuation and layout make no difference. As in the report on
GPT-3 (Brown et al. 2020, appendix C), an item of fewer than 13 words is looked for as a whole if it
has 8 at least; a shorter one is found in too much that is innocent, and is not looked for.
"""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lm.preparation.filters import Filter
from lm.preparation.filters.ngrams import ngram_hashes, token_hashes
from lm.sources import Document, Skipped

Item = tuple[str, str]  # evaluation set, id of the item in it


class Match(NamedTuple):
    """The first n-gram of a text that an item of an evaluation set has, too.

    position: of its first word in the text, from 0. num_matches: n-grams of the text that match.
    """

    item: Item
    n: int
    ngram_hash: int
    position: int
    num_matches: int


class Index:
    """The n-grams of items: sorted hashes, and the first item that has each.

    num_short: items of fewer than `min_words`, which are not looked for.
    """

    def __init__(self, items: Iterable[tuple[Item, str]], *, n: int, min_words: int):
        self.items: list[Item] = []
        self.num_short = 0
        found: dict[int, list[np.ndarray]] = {}  # n -> hashes, then numbers of their items
        for item, text in items:
            tokens = token_hashes(text)
            if len(tokens) < min_words:
                self.num_short += 1
                continue
            hashes = ngram_hashes(tokens, min(n, len(tokens)))
            numbers = np.full(len(hashes), len(self.items), np.uint64)
            found.setdefault(min(n, len(tokens)), []).append(np.stack([hashes, numbers]))
            self.items.append(item)
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for size, parts in sorted(found.items(), reverse=True):
            hashes, numbers = np.concatenate(parts, axis=1)
            unique, firsts = np.unique(hashes, return_index=True)
            self._tables[size] = unique, numbers[firsts]

    def find(self, text: str) -> Match | None:
        """Return the first match of the longest n-grams, or None."""
        tokens = token_hashes(text)
        for n, (known, numbers) in self._tables.items():
            hashes = ngram_hashes(tokens, n)
            rows = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            if len(matches := np.flatnonzero(known[rows] == hashes)):
                i = int(matches[0])
                item = self.items[int(numbers[rows[i]])]
                return Match(item, n, int(hashes[i]), i, len(matches))
        return None

    def digest(self) -> str:
        """Return a hash of the n-grams."""
        content = hashlib.sha256()
        for n, (known, _) in self._tables.items():
            content.update(n.to_bytes(8, "little") + known.tobytes())
        return content.hexdigest()


class Decontamination:
    """Filter that drops a document where a field matches, as decontaminate/EVALUATION-SET."""

    def __init__(self, index: Index):
        self.index, self.inputs = index, index.digest()

    def __call__(self, document: Document) -> Document | Skipped:
        for name, text in document.fields.items():
            if match := self.index.find(text):
                (evaluation_set, item), n, ngram, position, count = match
                detail = (
                    f"{n}-gram {ngram:016x} at word {position} of {name} is in {item}; {count} "
                    "match"
                )
                return Skipped(document.id, f"decontaminate/{evaluation_set}", detail=detail)
        return document


def build(*, data: str = "", columns: str = "text", n: int = 13, min_words: int = 8) -> Filter:
    """Return the filter of the evaluation sets `data`.

    data: files, folders or other sources as --data takes them, separated by commas. columns: those
    of an item, separated by commas, which follow each other (question,answer). n: words in a row.
    min_words: of an item; an item between `min_words` and `n` is looked for as a whole.
    """
    from lm.preparation.corpus import Corpus
    from lm.preparation.parts import read_all

    flag = "--filter=decontaminate"
    if not data:
        raise ValueError(f"{flag}: name the evaluation sets: '{flag[9:]} data=FILE,FILE'")
    if not 0 < min_words <= n:
        raise ValueError(f"{flag}: min_words ({min_words}) must be in [1, n ({n})]")
    fields = {column: column for column in columns.split(",")}

    def items() -> Iterable[tuple[Item, str]]:
        for spec in data.split(","):
            documents = read_all(Corpus((spec,), fields, validation_fraction=0))
            found = [item for item in documents if isinstance(item, Document)]
            if not found:
                raise ValueError(f"{flag} data={spec} has no item with {columns}")
            for document in found:
                yield (spec, document.id), "\n".join(document.fields.values())

    index = Index(items(), n=n, min_words=min_words)
    if not index.items:
        raise ValueError(f"{flag}: no item of data={data} has min_words ({min_words}) words")
    return Decontamination(index)
