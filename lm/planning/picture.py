"""A plan as one picture: memory against capacity, times against each other, traffic by axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lm.compiled.memory import GROUPS
from lm.planning import report
from lm.planning.plan import Plan
from lm.telemetry.figures import make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30
BLUE, ORANGE, GREY, RED, GREEN = "#2e75b6", "#c55a11", "#404040", "#b00020", "#2f7d32"


def save_picture(plan: Plan, path: str) -> None:
    """Write the picture of a plan to a PNG file."""
    figure, [[memory, times, traffic]] = make_figure(columns=3, size=(5.4, 4.6))
    _memory(memory, plan)
    _times(times, plan)
    _traffic(traffic, plan)
    figure.suptitle(report.title(plan), color=GREEN if plan.fits else RED, fontsize=13)
    figure.supxlabel(report.subject(plan), fontsize=10)
    figure.savefig(path, dpi=120)


def _memory(axis: Axes, plan: Plan) -> None:
    """A bar for each group; the capacity as a dashed line."""
    total, capacity = plan.memory.total, plan.capacity
    sizes = {name: plan.memory.groups.get(name, 0) for name in GROUPS} | {"total": total}
    shown = {name: size for name, size in sizes.items() if size > total / 400}
    of = f" of {report.format_bytes(capacity)}" if capacity else ""
    title = f"memory: {report.format_bytes(total)}{of}"
    _bars(axis, title, shown, GIB, report.format_bytes, marked="total")
    axis.set_xlabel("GiB on each device, at the peak")
    if capacity:
        axis.axvline(capacity / GIB, color=RED, linestyle="--", linewidth=1.2)


def _times(axis: Axes, plan: Plan) -> None:
    """A bar for each time, and the step between its bounds."""
    times, title = plan.times, f"time: no published peaks for {plan.topology}"
    low, high = times.lower_bound_s, times.upper_bound_s
    unit, seconds = ("s", 1.0) if high >= 1 else ("ms", 1e-3)
    if low:
        title = f"time: step {report.duration(low)} to {report.duration(high)}"
        title += f"; {times.bottleneck} binds"
    if plan.mfu_bounds:
        title += f"\nMFU {plan.mfu_bounds[0]:.0%} to {plan.mfu_bounds[1]:.0%}"
    parts = {name: t for name, t in times.parts().items() if t > low / 200}
    _bars(axis, title, parts, seconds, report.duration, marked=times.bottleneck)
    if parts:
        axis.barh("step", (high - low) / seconds, 0.35, left=low / seconds, color=GREY)
        axis.set_xlabel(f"{unit} at published peaks; step: its bounds by the schedule")


def _traffic(axis: Axes, plan: Plan) -> None:
    """A bar for each kind of collective over a mesh axis."""
    most = max((t.bytes for t in plan.transfers), default=0)
    sizes = {
        f"{t.kind}\n{t.axis}{' (network)' if t.network else ''}": t.bytes
        for t in plan.transfers
        if t.bytes > most / 1000
    }
    title = "traffic by mesh axis" if sizes else "traffic: none"
    _bars(axis, title, sizes, GIB, report.format_bytes)
    axis.set_xlabel("GiB that a device sends in a step")


def _bars(
    axis: Axes,
    title: str,
    sizes: Mapping[str, float],
    unit: float,
    form: Callable[[float], str],
    marked: str = "",
) -> None:
    """Horizontal bars with their names and sizes, from the top down."""
    axis.set_title(title, fontsize=10)
    if not sizes:
        axis.set_axis_off()
        return
    colors = [ORANGE if name == marked else BLUE for name in sizes]
    bars = axis.barh(list(sizes), [size / unit for size in sizes.values()], 0.6, color=colors)
    axis.bar_label(bars, [form(size) for size in sizes.values()], padding=3, fontsize=9)
    axis.margins(x=0.3)
    axis.locator_params(axis="x", nbins=5)
    axis.set_axisbelow(True)
    axis.invert_yaxis()
