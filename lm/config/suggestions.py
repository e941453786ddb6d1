"""Suggestions for misspelled words and config keys, for errors."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Set

_ALIASES = {"name": {"kind"}, "kind": {"name"}}  # components have names, other choices kinds


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the word of `known` that is most similar, if any is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def closest_path(key: str, known: Set[str], section: str, paths: Iterable[str]) -> str | None:
    """The path that an unknown `key` of a section most likely stands for.

    It is one of the section's own keys `known`, else one of the config's `paths` whose last word,
    or the initials of that (lr), are similar; first those that share most sections with `section`.
    """
    if close := difflib.get_close_matches(key, known, n=1) or known & _ALIASES.get(key, set()):
        return f"{section}.{next(iter(close))}"
    by_word: dict[str, str] = {}
    for path in sorted(paths, key=lambda path: -_num_shared_sections(path, section)):
        word = path.rsplit(".", 1)[-1]
        by_word.setdefault(word, path)
        if "_" in word:
            by_word.setdefault("".join(part[:1] for part in word.split("_")), path)
    close = difflib.get_close_matches(key, by_word, n=1, cutoff=0.8)
    found = by_word[close[0]] if close else None
    return None if found == f"{section}.{key}" else found  # a key of another component


def _num_shared_sections(a: str, b: str) -> int:
    pairs = zip(a.split("."), b.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
