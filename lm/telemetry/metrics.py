"""Metrics of a run: per-token means, and the records of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lm.storage.epaths import StoragePath
from lm.telemetry import jsonl

METRICS_FILE, LAYERS_FILE = "metrics.jsonl", "layers.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"  # see lm/training/run_evaluations.py
TRAIN, EVAL, EVALUATION, LAYERS = "train", "eval", "evaluation", "layers"  # kinds of records
ERROR_SUFFIX = "_stderr"  # of the name of a standard error, after the name of what it is of
OVERVIEW_FILE = "overview.json"  # see lm/training/describe.py
HOST_WORK = ("host_seconds", "host_cpu_seconds")  # a step: see lm/telemetry/deferred.py


def read(workdir: str) -> list[jsonl.Record]:
    """The records of metrics.jsonl, without a last line that a kill has cut."""
    return jsonl.read(StoragePath(workdir) / METRICS_FILE)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Per-token means of additive sums, with the count itself under `tokens`. No tokens: zeros.

    Sums over the tokens of one task, `loss/TASK`, are divided by `tokens/TASK`; a task without
    tokens has no mean.
    """
    tokens = float(sums["tokens"])
    result = {"tokens": tokens}
    for name, value in sums.items():
        count = sums.get(f"tokens/{name.partition('/')[2]}", tokens)
        if not name.startswith("tokens") and (count or count is tokens):
            result[name] = float(value) / max(float(count), 1.0)
    return result


def short_names(sources: Sequence[str], separator: str = "/") -> dict[str, str]:
    """A short name for each source (a path or URL): its fewest last parts that are unique.

    Runs that read the same store from different folders thus share its name.
    short_names(["/data/books/validation", "/data/code/validation"]) are books/validation and
    code/validation; a single source is named by its last part.
    """
    parts = {source: source.rstrip(separator).split(separator) for source in sources}
    names = {}
    for source, path in parts.items():
        others = [p for other, p in parts.items() if other != source]
        counts = range(1, len(path) + 1)
        count = next((n for n in counts if all(path[-n:] != p[-n:] for p in others)), None)
        names[source] = separator.join(path[-count:]) if count else source
    return names
