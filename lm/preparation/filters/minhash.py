"""MinHash signatures of documents, for near-duplicates (Broder 1997).

Two documents with the Jaccard similarity J of their sets of n-grams agree in one band with the
probability J**rows, and in any with 1 - (1 - J**rows)**bands: 0.975 at J = 0.8, 0.70 at 0.7, 0.08
at 0.5 and 0.001 at 0.3 with the numbers below.

A document is dropped where an earlier one has the same key in any band. This rule needs no step
over all pairs: each key is looked at by itself. (Connected components would drop also the last of
three documents in a chain, whose similar neighbour is dropped itself.)
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lm.config.fields import check_values, field
from lm.preparation.filters.ngrams import mix, ngram_hashes, token_hashes

_BLOCK = 1 << 9  # n-grams whose hashes are in memory at a time


@dataclass(frozen=True)
class MinHash:
    """Signature of a text: one key per band, a pure function of the text."""

    bands: int = field(20, "keys of a document; similar documents agree in one of them", ge=1)
    rows: int = field(8, "minima of hashes in one key", ge=1)
    ngram: int = field(
        5, "words, or characters in a script without spaces, that are compared", ge=1
    )
    seed: int = field(0, "of the hash functions", ge=0)

    def __post_init__(self):
        check_values(self, "--near-duplicates")

    @cached_property
    def _functions(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, 0x3A5])
        shape = (self.bands * self.rows, 1)
        factors, terms = rng.integers(0, 2**64, (2, *shape), np.uint64)
        return factors | np.uint64(1), terms

    def keys(self, text: str) -> np.ndarray:
        """Return the keys of a text, uint64 [bands]; none, [0], where it has no words."""
        tokens = token_hashes(text)
        if not len(tokens):
            return tokens
        # a text of fewer words is compared as a whole
        ngrams = ngram_hashes(tokens, min(self.ngram, len(tokens)))
        factors, terms = self._functions
        minima = np.full(len(factors), 2**64 - 1, np.uint64)
        for start in range(0, len(ngrams), _BLOCK):
            hashes = ngrams[start : start + _BLOCK] * factors + terms  # [bands * rows, n]
            np.minimum(minima, hashes.min(axis=1), out=minima)
        keys = np.arange(self.bands, dtype=np.uint64)
        for row in minima.reshape(self.bands, self.rows).T:
            keys = mix(keys + row)
        return keys
