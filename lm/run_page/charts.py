"""Curves and heat maps of a run for its page."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lm.run_page import thinning
from lm.run_page.folder import RunFolder
from lm.telemetry.jsonl import Record
from lm.telemetry.metrics import ERROR_SUFFIX, EVALUATION, short_names


@dataclasses.dataclass(frozen=True)
class Chart:
    id: str
    title: str
    unit: str = ""
    main: bool = True  # False: below "more"


CHARTS = (
    Chart("loss", "Loss", "nats per token"),
    Chart("bits_per_byte", "Bits per byte, held out"),
    Chart("accuracy", "Accuracy, held out", "share of tokens"),
    Chart("grad_norm", "Gradient norm, before clipping"),
    Chart("learning_rate", "Learning rate"),
    Chart("tokens_per_second", "Throughput", "tokens per second"),
    Chart("mfu", "Model FLOPs utilization", "share of the peak"),
    Chart("goodput", "Goodput up to then", "share of the wall time"),
)
_TITLES = {
    "perplexity": "Perplexity, held out",
    "noise_scale": "Gradient noise scale, tokens",
    "noise": "Gradient noise: variance per token",
    "signal": "Gradient signal: squared norm without noise",
    "host_seconds": "Host's work, seconds per step",
    "host_cpu_seconds": "Host's work on a core, seconds per step",
    "lag_seconds": "Lag of the slowest process, seconds",
    "slowest_process": "Slowest process",
    "seconds": "Seconds per log window",
    "host_bytes": "Host memory of the first process, bytes",
    "device_bytes": "Memory in use on its first device, bytes",
    "device_peak_bytes": "Most memory in use on its first device so far, bytes",
    "skipped": "Skipped updates per log window",
}
_NO_CURVES = {"step", "kind", "source", "tokens", "tokens_seen", "flops_seen"}
_NO_FIGURES = {"n", "total", "partial", "seconds"}  # of evaluations
OF_EVALUATION = f"{EVALUATION}/"  # begins the id of a chart, before the name and the figure


def of_run(run: RunFolder, buckets: int = thinning.BUCKETS) -> dict[str, list[dict[str, Any]]]:
    """{chart's id: traces}; a trace is a curve of `thinning` with its name, its kind (`train`,
    `eval`) and, where they were recorded, standard errors `error`.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, (steps, values) in (_columns(run.layers) | _columns(run.train)).items():
        curve = thinning.curve(steps, values, buckets)
        found[key].append({"name": "training", "kind": "train", **curve})
    names = short_names(sorted({r["source"] for r in run.evals}))
    for source, name in names.items():
        curves = _with_errors([r for r in run.evals if r["source"] == source], buckets)
        for key, curve in curves.items():
            found[key].append({"name": name, "kind": "eval", **curve})
    for name in dict.fromkeys(r["source"] for r in run.evaluations):
        own = [r for r in run.evaluations if r["source"] == name]
        rows = [{k: v for k, v in r.items() if k not in _NO_FIGURES} for r in own]
        for key, curve in _with_errors(rows, buckets).items():
            found[f"{OF_EVALUATION}{name}/{key}"] = [{"name": name, "kind": "eval", **curve}]
    return dict(found)


def _with_errors(records: Sequence[Record], buckets: int) -> dict[str, dict[str, Any]]:
    """{name: the curve of a figure of records, with its standard errors as `error`}."""
    found, columns = {}, _columns(records)
    for key, (steps, values) in columns.items():
        if key.endswith(ERROR_SUFFIX):
            continue
        curve = thinning.curve(steps, values, buckets)
        errors = dict(zip(*columns.get(key + ERROR_SUFFIX, ((), ())), strict=True))
        if errors:
            near = [errors.get(step, math.nan) for step in curve["x"]]
            curve["error"] = thinning.numbers(near)
        found[key] = curve
    return found


def _columns(records: Iterable[Record]) -> dict[str, tuple[list[float], list[float]]]:
    """{name: (steps, values)} of the numbers in records."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        step = record["step"]
        for key, value in record.items():
            if key not in _NO_CURVES and isinstance(value, int | float):
                steps, values = found.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return found


def described(ids: Iterable[str]) -> list[dict[str, Any]]:
    """The charts of these ids, the known ones first, as the page takes them."""
    wanted = dict.fromkeys(ids)
    known = [chart for chart in CHARTS if chart.id in wanted]
    shown = set()
    for name in [name for name in wanted if name.startswith(OF_EVALUATION)]:
        evaluation, _, figure = name.removeprefix(OF_EVALUATION).partition("/")
        # the first figure is the one that the others make up
        known.append(Chart(name, f"{evaluation}: {figure}", main=evaluation not in shown))
        shown.add(evaluation)
    rest = sorted(wanted.keys() - {chart.id for chart in known})
    known += [Chart(name, _TITLES.get(name, name), main=False) for name in rest]
    return [dataclasses.asdict(chart) for chart in known]


def scales(records: Sequence[Record]) -> dict[str, list[Any]]:
    """{"step", "tokens", "hours": of up to some hundred records}: what the axis may show."""
    steps, tokens, hours, seconds = [], [], [], 0.0
    every = max(1, len(records) // 400)
    for i, record in enumerate(records):
        seconds += record.get("seconds", 0.0)
        if i % every == 0 or i == len(records) - 1:
            steps.append(record["step"])
            tokens.append(record.get("tokens_seen", math.nan))
            hours.append(seconds / 3600)
    columns = {"step": steps, "tokens": tokens, "hours": hours}
    return {name: thinning.numbers(values) for name, values in columns.items()}


def heat_maps(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Heat maps of layers.jsonl: {"statistic", "group", "rows": labels, "x": steps, "z"}.

    A group with a value a layer is a map of its layers; groups with one value share a map. A step
    that was done again counts as it was the last time.
    """
    layered: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(dict)
    single: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for record in records:
        for statistic, groups in record.items():
            if not isinstance(groups, dict):
                continue
            for group, value in groups.items():
                if isinstance(value, list):
                    layered[statistic, group][record["step"]] = value
                else:
                    single[statistic].setdefault(record["step"], {})[group] = value
    tables: list[tuple[str, str, list[str], dict[int, list[float]]]] = []
    for statistic, by_step in single.items():
        names = list(dict.fromkeys(name for groups in by_step.values() for name in groups))
        rows = {s: [g.get(name, math.nan) for name in names] for s, g in by_step.items()}
        tables.append((statistic, "", names, rows))
    for (statistic, group), by_step in layered.items():
        count = max(map(len, by_step.values()))
        rows = {s: [*v, *[math.nan] * (count - len(v))] for s, v in by_step.items()}
        tables.append((statistic, group, [f"layer {i}" for i in range(count)], rows))
    tables = [(s, g, rows, dict(sorted(by_step.items()))) for s, g, rows, by_step in tables]
    columns = thinning.columns_for(sum(len(rows) for _, _, rows, _ in tables))
    return [
        {
            "statistic": statistic,
            "group": group,
            "rows": rows,
            **thinning.heat_map([*by_step], _floats([*by_step.values()]), columns),
        }
        for statistic, group, rows, by_step in sorted(tables, key=lambda t: t[:2])
    ]


def _floats(rows: Sequence[Sequence[Any]]) -> np.ndarray:
    """float64 of rows of numbers, of None and of the strings that stand for nan and infinity."""
    return np.array([[math.nan if x is None else float(x) for x in row] for row in rows])
