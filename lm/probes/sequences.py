"""Sequences of tokens drawn from a store, as a model met them in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.data.tokens import TokenStore
from lm.tokenizers.tokenizer import Tokenizer

_READ = 1 << 20  # tokens that `occurrences` reads at once
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_DRAWS = 64  # positions drawn for each sequence that is wanted: not every one will do


class StoredSequence(NamedTuple):
    """Tokens of one document, without its eos.

    document: its number in the store. offset: of the first of `ids` in it. before: the ids that
    precede them; a text's start where nothing does.
    """

    document: int
    offset: int
    before: np.ndarray
    ids: np.ndarray


class _Range(NamedTuple):
    """Tokens `offset` to `stop` of a document that begins at the store's token `begin`, with those
    from `first` before them.
    """

    document: int
    begin: int
    first: int
    offset: int
    stop: int


def open_store(path: str, tokenizer: Tokenizer, flag: str) -> TokenStore:
    """The token store at a path. Raises ValueError where it is none, or of another tokenizer."""
    if path.startswith("synthetic:"):
        raise ValueError(f"{path} is no token store: give one with {flag}")
    store = TokenStore.open(path)
    store.check_tokenizer(tokenizer)
    return store


def draw_blocks(
    store: TokenStore, tokenizer: Tokenizer, *, length: int, count: int, seed: int
) -> list[StoredSequence]:
    """At most `count` different blocks, drawn in proportion to their tokens, each after the token
    before it: documents are cut every `length` tokens, the last block of one may be shorter.
    """
    found: dict[tuple[int, int], _Range] = {}
    for document, begin, position, size in _draw(store, count, seed):
        offset = position // length * length
        stop = min(offset + length, size)
        if len(tokenizer.start_ids) or stop > 1:  # else there is nothing to predict
            found[document, offset] = _Range(document, begin, max(offset - 1, 0), offset, stop)
    return _read(store, tokenizer, [*found.values()][:count])


def draw_continuations(
    store: TokenStore, tokenizer: Tokenizer, *, prompt: int, length: int, count: int, seed: int
) -> list[StoredSequence]:
    """At most `count` different sequences of `length` tokens, each with the `prompt` tokens of its
    document before it.

    Raises:
        ValueError: no document that is drawn is long enough.
    """
    found: dict[tuple[int, int], _Range] = {}
    for document, begin, offset, size in _draw(store, count, seed):
        if prompt <= offset <= size - length:
            fields = document, begin, offset - prompt, offset, offset + length
            found[document, offset] = _Range(*fields)
    if not found:
        raise ValueError(
            f"{store.path}: no document was found with {prompt} tokens and {length} after them; "
            "give shorter --prompt-lengths and --continuation, or another store by --data"
        )
    return _read(store, tokenizer, [*found.values()][:count])


def _draw(store: TokenStore, count: int, seed: int) -> list[tuple[int, int, int, int]]:
    """(document, its first token in the store, offset in it, its tokens without eos) of random
    positions of the store.
    """
    if not store.num_tokens:
        return []
    positions = np.random.default_rng(seed).integers(0, store.num_tokens, _DRAWS * count)
    documents = store.offsets.find(positions)
    begin, end = store.offsets[documents], store.offsets[documents + 1]
    inside = positions < end - 1
    columns = documents, begin, positions - begin, end - 1 - begin
    return [*zip(*(x[inside].tolist() for x in columns), strict=True)]


def _read(
    store: TokenStore, tokenizer: Tokenizer, ranges: Sequence[_Range]
) -> list[StoredSequence]:
    start = np.array(tokenizer.start_ids, np.int32)
    tokens = store.read_ranges(
        [r.begin + r.first for r in ranges], [r.begin + r.stop for r in ranges]
    )
    found = []
    for r, ids in zip(ranges, tokens, strict=True):
        cut, ids = r.offset - r.first, ids.astype(np.int32)
        before = ids[:cut] if r.first else np.concatenate([start, ids[:cut]])
        found.append(StoredSequence(r.document, r.offset, before, ids[cut:]))
    return found


def occurrences(store: TokenStore, sequences: np.ndarray) -> np.ndarray:
    """The number of places of a store with each of `sequences`, int [n, L] -> int64 [n], from one
    reading of it and a hash of every window.
    """
    length = sequences.shape[1]
    hashes = np.concatenate([_hashes(x, length) for x in sequences])
    known, which = np.unique(hashes, return_inverse=True)
    found = np.zeros(len(known), np.int64)
    for start in range(0, store.num_tokens - length + 1, _READ):
        stop = min(start + _READ + length - 1, store.num_tokens)
        hashes = _hashes(store.tokens(start, stop), length)
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        np.add.at(found, at[known[at] == hashes], 1)
    return found[which]


def _hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """uint64 [n - length + 1]: of each window, the sum of mix(ids[i + j]) * factor^j modulo 2^64.

    It is the difference of two prefix sums of mix(ids[i]) * factor^i, divided by factor^i.
    """
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    powers, inverses = (_powers(x, len(ids)) for x in (_FACTOR, pow(_FACTOR, -1, 1 << 64)))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * powers, dtype=np.uint64)])
    return (sums[length:] - sums[:-length]) * inverses[: len(ids) - length + 1]


def _powers(base: int, count: int) -> np.ndarray:
    """uint64 [count]: 1, base, base^2, ... modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)
