"""Rules of quality as datatrove has them: Gopher's (Rae et al. 2021), C4's and FineWeb's.

Parameters and their defaults are those of datatrove's classes. C4's rules also remove lines.
"""

from collections.abc import Callable

from lm.preparation import call_flags
from lm.preparation.filters import Filter, each_field, installed

PACKAGES = ("datatrove", "spacy")  # a version may judge otherwise
_CLASSES = {
    "gopher_quality": "GopherQualityFilter",
    "gopher_repetition": "GopherRepetitionFilter",
    "c4": "C4QualityFilter",
    "fineweb": "FineWebQualityFilter",
}


def builder(name: str) -> Callable[..., Filter]:
    """Return the function that builds a filter, with the signature of datatrove's class."""
    step = getattr(installed("datatrove.pipeline.filters", "datatrove"), _CLASSES[name])

    def build(**parameters) -> Filter:
        return _build(name, step(**parameters))

    build.__signature__ = call_flags.signature(step, hidden=("exclusion_writer",))
    return build


def _build(name: str, step) -> Filter:
    from datatrove.data import Document
    from datatrove.utils.text import split_into_sentences

    try:
        split_into_sentences("A sentence.", step.language)  # loads what splits its words
    except ValueError:
        raise ValueError(
            f"--filter={name} language: datatrove knows no {step.language!r}"
        ) from None

    def judge(text: str) -> tuple[str, str]:
        document = Document(text=text, id="")
        result = step.filter(document)
        is_kept, why = result if isinstance(result, tuple) else (result, name)
        return document.text, "" if is_kept else why.removeprefix("gopher_")

    return each_field(name, judge)
