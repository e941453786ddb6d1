"""Hashed n-grams of a text, for near-duplicates and decontamination.

A token is a run of letters, digits and marks, or one character of a script that is written without
spaces (Chinese, Japanese, Thai, ...). Case, width, punctuation and white space make no difference.
Hashes are 64 bits, the same on every machine.
"""

import functools
import unicodedata
from collections.abc import Iterator

import numpy as np

_SEPARATOR, _OF_WORD, _BY_ITSELF = 0, 1, 2  # kinds of characters
_WITHOUT_SPACES = (  # first and last characters of blocks
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x30FF),  # ideographic marks, Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han, as all below
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_BLOCK = 1 << 18  # characters that are hashed at a time: bounds the memory of a long text
_BASE, _STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd


@functools.cache
def _kinds() -> np.ndarray:
    """Return the kind of every code point, uint8."""
    letters = [unicodedata.category(chr(i))[0] in "LNM" for i in range(0x110000)]
    kinds = np.array(letters, np.uint8)
    for first, last in _WITHOUT_SPACES:
        kinds[first : last + 1] *= _BY_ITSELF
    return kinds


def mix(x: np.ndarray) -> np.ndarray:
    """Return uint64 of the shape of `x`, each bit a function of all bits (splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def token_hashes(text: str) -> np.ndarray:
    """Return a hash of each token: uint64 [n]."""
    hashes = [_hash_block(block) for block in _blocks(text)]
    return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)


def _blocks(text: str) -> Iterator[str]:
    """Yield the text in blocks that end between tokens."""
    kinds = _kinds()
    start = 0
    while start < len(text):
        end = min(start + _BLOCK, len(text))
        while end < len(text) and kinds[ord(text[end - 1])] == kinds[ord(text[end])] == _OF_WORD:
            end += 1
        yield text[start:end]
        start = end


def _hash_block(text: str) -> np.ndarray:
    text = unicodedata.normalize("NFKC", text).casefold()
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
    kinds = _kinds()[codes]
    is_start = kinds == _BY_ITSELF
    is_start |= (kinds == _OF_WORD) & (np.append(_SEPARATOR, kinds[:-1]) != _OF_WORD)
    is_kept = kinds != _SEPARATOR
    codes, starts = codes[is_kept].astype(np.uint64), np.flatnonzero(is_start[is_kept])
    if not len(starts):
        return np.zeros(0, np.uint64)
    lengths = np.diff(starts, append=len(codes))
    powers = np.cumprod(np.full(lengths.max(), _BASE))
    offsets = np.arange(len(codes)) - np.repeat(starts, lengths)
    return mix(np.add.reduceat((codes + np.uint64(1)) * powers[offsets], starts))


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """Return a hash of each n tokens in a row: uint64 [max(len(tokens) - n + 1, 0)]."""
    count = max(len(tokens) - n + 1, 0)
    hashes = np.full(count, n, np.uint64)
    for i in range(n):
        hashes = hashes * _STEP + tokens[i : i + count]
    return mix(hashes)
