"""A fit, and a plan made from it, as pages for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np

from lm.scaling.artefact import BOOTSTRAPS, HeldOut, Result, Setting
from lm.scaling.intervals import Estimate
from lm.scaling.planner import Machine, RunPlan
from lm.telemetry.progress import format_quantity

WIDTH = 100


def fit_page(result: Result) -> str:
    """The constants with their intervals, the three approaches, and the held-out size."""
    return _page(
        _title(result),
        _constants(result),
        _frontiers(result),
        "\n".join(_setting(name, s) for name, s in result.settings.items()),
        _held_out(result.held_out, result.options.level),
        _warnings(result.warnings),
    )


def plan_page(
    plan: RunPlan,
    result: Result,
    *,
    machine: Machine | None = None,
    price: float | None = None,
) -> str:
    """The run to train; with a machine also how long that takes, with a price of a chip-hour also
    the cost.
    """
    data, epochs = result.data, f", {plan.epochs:.3g} epochs" if plan.epochs > 1 else ""
    rows = [
        (parameters_label(result), format_estimate(plan.parameters)),
        ("tokens", format_estimate(plan.tokens) + epochs),
        ("tokens per parameter", f"{plan.tokens.value / plan.parameters.value:.3g}"),
        ("loss of one run, nats per token", format_estimate(plan.loss, ".4f")),
        *((name, format_estimate(e, ".3g")) for name, e in plan.settings.items()),
    ]
    absent = [n for n in ("learning_rate", "batch_size") if n not in plan.settings]
    rows += [(name, "the table has no such column") for name in absent]
    for name, (size, tokens) in plan.other.items():
        found = f"{format_estimate(size)} and {format_estimate(tokens)} tokens"
        rows.append((f"by {name}", found if np.isfinite(size.value) else "no law"))
    if machine is not None:
        fast, slow = machine.days(plan.flops)
        mfu = " to ".join(f"{m:.0%}" for m in dict.fromkeys(machine.mfu))
        rows.append((f"days on {machine.num_chips} chips", f"{_range(fast, slow)} at MFU {mfu}"))
        if price is not None:
            low, high = (24 * machine.num_chips * days * price for days in (fast, slow))
            rows.append(("cost", f"{_range(low, high, ',.0f')} at {price:g} a chip-hour"))
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{plan.flops:.3g} FLOPs by {data.path} ({data.num_fitted} runs up to "
        f"{data.flops[1]:.3g} FLOPs): {plan.distance:.3g} times its largest run",
        *(f"  {name.replace('_', ' '):{width}}  {text}" for name, text in rows),
        f"  brackets: {result.options.level:.0%} intervals",
    ]
    return _page("\n".join(lines), _warnings(plan.warnings))


def _page(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(result: Result) -> str:
    d = result.data
    left_out = {
        "not finished": d.unfinished,
        "without a finite loss": d.non_finite,
        "at other than the best setting of their size and tokens": d.num_other_settings,
    }
    words = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    out = f" (left out: {words})" if words else ""
    return (
        f"{d.path}, sha256 {d.sha256[:12]}: {d.num_fitted} of {d.num_rows} runs{out}\n"
        f"{len(d.parameters)} sizes, {_ends(d.parameters)} {parameters_label(result)}; "
        f"{len(d.tokens)} token counts, {_ends(d.tokens)}; {d.flops[0]:.3g} to {d.flops[1]:.3g} "
        "FLOPs"
    )


def _constants(result: Result) -> str:
    o = result.options
    repeats = "" if np.all(np.isinf(result.law.repeats)) else ", D' of repeated data"
    lines = [
        f"L = E + A / N^alpha + B / D^beta{repeats}; Huber {o.delta:g}, {result.num_starts} starts",
        f"{o.level:.0%} intervals of {o.num_replicates} bootstrap replicates: "
        f"{BOOTSTRAPS[result.bootstrap]}",
        *(f"  {name:8} {format_estimate(e, '.4g')}" for name, e in result.constants.items()),
    ]
    if o.repeats is not None:
        lines.append(f"  repeats  {o.repeats:g}, as given")
    return "\n".join([*lines, f"  noise    {result.noise:.2%} of the loss"])


def _frontiers(result: Result) -> str:
    rows = [
        (name, x.parameters.exponent, x.tokens.exponent, f"{len(x.points['flops'])} budgets")
        for name, x in result.approaches.items()
    ]
    rows.append(("law", result.exponents["a"], result.exponents["b"], ""))
    lines = [f"  {'approach':11} {'N_opt ~ C^a':24} {'D_opt ~ C^b':24}"]
    for number, (name, a, b, budgets) in enumerate(rows, 1):
        found = f"no: {budgets} with a minimum inside their sizes"
        if np.isfinite(a.value):
            found = f"{format_estimate(a, '.3f'):24} {format_estimate(b, '.3f'):24} {budgets}"
        lines.append(f"  {number} {name:9} {found}")
    return "\n".join(lines)


def _setting(name: str, setting: Setting) -> str:
    label, law, num_points = name.replace("_", " "), setting.law, len(setting.points["x"])
    if not np.isfinite(law.exponent.value):
        edge = f", {setting.at_edge} best at the edge of their sweep" if setting.at_edge else ""
        return f"{label}: no law, {num_points} sizes tell one{edge}"
    word = "best" if setting.kind == "swept" else "as run, not swept"
    return (
        f"{label} ({word}): {format_estimate(law.coefficient, '.3g')} x {setting.variable} ^ "
        f"{format_estimate(law.exponent, '.3f')}, {num_points} points"
    )


def _held_out(held: HeldOut | None, level: float) -> str:
    if held is None:
        return "nothing held out: without the largest size too few runs are left"
    return (
        f"held out: {format_quantity(held.parameters)} parameters, {held.flops_distance:.2g} times "
        f"the FLOPs of the rest; predicted {held.mean_error:+.2%} off in the mean, "
        f"{held.largest_error:+.2%} at most, {held.num_inside} of {len(held.measured)} inside "
        f"their {level:.0%} intervals"
    )


def _warnings(warnings: Iterable[str]) -> str:
    lines = [
        textwrap.fill(w, WIDTH, initial_indent="  - ", subsequent_indent="    ") for w in warnings
    ]
    return "\n".join(["warnings", *lines]) if lines else ""


def parameters_label(result: Result) -> str:
    """The name of N: total parameters, or non-embedding ones."""
    return f"{result.counting.replace('_', '-')} parameters"


def format_estimate(e: Estimate, form: str = "") -> str:
    """The value and its interval by a format of numbers; without one as 1.25M, 3.4B."""
    value, low, high = (
        f"{x:{form}}" if form else format_quantity(x) for x in (e.value, e.low, e.high)
    )
    return f"{value} [{low}, {high}]" if np.isfinite(e.low) else f"{value} [no interval]"


def _ends(values: Sequence[float]) -> str:
    return f"{format_quantity(values[0])} to {format_quantity(values[-1])}"


def _range(low: float, high: float, form: str = ".3g") -> str:
    return f"{low:{form}}" if np.isclose(low, high) else f"{low:{form}} to {high:{form}}"
