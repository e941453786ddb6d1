"""A plan as one picture: memory against capacity, times against each other, traffic by axis."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from lm.planning import report
from lm.planning.memory import GROUPS
from lm.planning.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30
# Blue for what stays between steps, orange and yellow for what a step makes, grey for overhead.
COLORS = {
    "parameters": "#1f4e79",
    "optimizer": "#2e75b6",
    "cache": "#5b9bd5",
    "batch": "#9dc3e6",
    "outputs": "#bdd7ee",
    "gradients": "#c55a11",
    "saved activations": "#ed7d31",
    "parameter copies": "#f4b183",
    "kernels": "#ffd966",
    "temporaries": "#ffe699",
    "fragmentation": "#d9d9d9",
    "code": "#a6a6a6",
}
KINDS = {
    "all-gather": "#2e75b6",
    "reduce-scatter": "#70ad47",
    "all-reduce": "#c55a11",
    "all-to-all": "#7030a0",
    "ragged-all-to-all": "#a86ed4",
    "collective-permute": "#ffc000",
    "collective-broadcast": "#7f7f7f",
}


def save_picture(plan: Plan, path: str) -> None:
    """Write the picture of a plan to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.2), layout="constrained")
    [[left, right]] = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 1.5))
    _memory(left.subplots(), plan)
    times, traffic = right.subplots(2, 1)
    _times(times, plan)
    _traffic(traffic, plan)
    color = "#2f7d32" if plan.fits else "#b00020"
    figure.suptitle(report.title(plan), color=color, fontsize=13)
    figure.supxlabel(report.subject(plan), fontsize=10)
    figure.savefig(path, dpi=120)


def _name(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _memory(axis: Axes, plan: Plan) -> None:
    """One column, what stays at the bottom; names beside it, spread where they would touch."""
    total = plan.memory.total / GIB
    top = max(total, (plan.capacity or 0) / GIB) * 1.04
    bottom, labels = 0.0, []
    for group in GROUPS:
        size = plan.memory.groups.get(group, 0) / GIB
        if not size:
            continue
        axis.bar(0, size, 0.6, bottom=bottom, color=COLORS[group], edgecolor="white", linewidth=0.6)
        if size > total / 400:
            labels.append((bottom + size / 2, group, size))
        bottom += size
    at = -1.0
    for middle, group, size in labels:
        at = max(middle, at + top * 0.038)
        axis.plot([0.3, 0.38], [middle, at], color="0.6", linewidth=0.7)
        axis.text(0.4, at, f"{group}  {size:.2f}", va="center", fontsize=9)
    if plan.capacity:
        axis.axhline(plan.capacity / GIB, color="#b00020", linestyle="--", linewidth=1.2)
        text = f"HBM {plan.capacity / GIB:.2f}"
        style = {"color": "#b00020", "ha": "right", "va": "bottom", "fontsize": 9}
        axis.text(1.24, plan.capacity / GIB, text, **style)
    axis.set_xlim(-0.35, 1.25)
    axis.set_ylim(0, max(top, at * 1.05))
    axis.set_xticks([])
    axis.set_ylabel("GiB on each device, at the peak")
    _name(axis, f"memory: {total:.2f} GiB")


def _times(axis: Axes, plan: Plan) -> None:
    """A bar for each time, and the step between all overlapped and nothing overlapped."""
    parts = plan.times.parts()
    if not parts:
        axis.set_axis_off()
        axis.set_title(f"time: no published peaks for {plan.topology}", loc="left", fontsize=10)
        return
    parts = {n: t for n, t in parts.items() if t > plan.times.lower_bound_s / 200}
    unit, scale = ("s", 1.0) if plan.times.upper_bound_s >= 1 else ("ms", 1e3)
    names, values = list(parts), [t * scale for t in parts.values()]
    bottleneck = plan.times.bottleneck
    colors = ["#c55a11" if name == bottleneck else "#9dc3e6" for name in names]
    axis.barh(range(1, len(names) + 1), values, 0.6, color=colors)
    low, high = plan.times.lower_bound_s * scale, plan.times.upper_bound_s * scale
    axis.barh(0, high - low, 0.35, left=low, color="#404040")
    for row, value in enumerate(values, 1):
        axis.text(value, row, f" {report.duration(value / scale)}", va="center", fontsize=9)
    axis.text(high, 0, " nothing overlaps", va="center", fontsize=9)
    axis.text(low, 0, "all overlaps ", va="center", ha="right", fontsize=9)
    axis.set_yticks(range(len(names) + 1), ["step", *names])
    axis.invert_yaxis()
    axis.set_xlim(0, high * 1.3)
    axis.set_xlabel(f"{unit} of a step, at published peaks")
    words = f"step {report.duration(low / scale)} to {report.duration(high / scale)}"
    if (mfu := plan.mfu_bounds) is not None:
        words += f", MFU {mfu[0]:.0%} to {mfu[1]:.0%}"
    _name(axis, f"time: {words}; {bottleneck} binds")


def _traffic(axis: Axes, plan: Plan) -> None:
    """A bar for each mesh axis, of its collectives."""
    sums: dict[str, float] = defaultdict(float)
    for t in plan.transfers:
        sums[t.axis] += t.bytes
    axes = [a for a in sorted(sums, key=lambda a: -sums[a]) if sums[a] > max(sums.values()) / 1000]
    if not axes:
        axis.set_axis_off()
        axis.set_title("traffic: none", loc="left", fontsize=10)
        return
    start = dict.fromkeys(axes, 0.0)
    for t in plan.transfers:
        if t.axis not in start or t.bytes < sums[t.axis] / 1000:
            continue
        size, row = t.bytes / GIB, axes.index(t.axis)
        label = t.kind if t.kind not in axis.get_legend_handles_labels()[1] else None
        style = {"color": KINDS[t.kind], "edgecolor": "white", "label": label}
        axis.barh(row, size, 0.6, left=start[t.axis], **style)
        start[t.axis] += size
    for i, name in enumerate(axes):
        axis.text(start[name], i, f" {start[name]:.2f} GiB", va="center", fontsize=9)
    axis.set_yticks(range(len(axes)), axes)
    axis.invert_yaxis()
    axis.set_ylim(max(len(axes), 2) - 0.4, -0.6)
    axis.set_xlim(0, max(start.values()) * 1.2)
    axis.set_xlabel("GiB that a device sends in a step")
    axis.legend(frameon=False, fontsize=9, ncols=4, loc="lower right", bbox_to_anchor=(1.0, 0.98))
    _name(axis, "traffic by mesh axis")
