"""Pictures of a fit: matplotlib figures that need no window.

`table` is what was fitted, `Table.best()` of what was read; `result` its artefact. Where the law is
drawn over FLOPs, a parameter and token take as many as in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.scaling import frontier, intervals
from lm.scaling.artefact import FrontierEstimate, LawEstimate, Result, Setting
from lm.scaling.intervals import Estimate
from lm.scaling.powers import parabola
from lm.scaling.table import Table, means
from lm.telemetry.metrics import format_quantity

FIGURES = ("loss", "isoflop", "law", "optimum", "held_out", "settings")
BEYOND = 100.0  # factor of FLOPs beyond the table that lines are drawn to
# A legend under the axis, where it covers no curve.
_BELOW: dict[str, Any] = {
    "loc": "upper center",
    "bbox_to_anchor": (0.5, -0.13),
    "frameon": False,
    "fontsize": 8,
}
_APPROACHES = {"envelope": "C2", "isoflop": "C1", "parametric": "C0"}


def every_figure(table: Table, result: Result) -> dict[str, Any]:
    """All figures that this table gives, by name, of FIGURES: none of an approach without a law."""
    found = {
        "loss": loss_figure(table, result),
        "law": law_figure(table, result),
        "optimum": optimum_figure(result),
    }
    if np.isfinite(result.isoflop.parameters.exponent.value):
        found["isoflop"] = isoflop_figure(table, result)
    if result.held_out is not None:
        found["held_out"] = held_out_figure(result)
    if any(_varies(s) for s in result.settings.values()):
        found["settings"] = settings_figure(result)
    return found


def loss_figure(table: Table, result: Result) -> Any:
    """Loss over FLOPs: runs and the law's line for each size, and the envelope of approach 1."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    figure, [axis] = _figure(1, (7.6, 4.8))
    curves, sizes = frontier.curves(table), table.sizes()
    for curve, color in zip(curves, _spread(len(curves)), strict=True):
        mine = sizes == curve.number
        axis.plot(table.flops[mine], table.loss[mine], "o", color=color, markersize=4)
        tokens = np.geomspace(table.tokens[mine].min(), table.tokens[mine].max(), 50)
        flops = np.exp(np.interp(np.log(tokens), curve.log_tokens, curve.log_flops))
        if table.unique_tokens is None:
            axis.plot(flops, result.law.loss(curve.parameters, tokens), color=color, linewidth=1)
    points = result.envelope.points
    if points["flops"]:
        axis.plot(points["flops"], points["loss"], ".", color="0.3", markersize=3, label="envelope")
    flops = np.geomspace(table.flops.min(), table.flops.max() * BEYOND, 80)
    middle, low, high = _best_losses(result, flops)
    axis.plot(flops, middle, "--", color="black", linewidth=1, label="least, by the law")
    axis.fill_between(flops, low, high, color="0.6", alpha=0.3, linewidth=0)
    axis.axvline(table.flops.max(), color="0.7", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="loss (nats per token)")
    axis.yaxis.set_major_locator(MaxNLocator(8))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    _color_keys(axis, [format_quantity(c.parameters) for c in curves], "parameters")
    _quiet(axis)
    return figure


def isoflop_figure(table: Table, result: Result) -> Any:
    """Approach 2: loss over parameters at equal FLOPs, the parabolas and their lowest points."""
    figure, [axis] = _figure(1, (7.6, 4.8))
    cuts = frontier.slices(table, law=result.law)
    top = 0.0
    for cut, color in zip(cuts, _spread(len(cuts)), strict=True):
        axis.plot(cut.parameters, cut.loss, "o", color=color, markersize=4)
        found = parabola(cut.parameters, cut.loss)
        if found is not None:
            line = np.geomspace(found.low, found.high, 60)
            axis.plot(line, found.at(line), color=color, linewidth=1)
            top = max(top, float(np.max(found.at(line))))
    points = result.isoflop.points  # stars around the points, not on them
    axis.plot(points["parameters"], points["loss"], "k*", markersize=11, markerfacecolor="none",
              markeredgewidth=0.8, label="lowest point of a budget")  # fmt: skip
    axis.set(xscale="log", xlabel=_parameters(result), ylabel="loss (nats per token)")
    _color_keys(axis, [f"{cut.flops:.2g}" for cut in cuts], "FLOPs")
    losses = np.concatenate([cut.loss for cut in cuts]) if cuts else np.zeros(0)
    top += 0.1 * (top - losses.min(initial=top))  # the parabolas fill the picture
    if 0 < top < losses.max():
        axis.set_ylim(top=top)
        axis.set_title(f"{(losses > top).sum()} runs lie above the picture", fontsize=10)
    if not np.isfinite(result.isoflop.parameters.exponent.value):
        axis.set_title("no law: too few budgets have their best size inside")
    _quiet(axis)
    return figure


def law_figure(table: Table, result: Result) -> Any:
    """Approach 3: lines of equal loss over FLOPs and parameters, and what the law leaves over."""
    figure, [left, right] = _figure(2, (6.2, 4.8))
    law = result.law
    flops = np.geomspace(table.flops.min() / 2, table.flops.max() * 10, 120)
    sizes = np.geomspace(table.parameters.min() / 2, table.parameters.max() * 4, 120)
    C, N = np.meshgrid(flops, sizes)
    loss = law.loss(N.ravel(), (C / result.factor / N).ravel()).reshape(C.shape)
    levels = np.geomspace(loss.min() * 1.01, table.loss.max() * 1.1, 14)
    lines = left.contour(C, N, loss, levels, cmap="viridis", linewidths=1)
    left.clabel(lines, fontsize=7, fmt="%.2f")
    best = np.array([law.optimum(c, result.factor)[0] for c in flops])
    left.plot(flops, best, color="C0", linewidth=2, label="best size")
    left.plot(table.flops, table.parameters, "o", color="0.2", markersize=3, label="runs")
    left.set(xscale="log", yscale="log", ylim=(sizes[0], sizes[-1]))
    left.set(xlabel="training FLOPs", ylabel=_parameters(result), title="lines of equal loss")
    left.legend(**_BELOW, ncols=2)
    over = np.log(table.loss) - np.log(
        result.law.loss(table.parameters, table.tokens, table.unique_tokens)
    )
    numbers = table.sizes()
    names = [format_quantity(size) for size in means(table.parameters, numbers)]
    for number, color in enumerate(_spread(len(names))):
        mine = numbers == number
        right.plot(table.tokens[mine], 100 * over[mine], "o", color=color, markersize=4)
    right.axhline(0, color="0.4", linewidth=1)
    band = 100 * result.noise
    right.axhspan(-band, band, color="0.6", alpha=0.2, linewidth=0)
    right.set(xscale="log", xlabel="tokens", ylabel="measured above the law (%)")
    right.set_title(f"what is left over: {result.noise:.2%} (the band)")
    _color_keys(right, names, "parameters")
    _quiet(left)
    _quiet(right)
    return figure


def optimum_figure(result: Result) -> Any:
    """The best size and number of tokens over FLOPs by all three approaches, with intervals."""
    figure, axes = _figure(2, (6.0, 4.8))
    low, high = result.data.flops
    flops = np.geomspace(low, high * BEYOND, 60)
    names = ("parameters", "tokens")
    for place, (axis, name) in enumerate(zip(axes, names, strict=True)):
        for approach in ("envelope", "isoflop"):
            found: FrontierEstimate = getattr(result, approach)
            law: LawEstimate = getattr(found, name)
            if not np.isfinite(law.exponent.value):
                continue
            label = f"{approach}: C^{_interval(law.exponent)}"
            values = [law.at(float(c), result.options.level) for c in flops]
            _band(axis, flops, values, _APPROACHES[approach], label)
            points = found.points
            axis.plot(points["flops"], points[name], ".", color=_APPROACHES[approach], markersize=4)
        exponent = result.exponents["a" if name == "parameters" else "b"]
        values = [_optimum(result, float(c), place) for c in flops]
        _band(axis, flops, values, _APPROACHES["parametric"], f"law: C^{_interval(exponent)}")
        axis.axvline(high, color="0.7", linewidth=0.8, linestyle=":")
        axis.annotate("end of the table", (high, 0.02), (4, 0), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=7, color="0.4")  # fmt: skip
        label = _parameters(result) if name == "parameters" else name
        axis.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=f"best {label}")
        axis.legend(**_BELOW)
        _quiet(axis)
    return figure


def held_out_figure(result: Result) -> Any:
    """The largest size, measured, and predicted by all smaller ones."""
    held = result.held_out
    assert held is not None, "every_figure asks"
    figure, [axis] = _figure(1, (6.4, 4.0))
    measured = np.array(held.measured)
    ends = np.array([(p.value, p.low, p.high) for p in held.predicted])
    middle, low, high = 100 * (ends.T / measured - 1)
    axis.errorbar(held.tokens, middle, [middle - low, high - middle], fmt="o", capsize=4)
    for tokens, value, loss in zip(held.tokens, middle, measured, strict=True):
        axis.annotate(f"{value:+.2f}%\nof {loss:.3f}", (tokens, value), (7, 0),
                      textcoords="offset points", fontsize=8, va="center")  # fmt: skip
    axis.axhline(0, color="C1", label="measured")
    axis.set(xscale="log", xlabel="tokens", ylabel="predicted above measured (%)")
    axis.set_title(
        f"{format_quantity(held.parameters)} parameters, {held.flops_distance:.1f} times the FLOPs "
        "of what was fitted",
        fontsize=10,
    )
    axis.legend(**_BELOW)
    axis.margins(x=0.15)
    _quiet(axis)
    return figure


def settings_figure(result: Result) -> Any:
    """The laws of learning rate and batch size, with the optima that they go through."""
    found = {n: s for n, s in result.settings.items() if _varies(s)}
    figure, axes = _figure(len(found), (5.6, 4.4))
    for axis, (name, setting) in zip(axes, found.items(), strict=True):
        x = np.geomspace(min(setting.points["x"]), max(setting.points["x"]) * BEYOND, 60)
        values = [setting.law.at(float(v), result.options.level) for v in x]
        _band(axis, x, values, "C0", f"{setting.variable}^{_interval(setting.law.exponent)}")
        axis.plot(setting.points["x"], setting.points["best"], "o", color="0.2", markersize=4)
        word = "best" if setting.kind == "swept" else "as run:"
        axis.set(xscale="log", yscale="log", xlabel=setting.variable)
        axis.set_ylabel(f"{word} {name.replace('_', ' ')}")
        axis.legend(**_BELOW)
        _quiet(axis)
    return figure


def _varies(setting: Setting) -> bool:
    """Whether there is a law, and another than that one value was used throughout."""
    best = setting.points["best"]
    return bool(np.isfinite(setting.law.exponent.value) and max(best) > 1.001 * min(best))


def _best_losses(result: Result, flops: np.ndarray) -> list[np.ndarray]:
    """[the law's least loss for each budget, its lower and its upper end], without runs' noise."""
    level, middle, low, high = result.options.level, [], [], []
    for budget in flops:
        middle.append(float(result.law.loss(*result.law.optimum(budget, result.factor))[0]))
        size, tokens = result.laws.optimum(budget, result.factor)
        each = result.laws.loss(size[:, None], tokens[:, None])[:, 0]
        ends = np.quantile(each, [(1 - level) / 2, (1 + level) / 2])
        low.append(ends[0])
        high.append(ends[1])
    return [np.array(v) for v in (middle, low, high)]


def _optimum(result: Result, flops: float, place: int) -> Estimate:
    """The law's best parameters (place 0) or tokens (1)."""
    each = np.asarray(result.laws.optimum(flops, result.factor)[place])
    return intervals.estimate(
        float(result.law.optimum(flops, result.factor)[place]), each, result.options.level
    )


def _band(axis: Any, x: np.ndarray, values: Sequence[Estimate], color: str, label: str) -> None:
    axis.plot(x, [v.value for v in values], color=color, label=label, linewidth=1.5)
    low, high = [v.low for v in values], [v.high for v in values]
    axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _interval(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _parameters(result: Result) -> str:
    return f"{result.counting.replace('_', '-')} parameters"


def _spread(count: int) -> np.ndarray:
    """`count` colours [count, 4], from dark to light."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0.0, 0.9, max(count, 1)))[:count]


def _color_keys(axis: Any, names: Sequence[str], title: str) -> None:
    """Says right of the axis which of the colours of `_spread` is which, and below what else there
    is: a legend of up to 20 names, else a scale with ten of them.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D

    if axis.get_legend_handles_labels()[1]:
        axis.legend(**_BELOW, ncols=2)
    colors = _spread(len(names))
    if len(names) > 20:
        places = np.unique(np.linspace(0, len(names) - 1, 10).round().astype(int))
        scale = ScalarMappable(cmap=ListedColormap(list(colors)))
        scale.set_clim(-0.5, len(names) - 0.5)
        bar = axis.figure.colorbar(scale, ax=axis, ticks=places, label=title, aspect=40)
        bar.ax.set_yticklabels([names[i] for i in places], fontsize=8)
        return
    lines = [Line2D([], [], color=c, marker="o", markersize=4, linewidth=1) for c in colors]
    axis.figure.legend(
        lines[::-1], names[::-1], loc="outside right upper", title=title, title_fontsize=8,
        frameon=False, fontsize=8,
    )  # fmt: skip


def _figure(columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1]), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _quiet(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
