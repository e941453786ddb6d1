"""A plan as a page for the terminal."""

from __future__ import annotations

import re
import textwrap

from lm.planning import topology
from lm.planning.memory import GROUPS, Line
from lm.planning.plan import Plan
from lm.planning.search import Found
from lm.planning.sizing import Sizes
from lm.telemetry.progress import format_quantity

WIDTH = 100
SEARCH = "--search compiles other meshes, remat policies and micro-batches and finds what fits"
BAR = 24
GIB = 2**30


def page(plan: Plan) -> str:
    """The whole report."""
    parts = [
        _title(plan),
        _memory(plan),
        _buffers(plan),
        _traffic(plan),
        _time(plan),
        _list("warnings", plan.warnings),
        SEARCH if plan.step == "train" and not plan.fits else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(plan: Plan) -> str:
    """One line: whether it fits, and by how much."""
    if plan.capacity is None:
        return f"needs {_bytes(plan.memory.total)} on each device"
    used, capacity = _bytes(plan.memory.total), _bytes(plan.capacity)
    if plan.fits:
        return f"fits: {used} of {capacity} on each device, {_bytes(plan.headroom or 0)} free"
    least = "at least " if plan.refusal else ""
    too_much = _bytes(-(plan.headroom or 0))
    return f"DOES NOT FIT: needs {least}{used}, has {capacity} on each device: {too_much} too much"


def days(plan: Plan, tokens: float) -> str:
    """The days of a run of so many tokens, and the tokens of a day."""
    if not plan.times.lower_bound_s or plan.step != "train":
        return f"no published peaks for {plan.topology}: no rate"
    fast, slow = (
        tokens / plan.tokens * t / 86400
        for t in (plan.times.lower_bound_s, plan.times.upper_bound_s)
    )
    rate = (plan.tokens / t * 86400 for t in (plan.times.upper_bound_s, plan.times.lower_bound_s))
    daily = " to ".join(format_quantity(r) for r in rate)
    return (
        f"{daily} tokens a day: {format_quantity(tokens)} tokens take {fast:.1f} to {slow:.1f} days"
    )


def search_page(found: Found) -> str:
    """The plans that a search compiled, the winner first, and why the others lost."""
    rows = []
    for candidate in found.compiled:
        plan, guess = candidate.plan, candidate.estimate
        mark = "* " if candidate is found.winner else "  "
        rows.append(f"{mark}{candidate.flags}")
        formula = f"by formula {_bytes(guess.memory)}, {duration(guess.seconds)}"
        if plan is not None and plan.fits:
            low, high = plan.times.lower_bound_s, plan.times.upper_bound_s
            rows.append(
                f"      {_bytes(plan.memory.total)}, step {duration(low)} to {duration(high)}"
                f"{_mfu(plan)} ({formula})"
            )
        if candidate.lost:
            rows.append(f"      {candidate.lost}" + ("" if plan and plan.fits else f" ({formula})"))
    left = [f"  {count} candidates {reason}" for reason, count in found.pruned.items()]
    head = "search: the fastest that fits (*), by the middle of its interval"
    nothing = [] if found.winner else ["nothing that was compiled fits"]
    return "\n".join([head, *rows, *left, *nothing, ""])


def sizes_page(found: Sizes) -> str:
    """The sizes that were tried, from small to large, the winner marked."""
    rows = []
    for trial in found.trials:
        rows.append(f"{'* ' if trial is found.winner else '  '}{trial.flags}")
        if trial.plan is None:
            rows.append(f"      {trial.refused}")
            continue
        rows.append(f"      {verdict(trial.plan)}")
        if trial.plan.fits and trial.plan.times.lower_bound_s:
            rows.append(f"      {_rate(trial.plan)}")
    nothing = [] if found.winner else ["nothing that was tried fits"]
    return "\n".join([f"{found.wanted} (*)", *rows, *nothing, ""])


def title(plan: Plan) -> str:
    return f"{plan.name or 'plan'} on {plan.topology}: {verdict(plan)}"


def subject(plan: Plan) -> str:
    """The planned step: parameters, its rows, devices and mesh."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
    chips_of = f"{plan.num_chips} chip{'s' * (plan.num_chips > 1)}"
    if plan.num_devices != plan.num_chips:
        chips_of += f" ({plan.num_devices} devices)"
    what = (
        f"train step of {plan.rows} rows x {plan.length} tokens"
        if plan.step == "train"
        else f"decode step of {plan.rows} rows, cache of {plan.length} tokens"
    )
    return f"{format_quantity(plan.parameters)} parameters, {what}; {chips_of}, mesh {mesh}"


def _title(plan: Plan) -> str:
    seconds, cpu_seconds = plan.compile_seconds, plan.compile_cpu_seconds
    compiled = f"compiled in {seconds:.0f} s ({cpu_seconds:.0f} s of CPU)"
    return "\n".join([title(plan), subject(plan), compiled])


def _memory(plan: Plan) -> str:
    total = plan.memory.total
    scale = max(total, plan.capacity or 0)
    rows = []
    for group, meaning in GROUPS.items():
        size = plan.memory.groups.get(group, 0)
        if size > total / 10_000:
            rows.append(f"  {group:18} {_bytes(size):>10}  {_bar(size / scale)}  {meaning}")
    rows.append(f"  {'total':18} {_bytes(total):>10}  {_bar(total / scale)}")
    if plan.capacity:
        rows.append(f"  {'HBM':18} {_bytes(plan.capacity):>10}{_share(plan)}")
    if plan.memory.host:
        rows.append(f"  {'host memory':18} {_bytes(plan.memory.host):>10}")
    return "\n".join(["memory of a device at the peak", *rows])


def _share(plan: Plan) -> str:
    """Memory of a GPU of which the capacity is a share."""
    chip = topology.parse(plan.topology).chip
    if chip.platform != "gpu":
        return ""
    part = (plan.capacity or 0) / chip.memory
    return f"  {part:.0%} of {_bytes(chip.memory)}: XLA_CLIENT_MEM_FRACTION"


def _buffers(plan: Plan) -> str:
    def rows(lines: tuple[Line, ...]) -> list[str]:
        return [
            f"  {_bytes(line.bytes):>10}  {line.shape:28} {line.group:18} "
            f"{short(line.op)}{'  ' + line.source if line.source else ''}"
            for line in lines
        ]

    largest = rows(plan.memory.largest)
    temporary = rows(
        tuple(t for t in plan.memory.largest_temporary if t not in plan.memory.largest)
    )
    more = ["largest of the rest of the heap", *temporary[:6]] if temporary else []
    return "\n".join(["largest buffers", *largest, *more])


def _traffic(plan: Plan) -> str:
    if not plan.transfers:
        return ""
    rows = []
    scale = max(t.bytes for t in plan.transfers)
    for t in plan.transfers:
        if t.bytes < scale / 1000:
            continue
        least = "?" if t.seconds is None else duration(t.seconds)
        where = "network" if t.network else "links"
        rows.append(
            f"  {t.kind:20} {t.axis:14} {_bytes(t.bytes):>10}  {_bar(t.bytes / scale)} "
            f"{t.count:6.0f} x {t.size:<4} {least:>9} {where:8} {t.source}"
        )
    head = "traffic: what a device sends in a step, by collective and mesh axis (count x devices)"
    return "\n".join([head, *rows])


def _time(plan: Plan) -> str:
    parts = plan.times.parts()
    flops = f"products of {format_quantity(plan.work.flops)}FLOP on each device"
    if plan.model_flops:
        ratio = plan.work.flops / plan.model_flops
        flops += f", {ratio:.2f} times the model's {format_quantity(plan.model_flops)}FLOP"
    if not parts:
        return f"time: no published peaks for {plan.topology}\n  {flops}"
    longest = max(parts.values())
    rows = [
        f"  {name:22} {duration(t):>10}  {_bar(t / longest)}"
        f"{'  binds' if name == plan.times.bottleneck else ''}"
        for name, t in parts.items()
    ]
    lines = [f"  {_rate(plan)}", f"  {flops}"]
    return "\n".join(["time of a step, from published peaks", *rows, *lines])


def _rate(plan: Plan) -> str:
    """Step time, tokens a second and MFU, each from all overlapped to nothing overlapped."""
    low, high = plan.times.lower_bound_s, plan.times.upper_bound_s
    return (
        f"step {duration(low)} (all overlaps) to {duration(high)} (nothing does): "
        f"{format_quantity(plan.tokens / high)} to {format_quantity(plan.tokens / low)} tokens/s"
        f"{_mfu(plan)}"
    )


def _mfu(plan: Plan) -> str:
    mfu = plan.mfu_bounds
    return "" if mfu is None or mfu[1] < 5e-4 else f", MFU {mfu[0]:.1%} to {mfu[1]:.1%}"


def _list(title: str, items: tuple[str, ...] | list[str]) -> str:
    if not items:
        return ""
    rows = []
    for item in items:
        for i, line in enumerate(item.split("\n")):
            start = "  - " if i == 0 else "      "
            rows.append(
                textwrap.fill(
                    line,
                    WIDTH,
                    initial_indent=start,
                    subsequent_indent="    ",
                    break_on_hyphens=False,
                    break_long_words=False,
                )
            )
    return "\n".join([title, *rows])


def short(op: str) -> str:
    """The telling part of an operation's path."""
    direction = "backward " if "transpose(" in op else ""
    op = re.sub(r"^state\.", "", op)
    op = re.sub(r"\['([^']*)'\]", r".\1", op)
    op = re.sub(r"\bjit\(_train_step\)/|closed_call/|checkpoint/|while/body/|shard_map/", "", op)
    op = re.sub(r"transpose\(jvp\([\w.]*\)\)/|jvp\([\w.]*\)/", "", op)
    op = op.replace("rematted_computation/", "again: ")
    words = (direction + op).split("/")
    return "/".join(words[-4:]) if len(words) > 4 else direction + op


def _bar(share: float) -> str:
    """A bar of eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * BAR * 8)
    full, part = divmod(eighths, 8)
    text = "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")
    return f"{text:{BAR}}"


def _bytes(n: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} B"


def duration(t: float) -> str:
    if t >= 1:
        return f"{t:.2f} s"
    return f"{t * 1e3:.2f} ms" if t >= 1e-3 else f"{t * 1e6:.1f} µs"
