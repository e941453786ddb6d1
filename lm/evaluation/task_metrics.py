"""Metrics of predicted texts and labels: those of sacrebleu, rouge-score and scikit-learn, and
SQuAD's exact match and F1.

All figures are percentages. Every function takes predictions and, for each of them, one reference
or several, of which the best counts.
"""

from __future__ import annotations

import itertools
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace

# Chinese characters and kana, without spaces between words: each is a word.
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CJK = re.compile(f"([{CJK}])")
_WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
_PUNCTUATION = re.compile(
    f"[{re.escape(string.punctuation)}\u3000-\u303f\uff01-\uff0f\uff1a-\uff20]"
)
_ARTICLE = re.compile(r"\b(a|an|the)\b")

References = Sequence[Sequence[str]]


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, each Chinese character by itself."""
    return _WORD.findall(text.lower())


def normalize(text: str) -> str:
    """SQuAD's normal form of an answer (arXiv:1606.05250): lower case without punctuation, English
    articles and extra spaces; each Chinese character is a word.
    """
    text = _ARTICLE.sub(" ", _PUNCTUATION.sub("", text.lower()))
    return " ".join(_CJK.sub(r" \1 ", text).split())


def exact_match(prediction: str, reference: str) -> float:
    return float(normalize(prediction) == normalize(reference))


def token_f1(prediction: str, reference: str) -> float:
    """The F1 of SQuAD, of the multisets of words of two answers."""
    found, wanted = normalize(prediction).split(), normalize(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def answers(predictions: Sequence[str], references: References) -> dict[str, float]:
    """{EM, F1}: the mean over answers, each beside the reference that fits it best."""
    pairs = _pairs(predictions, references)
    return {
        name: 100 * sum(max(score(p, r) for r in refs) for p, refs in pairs) / len(pairs)
        for name, score in (("EM", exact_match), ("F1", token_f1))
    }


def bleu(predictions: Sequence[str], references: References) -> dict[str, float]:
    """{BLEU, chrF} of the corpus. BLEU is of characters for Chinese (`tok:zh`), else of words."""
    from sacrebleu import corpus_bleu, corpus_chrf

    pairs = _pairs(predictions, references)
    is_chinese = any(_CJK.search(text) for _, refs in pairs for text in refs)
    # the first reference of every record, the second ones, ...; None where a record has fewer
    streams = [list(stream) for stream in itertools.zip_longest(*(refs for _, refs in pairs))]
    tokenize = "zh" if is_chinese else "13a"
    return {
        "BLEU": corpus_bleu(predictions, streams, tokenize=tokenize).score,
        "chrF": corpus_chrf(predictions, streams).score,
    }


def rouge(predictions: Sequence[str], references: References) -> dict[str, float]:
    """{ROUGE-1, ROUGE-2, ROUGE-L}: means of F, by `words` and without stemming; of Chinese they are
    by characters.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    scorer = RougeScorer(list(names), tokenizer=SimpleNamespace(tokenize=words))
    pairs = _pairs(predictions, references)
    scores = [scorer.score_multi(list(refs), prediction) for prediction, refs in pairs]
    return {
        shown: 100 * sum(score[name].fmeasure for score in scores) / len(scores)
        for name, shown in names.items()
    }


def classes(predictions: Sequence[str], references: References) -> dict[str, float]:
    """{accuracy, balanced, macro-F1}. The last two weigh every class of the references alike: the
    mean recall, and the mean F1 with 0 for a class that is never predicted.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    pairs = _pairs(predictions, references)
    if any(len(refs) != 1 for _, refs in pairs):
        raise ValueError("a text has one class, and some have several references")
    truth, found = [refs[0] for _, refs in pairs], [p for p, _ in pairs]
    over = {"labels": sorted(set(truth)), "average": "macro", "zero_division": 0}
    _, recall, f1, _ = precision_recall_fscore_support(truth, found, **over)
    accuracy = accuracy_score(truth, found)
    return {"accuracy": 100 * accuracy, "balanced": 100 * recall, "macro-F1": 100 * f1}


Metric = Callable[[Sequence[str], References], dict[str, float]]
METRICS: dict[str, Metric] = {metric.__name__: metric for metric in (bleu, rouge, answers, classes)}
PACKAGES = {"bleu": "sacrebleu", "rouge": "rouge_score", "classes": "sklearn"}  # that they import


def standard_errors(
    metric: Metric, predictions: Sequence[str], references: References, *, groups: int = 20
) -> dict[str, float]:
    """The standard error of every figure by the jackknife (Efron 1982, section 3) that leaves out
    one group of records at a time, every n-th of them; {} of a single record.

    The error of a mean over at most `groups` records is the usual one. Groups, as BLEU of a corpus
    is no mean, and takes long.
    """
    count = min(groups, len(predictions))
    if count < 2:
        return {}
    left = []
    for group in range(count):
        kept = [i for i in range(len(predictions)) if i % count != group]
        left.append(metric([predictions[i] for i in kept], [references[i] for i in kept]))
    return {
        name: ((count - 1) * statistics.pvariance(found[name] for found in left)) ** 0.5
        for name in left[0]
    }


def _pairs(predictions: Sequence[str], references: References) -> list[tuple[str, Sequence[str]]]:
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} records; there must be as many, "
            "and one at least"
        )
    if not all(references):
        raise ValueError("a record has no reference")
    return list(zip(predictions, references, strict=True))
