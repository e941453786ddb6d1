"""BLiMP (arXiv:1912.00582): a quick probe of grammar by minimal pairs of English sentences.

A model passes a pair if it gives the acceptable sentence a higher probability than the other one,
both whole and after bos. There are 67 paradigms of 1,000 pairs, in 12 phenomena; the published
overall accuracy is the mean over paradigms. (The task of lm-eval downloads its data, counts a tie
as passed, and has neither phenomena nor the published figures.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance

from lm.generation.score import Report, Scorer

# The files give these two paradigms a term of their own; the paper and its results don't.
MERGED = {"s-selection": "argument_structure"}


@dataclasses.dataclass(frozen=True)
class Pair:
    paradigm: str
    phenomenon: str
    good: str
    bad: str


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Shares of pairs that a model passes; those of a phenomenon and of all are means of
    paradigms. errors: the standard errors of phenomena and of `overall`, where every paradigm has
    two pairs.
    """

    paradigms: Mapping[str, float]
    phenomena: Mapping[str, float]
    overall: float
    pairs: int
    errors: Mapping[str, float]


def read(path: str, *, limit: int | None = None) -> list[Pair]:
    """The pairs of BLiMP.zip, or of a folder with its .jsonl files: the first `limit` of each
    paradigm.

    Raises:
        ValueError: there are no such files, or a line is no pair.
    """
    pairs = []
    for name, text in _files(path):
        for number, line in enumerate(text.rstrip("\n").split("\n")[:limit], 1):
            try:
                x = json.loads(line)
                pair = [x[n] for n in ("UID", "linguistics_term", "sentence_good", "sentence_bad")]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, {name}, line {number}: not a pair of BLiMP") from error
            pair[1] = MERGED.get(pair[1], pair[1])
            pairs.append(Pair(*pair))
    if not pairs:
        raise ValueError(f"{path} holds no .jsonl files of BLiMP")
    return pairs


def _files(path: str) -> list[tuple[str, str]]:
    """(name, text) of every .jsonl file, by name."""
    if Path(path).is_dir():
        return [(file.name, file.read_text()) for file in sorted(Path(path).glob("**/*.jsonl"))]
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder nor a zip file")
    with zipfile.ZipFile(path) as archive:
        # macOS adds metadata of files, __MACOSX/._name, to its archives
        names = sorted(n for n in archive.namelist() if n.endswith(".jsonl") and "/._" not in n)
        return [(name, archive.read(name).decode()) for name in names]


def evaluate(
    scorer: Scorer,
    pairs: Sequence[Pair],
    *,
    report: Report = lambda done, count: None,
) -> Accuracy:
    """The accuracy on pairs. report: called with sentences done, and their count."""
    return accuracy(pairs, outcomes(scorer, pairs, report=report))


def outcomes(
    scorer: Scorer, pairs: Sequence[Pair], *, report: Report = lambda done, count: None
) -> list[float]:
    """1 for a pair that is passed, 0 for another one, and a half where the probabilities are equal.

    report: called with sentences done, and their count.
    """
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    sums = [score.logprob for score in scorer.rolling(texts, report=report)]
    scores = zip(sums[::2], sums[1::2], strict=True)
    return [0.5 if good == bad else float(good > bad) for good, bad in scores]


def accuracy(pairs: Sequence[Pair], outcomes: Sequence[float]) -> Accuracy:
    """The accuracy of the outcomes of pairs."""
    passed: dict[tuple[str, str], list[float]] = {}
    for pair, outcome in zip(pairs, outcomes, strict=True):
        passed.setdefault((pair.phenomenon, pair.paradigm), []).append(outcome)
    paradigms = {name: fmean(own) for (_, name), own in sorted(passed.items())}
    of_term = {
        term: [own for (other, _), own in passed.items() if other == term]
        for term in sorted({term for term, _ in passed})
    }
    phenomena = {term: fmean(map(fmean, own)) for term, own in of_term.items()}
    groups = of_term | {"overall": [*passed.values()]}
    errors = {n: _error(own) for n, own in groups.items() if min(map(len, own)) > 1}
    return Accuracy(paradigms, phenomena, fmean(paradigms.values()), len(pairs), errors)


def _error(paradigms: Sequence[Sequence[float]]) -> float:
    """The standard error of the mean of the means of paradigms, each a sample by itself."""
    return math.sqrt(sum(variance(own) / len(own) for own in paradigms)) / len(paradigms)


def read_published(path: str) -> dict[str, dict[str, float]]:
    """{model: {phenomenon, or overall: accuracy}} of the authors' models_summary.jsonl."""
    found: dict[str, dict[str, float]] = {}
    for line in Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"):
        row = json.loads(line)
        if row["UID"] == "overall":
            for name, value in row.items():
                if isinstance(value, float):
                    found.setdefault(name, {})[row["linguistics_term"]] = value
    return found


def table(accuracy: Accuracy, published: Mapping[str, Mapping[str, float]]) -> str:
    """A table of accuracies in percent by phenomenon, beside those of other models."""
    rows = [*accuracy.phenomena.items(), ("overall", accuracy.overall)]
    width = max(len(name) for name, _ in rows)
    lines = [" ".join([" " * width, f"{'this':>6}", *(f"{name:>6}" for name in published)])]
    for name, value in rows:
        others = [f"{100 * p[name]:6.1f}" if name in p else " " * 6 for p in published.values()]
        lines.append(" ".join([f"{name:<{width}}", f"{100 * value:6.1f}", *others]))
    return "\n".join(lines)
