"""What a task's figures mean nothing without: predictions that need no model.

Each baseline takes the pairs (source, target) of train and the sources to predict for.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from lm.evaluation.task_metrics import CJK, words

Pairs = Sequence[tuple[str, str]]

_PIECES = re.compile(rf"[{CJK}]|[^\W_{CJK}]+|[^\w\s]")
_ENDS = re.compile(rf"(?<=[.!?])\s+|(?<=[。！？；])|(?<=[{CJK}][.!?])|\n+")
PHRASE = 3  # words of a phrase at most
MIN_COUNT = 2  # how often a phrase, and it with its translation, must occur


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
    that those inside of numbers and words end none.
    """
    found = (part.strip() for part in _ENDS.split(text))
    return [part for part in found if part]


def lead(pairs: Pairs, sources: Sequence[str]) -> list[str]:
    """The first sentence of the source."""
    del pairs
    return [(sentences(source) or [source])[0] for source in sources]


def overlap(pairs: Pairs, sources: Sequence[str]) -> list[str]:
    """Of the source's sentences after the first (the question), the one that shares most words with
    it, for its length.
    """
    del pairs
    return [_overlap(source) for source in sources]


def _overlap(source: str) -> str:
    first, *rest = sentences(source) or [source]
    asked = set(words(first))
    if not rest:
        return first

    def shared(sentence: str) -> float:
        there = set(words(sentence))
        return len(asked & there) / max(len(there), 1) ** 0.5

    return max(rest, key=shared)


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
    """Translations put together from phrases.

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


def _pieces(text: str) -> list[str]:
    return _PIECES.findall(text.lower())


def _spans(pieces: Sequence[str]) -> set[tuple[str, ...]]:
    """Phrases; a mark of punctuation is one by itself."""
    spans = {
        tuple(pieces[i : i + n]) for n in range(1, PHRASE + 1) for i in range(len(pieces) - n + 1)
    }
    return {span for span in spans if len(span) == 1 or all(x[0].isalnum() for x in span)}


def _phrases(pairs: Pairs) -> dict[tuple[str, ...], tuple[str, ...]]:
    """{phrase of the source: the one of the target that goes with it}."""
    split = [(_spans(_pieces(s)), _spans(_pieces(t))) for s, t in pairs]
    ours = Counter(span for spans, _ in split for span in spans)
    theirs = Counter(span for _, spans in split for span in spans)
    both: Counter = Counter()
    for spans, others in split:
        often = [span for span in others if theirs[span] >= MIN_COUNT]
        both.update((span, other) for span in spans if ours[span] >= MIN_COUNT for other in often)
    best: dict[tuple[str, ...], tuple[float, int, tuple[str, ...]]] = {}
    for (span, other), count in both.items():
        if count >= MIN_COUNT:
            dice = 2 * count / (ours[span] + theirs[other])
            best[span] = max(best.get(span, (0.0, 0, ())), (dice, len(other), other))
    return {span: other for span, (_, _, other) in best.items()}


def _translate(source: str, table: dict[tuple[str, ...], tuple[str, ...]]) -> str:
    pieces, found = _pieces(source), []
    while pieces:
        size = next((n for n in range(PHRASE, 0, -1) if tuple(pieces[:n]) in table), 0)
        found += table[tuple(pieces[:size])] if size else pieces[:1]
        del pieces[: max(size, 1)]
    return _join(found)


def _join(pieces: Sequence[str]) -> str:
    """Words with spaces between them, none beside Chinese characters and before punctuation."""
    text = " ".join(pieces)
    text = re.sub(rf"(?<=[{CJK}]) (?=\S)|(?<=\S) (?=[{CJK}])", "", text)
    return re.sub(r" (?=[^\w\s])", "", text)


BASELINES: dict[str, Callable[[Pairs, Sequence[str]], list[str]]] = {
    "copy": copy,
    "lead": lead,
    "overlap": overlap,
    "majority": majority,
    "lookup": lookup,
    "nearest": nearest,
}
NEED_TRAIN = ("majority", "lookup", "nearest")
# Those that say something beside each of the metrics.
OF_METRIC = {
    "bleu": ("copy", "lookup", "nearest"),
    "rouge": ("copy", "lead", "nearest"),
    "answers": ("majority", "overlap", "nearest"),
    "classes": ("majority", "nearest"),
}
