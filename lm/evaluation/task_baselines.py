"""Baselines of tasks: predictions that need no model.

Each baseline takes the pairs (source, target) of train and the sources to predict for.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from lm.evaluation.task_metrics import CJK, words

Pairs = Sequence[tuple[str, str]]

_UNITS = re.compile(rf"[{CJK}]|[^\W_{CJK}]+|[^\w\s]")
_ENDS = re.compile(rf"(?<=[.!?])\s+|(?<=[。！？；])|(?<=[{CJK}][.!?])|\n+")
PHRASE = 3  # words of a phrase at most
MIN_COUNT = 2  # occurrences that a phrase, and it with its translation, must have


def copy(pairs: Pairs, sources: Sequence[str]) -> list[str]:
    """The source itself."""
    del pairs
    return list(sources)


def majority(pairs: Pairs, sources: Sequence[str]) -> list[str]:
    """The target that train has most often (of several the first in order)."""
    counts = Counter(target for _, target in pairs)
    best = min(counts, key=lambda target: (-counts[target], target))
    return [best] * len(sources)


def sentences(text: str) -> list[str]:
    """The sentences of a text. A point ends one before a space or after a Chinese character, so
    that those within numbers and words end none.
    """
    found = (part.strip() for part in _ENDS.split(text))
    return [part for part in found if part]


def lead(pairs: Pairs, sources: Sequence[str]) -> list[str]:
    """The first sentence of the source."""
    del pairs
    return [(sentences(source) or [source])[0] for source in sources]


def overlap(pairs: Pairs, sources: Sequence[str]) -> list[str]:
    """The sentence of the source that shares most words, for its length, with the first one (the
    question).
    """
    del pairs

    def best(source: str) -> str:
        first, *rest = sentences(source) or [source]
        asked = set(words(first))

        def shared(sentence: str) -> float:
            there = set(words(sentence))
            return len(asked & there) / max(len(there), 1) ** 0.5

        return max(rest, key=shared, default=first)

    return [best(source) for source in sources]


def nearest(pairs: Pairs, sources: Sequence[str]) -> list[str]:
    """The target of the source in train that is nearest: by the cosine of TF-IDF over words and
    pairs of words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=_grams)  # pyright: ignore
    known = vectorizer.fit_transform([source for source, _ in pairs])
    found = []
    for start in range(0, len(sources), 256):  # the similarities of one part at a time
        asked = vectorizer.transform(sources[start : start + 256])
        similarity = asked @ known.T
        found += [pairs[int(row.toarray().argmax())][1] for row in similarity]
    return found


def _grams(text: str) -> list[str]:
    single = words(text)
    return single + [" ".join(pair) for pair in itertools.pairwise(single)]


def lookup(pairs: Pairs, sources: Sequence[str]) -> list[str]:
    """Translations composed of phrases.

    A source that train has gets its commonest target. Any other is cut from the left into the
    longest known phrases of up to three words, and each is replaced by the phrase of train's
    targets that goes with it most closely (by Dice's coefficient over sentences); words that none
    goes with are copied.
    """
    whole: dict[str, Counter] = {}
    for source, target in pairs:
        whole.setdefault(source, Counter())[target] += 1
    table = _phrases(pairs)
    return [
        whole[source].most_common(1)[0][0] if source in whole else _translate(source, table)
        for source in sources
    ]


def _units(text: str) -> list[str]:
    return _UNITS.findall(text.lower())


def _spans(units: Sequence[str]) -> set[tuple[str, ...]]:
    """Phrases; a mark of punctuation is one by itself."""
    spans = {
        tuple(units[i : i + n]) for n in range(1, PHRASE + 1) for i in range(len(units) - n + 1)
    }
    return {span for span in spans if len(span) == 1 or all(x[0].isalnum() for x in span)}


def _phrases(pairs: Pairs) -> dict[tuple[str, ...], tuple[str, ...]]:
    """{phrase of the source: the one of the target that goes with it}."""
    split = [(_spans(_units(s)), _spans(_units(t))) for s, t in pairs]
    sources = Counter(span for spans, _ in split for span in spans)
    targets = Counter(span for _, spans in split for span in spans)
    both: Counter = Counter()
    for spans, others in split:
        often = [span for span in others if targets[span] >= MIN_COUNT]
        both.update(
            (span, other) for span in spans if sources[span] >= MIN_COUNT for other in often
        )
    best: dict[tuple[str, ...], tuple[float, int, tuple[str, ...]]] = {}
    for (span, other), count in both.items():
        if count >= MIN_COUNT:
            dice = 2 * count / (sources[span] + targets[other])
            best[span] = max(best.get(span, (0.0, 0, ())), (dice, len(other), other))
    return {span: other for span, (_, _, other) in best.items()}


def _translate(source: str, table: dict[tuple[str, ...], tuple[str, ...]]) -> str:
    units, found = _units(source), []
    while units:
        size = next((n for n in range(PHRASE, 0, -1) if tuple(units[:n]) in table), 0)
        found += table[tuple(units[:size])] if size else units[:1]
        del units[: max(size, 1)]
    return _join(found)


def _join(units: Sequence[str]) -> str:
    """Words with spaces between them, none beside Chinese characters and before punctuation."""
    text = " ".join(units)
    text = re.sub(rf"(?<=[{CJK}]) (?=\S)|(?<=\S) (?=[{CJK}])", "", text)
    return re.sub(r" (?=[^\w\s])", "", text)


BASELINES: dict[str, Callable[[Pairs, Sequence[str]], list[str]]] = {
    baseline.__name__: baseline for baseline in (copy, lead, overlap, majority, lookup, nearest)
}
NEED_TRAIN = ("majority", "lookup", "nearest")
# The baselines that are informative beside each metric.
OF_METRIC = {
    "bleu": ("copy", "lookup", "nearest"),
    "rouge": ("copy", "lead", "nearest"),
    "answers": ("majority", "overlap", "nearest"),
    "classes": ("majority", "nearest"),
}
