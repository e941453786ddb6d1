"""Filters of documents, by name: pure functions from a document to a document or `Skipped`.

    --filter=gopher_quality --filter='language keep=en,de min_probability=0.8' --filter=pii

A name is one of `NAMES`, or the full name of a module with a function `build`; the words after it
are the parameters of `build`, whose signature states what there is and the defaults. Filters are
applied in the order of the flags, to each field of a document by itself. A document that one drops
is counted as skipped, with the reason NAME/WHY.
"""

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any

from lm.config.components import import_component
from lm.config.suggestions import suggestion
from lm.preparation import call_flags
from lm.sources import Document, Skipped

Filter = Callable[[Document], Document | Skipped]
_QUALITY = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
NAMES = (*_QUALITY, "language", "pii", "decontaminate")


def apply(filters: Sequence[Filter], document: Document) -> Document | Skipped:
    """Return the document as the filters leave it, or what the first that drops it says."""
    for keep in filters:
        item = keep(document)
        if isinstance(item, Skipped):
            return item
        document = item
    return document


@functools.cache
def load(text: str) -> Filter:
    """Return the filter that a flag names; it raises ValueError, with the document, where it fails.

    Raises:
        ValueError: there is no such filter, parameter or value.
        ModuleNotFoundError: a package that it needs is not installed.
    """
    return functools.partial(_checked, text, _build(text))


@functools.cache
def _build(text: str) -> Filter:
    _, build, given = _parse(text)
    return build(**given)


def _checked(text: str, keep: Filter, document: Document) -> Document | Skipped:
    """Return `keep(document)`. Raises ValueError where it fails, or returns something else."""
    try:
        item = keep(document)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"--filter={text!r} failed on {document.id}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(item, Document | Skipped):
        raise ValueError(
            f"--filter={text!r} made {type(item).__name__} of {document.id}; a filter returns a "
            "Document, or Skipped"
        )
    return item


def identity(text: str) -> dict[str, Any]:
    """Return all that the filter of a flag depends on, as JSON: name, parameters, inputs."""
    name, build, given = _parse(text)
    defaults = {key: p.default for key, p in inspect.signature(build).parameters.items()}
    module = importlib.import_module(build.__module__)
    content = {
        "filter": name,
        "parameters": defaults | given,
        "inputs": getattr(_build(text), "inputs", ""),  # a hash of the files that it reads
        "versions": {name: version(name) for name in getattr(module, "PACKAGES", ())},
    }
    return json.loads(json.dumps(content, default=str))


def _parse(text: str) -> tuple[str, Callable[..., Filter], dict[str, Any]]:
    """Return the name, the function that builds the filter, and the parameters that are given."""
    flag = f"--filter={text!r}"
    name, pairs = call_flags.split(text, flag)
    build = _builder(name, flag)
    return name, build, call_flags.arguments(inspect.signature(build), pairs, flag)


def _builder(name: str, flag: str) -> Callable[..., Filter]:
    if name in _QUALITY:
        return importlib.import_module("lm.preparation.filters.quality").builder(name)
    if name in NAMES:
        return importlib.import_module(f"lm.preparation.filters.{name}").build
    if "." not in name:
        known = f"{', '.join(NAMES)}{suggestion(name, NAMES)}"
        raise ValueError(
            f"{flag} is no filter; there are: {known}, and modules of your own, whose names have "
            "a dot: package.module"
        )
    return import_component(name, flag, needed=("build",)).build


def installed(module: str, package: str = "") -> ModuleType:
    """Import a module of an optional package, with the command that installs it in the error."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # it is installed, and something that it needs is not
        package = package or module
        raise ModuleNotFoundError(
            f"this filter needs {package}: pip install 'lm[data]', or pip install {package}",
            name=package,
        ) from None


def words(path: str, text: str, known: Sequence[str]) -> list[str]:
    """Return the words of a list with commas. Raises ValueError for one that is not `known`."""
    found = text.split(",")
    for word in found:
        if word not in known:
            raise ValueError(
                f"{path}: {word!r} is none of {', '.join(known)}{suggestion(word, known)}"
            )
    return found


def each_field(name: str, judge: Callable[[str], tuple[str, str]]) -> Filter:
    """Return the filter that applies `judge` to each field.

    judge: text -> (text as it is kept, "" or why the document is dropped)
    """

    def keep(document: Document) -> Document | Skipped:
        fields = {}
        for field, text in document.fields.items():
            fields[field], why = judge(text)
            if why:
                return Skipped(document.id, f"{name}/{why}")
        return document._replace(fields=fields)

    return keep
