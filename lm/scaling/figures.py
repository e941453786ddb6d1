"""Pictures of a fit: matplotlib figures that need no window.

`table` is what was fitted, `Table.best()` of what was read; `result` its artefact. Where the law is
drawn over FLOPs, a parameter and token take as many as in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lm.scaling import frontier, intervals
from lm.scaling.artefact import LawEstimate, Result, Setting
from lm.scaling.intervals import Estimate
from lm.scaling.powers import parabola
from lm.scaling.report import format_estimate, parameters_label
from lm.scaling.table import Table, means
from lm.telemetry.figures import make_figure, shades
from lm.telemetry.progress import format_quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

FIGURES = ("loss", "isoflop", "law", "optimum", "held_out", "settings")
BEYOND = 100.0  # factor of FLOPs beyond the table that lines are drawn to
# A legend under the axis, where it covers no curve.
_BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "frameon": False, "fontsize": 8}
_APPROACHES = {"envelope": "C2", "isoflop": "C1", "parametric": "C0"}


def every_figure(table: Table, result: Result) -> dict[str, Figure]:
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


def loss_figure(table: Table, result: Result) -> Figure:
    """Loss over FLOPs: runs and the law's line for each size, and the envelope of approach 1."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    figure, [[axis]] = make_figure(size=(7.6, 4.8))
    dots = _scatter_by_size(axis, table, table.flops, table.loss)
    for number, curve in frontier.curves(table).items() if table.unique_tokens is None else []:
        tokens = np.geomspace(curve.tokens[0], curve.tokens[-1], 50)
        flops = np.exp(np.interp(np.log(tokens), np.log(curve.tokens), np.log(curve.flops)))
        loss = result.law.loss(curve.parameters[0], tokens)
        axis.plot(flops, loss, color=dots.cmap(number), linewidth=1)
    points = result.envelope.points
    if points["flops"]:
        axis.plot(points["flops"], points["loss"], ".", color="0.3", markersize=3, label="envelope")
    flops = np.geomspace(table.flops.min(), table.flops.max() * BEYOND, 80)
    _band(axis, flops, [_least_loss(result, c) for c in flops], "black", "least, by the law")
    axis.axvline(table.flops.max(), color="0.7", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="loss (nats per token)")
    axis.yaxis.set_major_locator(MaxNLocator(8))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(**_BELOW, ncols=2)
    return figure


def isoflop_figure(table: Table, result: Result) -> Figure:
    """Approach 2: loss over parameters at equal FLOPs, the parabolas and their minima."""
    figure, [[axis]] = make_figure(size=(7.6, 4.8))
    cuts = frontier.slices(table, law=result.law)
    sizes, losses = (np.concatenate([getattr(c, n) for c in cuts]) for n in ("parameters", "loss"))
    numbers = np.repeat(np.arange(len(cuts)), [len(cut.loss) for cut in cuts])
    names = [f"{cut.flops[0]:.2g}" for cut in cuts]
    dots = _scatter(axis, sizes, losses, numbers, names, "FLOPs")
    top = losses.min()
    for number, cut in enumerate(cuts):
        found = parabola(cut.parameters, cut.loss)
        if found is not None:
            log_size, height = found.linspace(60)
            axis.plot(np.exp(log_size), height, color=dots.cmap(number), linewidth=1)
            top = max(top, height.max())
    points = result.isoflop.points
    stars = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 0.8}
    axis.plot(points["parameters"], points["loss"], "k*", label="minimum of a budget", **stars)
    axis.set(xscale="log", xlabel=parameters_label(result), ylabel="loss (nats per token)")
    axis.legend(**_BELOW)
    top += 0.1 * (top - losses.min())  # the parabolas fill the picture
    if losses.min() < top < losses.max():
        axis.set_ylim(top=top)
        axis.set_title(f"{(losses > top).sum()} runs lie above the picture", fontsize=10)
    return figure


def law_figure(table: Table, result: Result) -> Figure:
    """Approach 3: lines of equal loss over FLOPs and parameters, and the residuals of the law."""
    figure, [[left, right]] = make_figure(columns=2, size=(6.2, 4.8))
    law = result.law
    flops = np.geomspace(table.flops.min() / 2, table.flops.max() * 10, 120)
    sizes = np.geomspace(table.parameters.min() / 2, table.parameters.max() * 4, 120)
    C, N = np.meshgrid(flops, sizes)
    loss = law.loss(N.ravel(), (C / result.factor / N).ravel()).reshape(C.shape)
    levels = np.geomspace(loss.min() * 1.01, table.loss.max() * 1.1, 14)
    lines = left.contour(C, N, loss, levels, cmap="viridis", linewidths=1)
    left.clabel(lines, fontsize=7, fmt="%.2f")
    best = [law.optimum(c, result.factor)[0] for c in flops]
    left.plot(flops, best, color="C0", linewidth=2, label="best size")
    left.plot(table.flops, table.parameters, "o", color="0.2", markersize=3, label="runs")
    left.set(xscale="log", yscale="log", ylim=(sizes[0], sizes[-1]), title="lines of equal loss")
    left.set(xlabel="training FLOPs", ylabel=parameters_label(result))
    left.legend(**_BELOW, ncols=2)
    predicted = law.loss(table.parameters, table.tokens, table.unique_tokens)
    _scatter_by_size(right, table, table.tokens, 100 * np.log(table.loss / predicted))
    right.axhline(0, color="0.4", linewidth=1)
    band = 100 * result.noise
    right.axhspan(-band, band, color="0.6", alpha=0.2, linewidth=0)
    right.set(xscale="log", xlabel="tokens", ylabel="measured above the law (%)")
    right.set_title(f"residuals: {result.noise:.2%} (the band)")
    return figure


def optimum_figure(result: Result) -> Figure:
    """The best size and number of tokens over FLOPs by all three approaches, with intervals."""
    figure, [axes] = make_figure(columns=2, size=(6.0, 4.8))
    low, high = result.data.flops
    flops = np.geomspace(low, high * BEYOND, 60)
    for index, (axis, name) in enumerate(zip(axes, ("parameters", "tokens"), strict=True)):
        for approach, found in result.approaches.items():
            law: LawEstimate = getattr(found, name)
            if not np.isfinite(law.exponent.value):
                continue
            color, label = _APPROACHES[approach], f"{approach}: C^{_interval(law.exponent)}"
            _band(axis, flops, [law.at(c, result.options.level) for c in flops], color, label)
            axis.plot(found.points["flops"], found.points[name], ".", color=color, markersize=4)
        label = f"law: C^{_interval(result.exponents['ab'[index]])}"
        values = [result.optimum(c)[index] for c in flops]
        _band(axis, flops, values, _APPROACHES["parametric"], label)
        axis.axvline(high, color="0.7", linewidth=0.8, linestyle=":", label="end of the table")
        label = parameters_label(result) if name == "parameters" else name
        axis.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=f"best {label}")
        axis.legend(**_BELOW)
    return figure


def held_out_figure(result: Result) -> Figure:
    """The largest size, measured, and predicted by all smaller ones."""
    held = result.held_out
    assert held is not None, "every_figure asks"
    figure, [[axis]] = make_figure(size=(6.4, 4.0))
    measured = np.array(held.measured)
    ends = np.array([(p.value, p.low, p.high) for p in held.predicted])
    middle, low, high = 100 * (ends.T / measured - 1)
    axis.errorbar(held.tokens, middle, [middle - low, high - middle], fmt="o", capsize=4)
    for tokens, value, loss in zip(held.tokens, middle, measured, strict=True):
        text = f"  {value:+.2f}%\n  of {loss:.3f}"
        axis.annotate(text, (tokens, value), fontsize=8, va="center")
    axis.axhline(0, color="C1", label="measured")
    axis.set(xscale="log", xlabel="tokens", ylabel="predicted above measured (%)")
    axis.set_title(
        f"{format_quantity(held.parameters)} parameters, {held.flops_distance:.1f} times the FLOPs "
        "of what was fitted",
        fontsize=10,
    )
    axis.legend(**_BELOW)
    axis.margins(x=0.15)
    return figure


def settings_figure(result: Result) -> Figure:
    """The laws of learning rate and batch size, with the optima that they go through."""
    found = {n: s for n, s in result.settings.items() if _varies(s)}
    figure, [axes] = make_figure(columns=len(found), size=(5.6, 4.4))
    for axis, (name, setting) in zip(axes, found.items(), strict=True):
        points = setting.points
        x = np.geomspace(min(points["x"]), max(points["x"]) * BEYOND, 60)
        values = [setting.law.at(v, result.options.level) for v in x]
        _band(axis, x, values, "C0", f"{setting.variable}^{_interval(setting.law.exponent)}")
        axis.plot(points["x"], points["best"], "o", color="0.2", markersize=4)
        word = "best" if setting.kind == "swept" else "as run:"
        axis.set(xscale="log", yscale="log", xlabel=setting.variable)
        axis.set_ylabel(f"{word} {name.replace('_', ' ')}")
        axis.legend(**_BELOW)
    return figure


def _varies(setting: Setting) -> bool:
    """True if there is a law, and not of one value that was used throughout."""
    best = setting.points["best"]
    return bool(np.isfinite(setting.law.exponent.value) and max(best) > 1.001 * min(best))


def _least_loss(result: Result, flops: float) -> Estimate:
    """The law's least loss of a budget, without the noise of runs."""
    law, laws = result.law, result.laws
    size, tokens = laws.optimum(flops, result.factor)
    value = law.loss(*law.optimum(flops, result.factor))[0]
    replicates = laws.loss(size[:, None], tokens[:, None])[:, 0]
    return intervals.estimate(value, replicates, result.options.level)


def _band(axis: Axes, x: np.ndarray, values: Sequence[Estimate], color: str, label: str) -> None:
    axis.plot(x, [v.value for v in values], color=color, label=label, linewidth=1.5)
    low, high = [v.low for v in values], [v.high for v in values]
    axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _interval(found: Estimate) -> str:
    return format_estimate(found, ".3f")


def _scatter_by_size(axis: Axes, table: Table, x: np.ndarray, y: np.ndarray) -> PathCollection:
    names = [format_quantity(size) for size in means(table.parameters, table.sizes())]
    return _scatter(axis, x, y, table.sizes(), names, "parameters")


def _scatter(
    axis: Axes,
    x: np.ndarray,
    y: np.ndarray,
    numbers: np.ndarray,
    names: Sequence[str],
    title: str,
) -> PathCollection:
    """Draw points [n] in the colour of their group, numbers [n], from dark to light, and the names
    of up to ten groups on a scale beside the axis.
    """
    from matplotlib.colors import ListedColormap

    colors = ListedColormap(shades(len(names)))
    dots = axis.scatter(x, y, 16, numbers, cmap=colors, vmin=-0.5, vmax=len(names) - 0.5)
    ticks = np.unique(np.linspace(0, len(names) - 1, 10).round().astype(int))
    scale = axis.figure.colorbar(dots, ax=axis, ticks=ticks, label=title, aspect=40)
    scale.ax.set_yticklabels([names[int(i)] for i in ticks], fontsize=8)
    return dots
