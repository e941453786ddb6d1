"""A plan as a page for the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from lm.compiled import topology
from lm.compiled.memory import GROUPS, Line
from lm.planning.plan import Plan, Trials
from lm.planning.save_cost import SaveCost
from lm.telemetry.progress import format_quantity

WIDTH = 100
SEARCH = "--search compiles other meshes, remat policies and micro-batches and finds what fits"
BAR = 24


def page(plan: Plan) -> str:
    """The whole report."""
    largest = plan.memory.largest
    rest = [line for line in plan.memory.largest_temporary if line not in largest]
    peaks = "of a step, from" if plan.times.parts() else f"on {plan.topology}: no"
    sections = {
        title(plan): _step(plan),
        "memory of a device at the peak": _memory(plan),
        "largest buffers": map(_buffer, largest),
        "largest of the rest of the heap": map(_buffer, rest[:6]),
        "traffic: what a device sends in a step, by mesh axis (count x devices)": _traffic(plan),
        f"time {peaks} published peaks": _time(plan),
        "warnings": _wrapped(plan.warnings),
    }
    lines = {head: list(rows) for head, rows in sections.items()}
    parts = ["\n".join([head, *rows]) for head, rows in lines.items() if rows]
    parts += [SEARCH] if plan.step == "train" and not plan.fits else []
    return "\n\n".join(parts) + "\n"


def title(plan: Plan) -> str:
    return f"{plan.name or 'plan'} on {plan.topology}: {verdict(plan)}"


def verdict(plan: Plan) -> str:
    """One line: whether it fits, and by how much."""
    used = format_bytes(plan.memory.total)
    if plan.capacity is None:
        return f"needs {used} on each device"
    capacity, free = format_bytes(plan.capacity), plan.headroom or 0
    if plan.fits:
        return f"fits: {used} of {capacity} on each device, {format_bytes(free)} free"
    least, missing = "at least " if plan.refusal else "", format_bytes(-free)
    return f"DOES NOT FIT: needs {least}{used}, has {capacity} on each device: {missing} too much"


def checkpoint(cost: SaveCost, gigabytes_per_second: float) -> str:
    """The cost of a checkpoint where each host moves so much to and from storage."""
    writing, reading = (
        duration(size / (gigabytes_per_second * 1e9)) for size in (cost.written, cost.read_back)
    )
    hosts = f"{cost.num_hosts:,} host{'s' * (cost.num_hosts > 1)}"
    rows = [
        f"checkpoint, before compression, at {gigabytes_per_second:g} GB/s a host (--storage-gbs)",
        f"  all                {format_bytes(cost.total):>10}  from {hosts}",
        f"  a host writes      {format_bytes(cost.written):>10}  {writing}, while training goes on",
        f"  and reads back     {format_bytes(cost.read_back):>10}  {reading} at most",
        f"  host memory        {format_bytes(cost.host_memory):>10}  at most",
    ]
    return "\n".join(rows)


def days(plan: Plan, tokens: float) -> str:
    """The days of a run of so many tokens, and the tokens of a day."""
    if not plan.times.lower_bound_s or plan.step != "train":
        return f"no published peaks for {plan.topology}: no rate"
    bounds = (plan.times.lower_bound_s, plan.times.upper_bound_s)
    fast, slow = (tokens / plan.tokens * t / 86400 for t in bounds)
    high, low = (format_quantity(plan.tokens / t * 86400) for t in bounds)
    all_tokens = f"{format_quantity(tokens)} tokens take {fast:.1f} to {slow:.1f} days"
    spent = _energy(plan, tokens / plan.tokens)
    return f"{low} to {high} tokens a day: {all_tokens}" + (f" and {spent}" if spent else "")


def trials_page(found: Trials) -> str:
    """The plans that a search made, the winner marked, and why the others lost."""
    rows = [f"{found.wanted} (*)"]
    for trial in found.trials:
        plan, remarks = trial.plan, list(trial.remarks)
        if plan is not None:
            rate = [_rate(plan)] if plan.fits and plan.times.lower_bound_s else []
            remarks = [verdict(plan), *rate, *remarks]
        mark = "*" if trial is found.winner else " "
        rows += [f"{mark} {trial.flags}", *(f"      {remark}" for remark in remarks)]
    rows += [f"  {count} candidates {reason}" for reason, count in found.pruned.items()]
    rows += [] if found.winner else ["nothing that was tried fits"]
    return "\n".join([*rows, ""])


def subject(plan: Plan) -> str:
    """The planned step: parameters, its rows, devices and mesh."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
    chips = f"{plan.num_chips} chip{'s' * (plan.num_chips > 1)}"
    if plan.num_devices != plan.num_chips:
        chips += f" ({plan.num_devices} devices)"
    what = (
        f"train step of {plan.rows} rows x {plan.length} tokens"
        if plan.step == "train"
        else f"decode step of {plan.rows} rows, cache of {plan.length} tokens"
    )
    return f"{format_quantity(plan.parameters)} parameters, {what}; {chips}, mesh {mesh}"


def _step(plan: Plan) -> Iterator[str]:
    yield subject(plan)
    seconds, cpu_seconds = plan.compile_seconds, plan.compile_cpu_seconds
    yield f"compiled in {seconds:.0f} s ({cpu_seconds:.0f} s of CPU)"


def _memory(plan: Plan) -> Iterator[str]:
    total, capacity = plan.memory.total, plan.capacity or 0
    scale = max(total, capacity)
    sizes = {name: plan.memory.groups.get(name, 0) for name in GROUPS} | {"total": total}
    for name, size in sizes.items():
        if size > total / 10_000:
            meaning = f"  {GROUPS.get(name, '')}".rstrip()
            yield f"  {name:18} {format_bytes(size):>10}  {_bar(size / scale)}{meaning}"
    if capacity:
        chip, share = topology.parse(plan.topology).chip, ""
        if chip.platform == "gpu":
            part, whole = capacity / chip.memory, format_bytes(chip.memory)
            share = f"  {part:.0%} of {whole}: XLA_CLIENT_MEM_FRACTION"
        yield f"  {'HBM':18} {format_bytes(capacity):>10}{share}"
    if plan.memory.host:
        yield f"  {'host memory':18} {format_bytes(plan.memory.host):>10}"


def _buffer(line: Line) -> str:
    source = f"  {line.source}" if line.source else ""
    size = format_bytes(line.bytes)
    return f"  {size:>10}  {line.shape:28} {line.group:18} {short(line.op)}{source}"


def _traffic(plan: Plan) -> Iterator[str]:
    most = max((t.bytes for t in plan.transfers), default=0)
    for t in plan.transfers:
        if t.bytes >= most / 1000:
            least = "?" if t.seconds is None else duration(t.seconds)
            where = "network" if t.network else "links"
            yield (
                f"  {t.kind:20} {t.axis:14} {format_bytes(t.bytes):>10}  {_bar(t.bytes / most)} "
                f"{t.count:6.0f} x {t.size:<4} {least:>9} {where:8} {t.source}"
            )
    if plan.optimizer_transfers:
        parts = [f"{t.kind} {t.axis} {format_bytes(t.bytes)}" for t in plan.optimizer_transfers]
        sent = format_bytes(sum(t.bytes for t in plan.optimizer_transfers))
        times = [t.seconds for t in plan.optimizer_transfers if t.seconds is not None]
        least = f", at least {duration(sum(times))}" if times else ""
        yield f"  of which the optimizer {sent}{least}: {', '.join(parts)}"


def _time(plan: Plan) -> Iterator[str]:
    times = plan.times
    for name, t in times.parts().items():
        binds = "  binds" if name == times.bottleneck else ""
        yield f"  {name:22} {duration(t):>10}  {_bar(t / times.lower_bound_s)}{binds}"
    waits = [
        f"{n} {duration(t)}" for n, t in times.exposed.items() if t > times.lower_bound_s / 200
    ]
    if waits:
        yield f"  of which nothing hides: {', '.join(waits)}"
    if times.lower_bound_s:
        yield f"  {_rate(plan)}"
    if times.lower_bound_s and plan.num_steps:
        spent = _energy(plan, plan.num_steps) or (
            f"unknown: no published power of {plan.topology} (config.log.watts_per_device)"
        )
        yield f"  energy of {plan.num_steps:,} steps {spent}"
    flops, model_flops = plan.work.flops, plan.model_flops
    ratio = ""
    if model_flops:
        ratio = f", {flops / model_flops:.2f} times the model's {format_quantity(model_flops)}FLOP"
    yield f"  products of {format_quantity(flops)}FLOP on each device{ratio}"
    if (known := plan.teacher_flops) and model_flops:
        share = f"{format_quantity(known)}FLOP ({known / model_flops:.1%})"
        yield f"  of the model's, the teacher's forward pass {share}"
    for kind, n in plan.work.narrow_flops.items():
        yield f"  of which in {kind} {format_quantity(n)}FLOP ({n / flops:.1%})"
    if own := plan.work.optimizer_flops:
        yield f"  of which the optimizer {format_quantity(own)}FLOP ({own / flops:.1%})"


def _rate(plan: Plan) -> str:
    """Step time, tokens a second and MFU, each with its bounds."""
    low, high = plan.times.lower_bound_s, plan.times.upper_bound_s
    mfu = plan.mfu_bounds or (0.0, 0.0)
    return (
        f"step {duration(low)} to {duration(high)}: "
        f"{format_quantity(plan.tokens / high)} to {format_quantity(plan.tokens / low)} tokens/s"
        + (f", MFU {mfu[0]:.1%} to {mfu[1]:.1%}" if mfu[1] >= 5e-4 else "")
    )


def _energy(plan: Plan, steps: float) -> str:
    """Energy of so many steps, and its emissions; "" where the power isn't known."""
    if (kwh := plan.kwh(steps)) is None:
        return ""
    low, high = kwh
    text = f"{low:.3g} to {high:.3g} kWh"
    if (grid := plan.gco2e_per_kwh) is not None:
        text += f", {low * grid / 1e3:.3g} to {high * grid / 1e3:.3g} kg CO2e"
    return f"{text} (estimated, at {plan.watts:g} W a device)"


def _wrapped(items: tuple[str, ...]) -> Iterator[str]:
    """A list of sentences, further lines of which are indented."""
    wrapper = textwrap.TextWrapper(
        WIDTH, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    for item in items:
        yield from map(wrapper.fill, f"  - {item}".replace("\n", "\n      ").split("\n"))


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
    full, part = divmod(round(max(0.0, min(1.0, share)) * BAR * 8), 8)
    return f"{'█' * full + ' ▏▎▍▌▋▊▉'[part].strip():{BAR}}"


def format_bytes(n: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(n) >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} B"


def duration(t: float) -> str:
    if t >= 1:
        return f"{t:.2f} s"
    return f"{t * 1e3:.2f} ms" if t >= 1e-3 else f"{t * 1e6:.1f} µs"
