"""Records of a task: the sources and references that predictions are measured with."""

from __future__ import annotations

from collections.abc import Sequence

from lm.preparation import parts
from lm.preparation.corpus import Corpus
from lm.preparation.skip_report import SkipReport
from lm.sources import Document


def read(corpus: Corpus, names: Sequence[str]) -> tuple[list[Document], str]:
    """(the records, what was skipped or "").

    Raises:
        ValueError: one of the fields `names` has no column, or there are no records, or more than
            `corpus.max_loss` are lost.
    """
    if missing := set(names) - set(corpus.columns):
        raise ValueError(
            f"--field must say where these fields come from: {', '.join(sorted(missing))}"
        )
    records, report = [], SkipReport()
    for item in parts.read_all(corpus):
        if isinstance(item, Document):
            records.append(item)
        else:
            report.add(item)
    if not records:
        raise ValueError(f"{', '.join(corpus.data)}: no records")
    report.check(len(records), max_loss=corpus.max_loss)
    return records, report.describe() if report.counts else ""


def references(records: Sequence[Document], target: str, lines: str) -> list[list[str]]:
    """The references of every record: the lines of its field `lines`, or, where that is "", its
    target.
    """
    return [r.fields[lines].split("\n") if lines else [r.fields[target]] for r in records]
