"""A fit, and a plan made from it, as pages for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

from lm.scaling.artefact import BOOTSTRAPS, HeldOut, Result, Setting
from lm.scaling.intervals import Estimate
from lm.scaling.planner import Machine, RunPlan
from lm.telemetry.metrics import format_quantity

WIDTH = 100
_FRONTIERS = {"envelope": "1 envelope", "isoflop": "2 isoflop", "law": "3 law"}


def fit_page(result: Result) -> str:
    """The constants with their intervals, the three approaches, and what was held out."""
    parts = [
        _title(result),
        _constants(result),
        _frontiers(result),
        "\n".join(_setting(name, s) for name, s in result.settings.items()),
        _held_out(result.held_out, result.options.level),
        _warnings(result.warnings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plan_page(
    plan: RunPlan,
    result: Result,
    *,
    machine: Machine | None = None,
    price: float | None = None,
) -> str:
    """What to train; with a machine also how long that takes, with a price of a chip-hour also the
    cost.
    """
    data, counting = result.data, result.counting.replace("_", "-")
    head = (
        f"{plan.flops:.3g} FLOPs by {data.path} ({data.num_fitted} runs up to "
        f"{data.flops[1]:.3g} FLOPs): {plan.distance:.3g} times its largest run"
    )
    rows = [
        (f"{counting} parameters", _quantities(plan.parameters)),
        ("tokens", _quantities(plan.tokens) + _epochs(plan)),
        ("tokens per parameter", f"{plan.tokens.value / plan.parameters.value:.3g}"),
        ("loss of one run, nats per token", _numbers(plan.loss, ".4f")),
        *((name.replace("_", " "), _numbers(e, ".3g")) for name, e in plan.settings.items()),
    ]
    absent = [n for n in ("learning_rate", "batch_size") if n not in plan.settings]
    rows += [(n.replace("_", " "), "the table has no such column") for n in absent]
    for name, (size, tokens) in plan.other.items():
        known = np.isfinite(size.value)
        found = f"{_quantities(size)} and {_quantities(tokens)} tokens" if known else "no law"
        rows.append((f"by {name}", found))
    if machine is not None:
        fast, slow = machine.days(plan.flops)
        mfu = " to ".join(f"{m:.0%}" for m in dict.fromkeys(machine.mfu))
        rows.append((f"days on {machine.num_chips} chips", f"{_range(fast, slow)} at MFU {mfu}"))
        if price is not None:
            least, most = (24 * machine.num_chips * days * price for days in (fast, slow))
            rows.append(("cost", f"{_range(least, most, ',.0f')} at {price:g} a chip-hour"))
    width = max(len(name) for name, _ in rows)
    body = [f"  {name:{width}}  {text}" for name, text in rows]
    level = f"  brackets: {result.options.level:.0%} intervals"
    parts = ["\n".join([head, *body, level]), _warnings(plan.warnings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(result: Result) -> str:
    d = result.data
    left_out = [
        f"{getattr(d, key)} {words}"
        for key, words in (
            ("unfinished", "not finished"),
            ("non_finite", "without a finite loss"),
            ("num_other_settings", "at other than the best setting of their size and tokens"),
        )
        if getattr(d, key)
    ]
    out = f" (left out: {', '.join(left_out)})" if left_out else ""
    return (
        f"{d.path}, sha256 {d.sha256[:12]}: {d.num_fitted} of {d.num_rows} runs{out}\n"
        f"{len(d.parameters)} sizes, {_ends(d.parameters)} "
        f"{result.counting.replace('_', '-')} parameters; {len(d.tokens)} token counts, "
        f"{_ends(d.tokens)}; {d.flops[0]:.3g} to {d.flops[1]:.3g} FLOPs"
    )


def _constants(result: Result) -> str:
    o = result.options
    repeats = "" if np.all(np.isinf(result.law.repeats)) else ", D' of repeated data"
    rows = [f"  {name:8} {_numbers(e, '.4g')}" for name, e in result.constants.items()]
    if o.repeats is not None:
        rows.append(f"  repeats  {o.repeats:g}, as given")
    head = (
        f"L = E + A / N^alpha + B / D^beta{repeats}; Huber {o.delta:g}, "
        f"{result.num_starts} starts\n"
        f"{o.level:.0%} intervals of {o.num_replicates} bootstrap replicates: "
        f"{BOOTSTRAPS[result.bootstrap]}"
    )
    return "\n".join([head, *rows, f"  noise    {result.noise:.2%} of the loss"])


def _frontiers(result: Result) -> str:
    rows = []
    for name, label in _FRONTIERS.items():
        if name == "law":
            a, b, budgets = result.exponents["a"], result.exponents["b"], ""
        else:
            found = getattr(result, name)
            a, b = found.parameters.exponent, found.tokens.exponent
            budgets = f"{len(found.points['flops'])} budgets"
        if np.isfinite(a.value):
            rows.append(f"  {label:11} {_numbers(a, '.3f'):24} {_numbers(b, '.3f'):24} {budgets}")
        else:
            rows.append(f"  {label:11} no: {budgets} with a lowest point inside their sizes")
    return "\n".join([f"  {'approach':11} {'N_opt ~ C^a':24} {'D_opt ~ C^b':24}", *rows])


def _setting(name: str, setting: Setting) -> str:
    label, law = name.replace("_", " "), setting.law
    if not np.isfinite(law.exponent.value):
        edge = f", {setting.at_edge} best at the edge of their sweep" if setting.at_edge else ""
        return f"{label}: no law, {len(setting.points['x'])} sizes tell one{edge}"
    word = "best" if setting.kind == "swept" else "as run, not swept"
    return (
        f"{label} ({word}): {_numbers(law.coefficient, '.3g')} x {setting.variable} ^ "
        f"{_numbers(law.exponent, '.3f')}, {len(setting.points['x'])} points"
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


def _warnings(warnings: Sequence[str]) -> str:
    lines = [
        textwrap.fill(w, WIDTH, initial_indent="  - ", subsequent_indent="    ") for w in warnings
    ]
    return "\n".join(["warnings", *lines]) if warnings else ""


def _epochs(plan: RunPlan) -> str:
    return f", {plan.epochs:.3g} epochs" if plan.epochs > 1 else ""


def _numbers(e: Estimate, form: str) -> str:
    if not np.isfinite(e.low):
        return f"{e.value:{form}} [no interval]"
    return f"{e.value:{form}} [{e.low:{form}}, {e.high:{form}}]"


def _quantities(e: Estimate) -> str:
    return f"{format_quantity(e.value)} [{format_quantity(e.low)}, {format_quantity(e.high)}]"


def _ends(values: Sequence[float]) -> str:
    return f"{format_quantity(values[0])} to {format_quantity(values[-1])}"


def _range(low: float, high: float, form: str = ".3g") -> str:
    return f"{low:{form}}" if np.isclose(low, high) else f"{low:{form}} to {high:{form}}"
