"""Profile of a window of steps: traces for xprof, and a table of what the devices did.

The table is made here and not by xprof: its own (`hlo_stats`) has no rows for a CPU's trace, and
its package takes 100 MB.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import socket
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lm.storage import files
from lm.telemetry import hlo_text, jsonl
from lm.telemetry.hlo_text import KINDS, Origin, Program, kind_of

LONGEST = 12  # rows of the table
IDLE = "idle"


@dataclasses.dataclass(frozen=True)
class Operation:
    """One run of an operation on a device; times in nanoseconds."""

    name: str
    device: str
    thread: str  # operations of one thread nest
    start: float
    end: float
    program: str = ""  # "": unknown


@dataclasses.dataclass(frozen=True)
class Row:
    """Operations of one kind from one source line, or of one name where it is unknown."""

    source: str
    kind: str
    name: str  # of the longest of them
    others: int  # number of other names
    share: float  # of the time of all operations, without that of those inside them
    runs: int


@dataclasses.dataclass(frozen=True)
class ProfileSummary:
    """Shares of the time between the first operation and the last one's end."""

    seconds: float  # that time
    # the mean over devices of `compute`; of `communication` beside which nothing is computed; of
    # `host`, transfers and callbacks beside which neither happens; and of `idle`
    shares: dict[str, float]
    longest: list[Row]

    @property
    def idle(self) -> float:
        return self.shares[IDLE]

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {100 * share:.1f}%" for name, share in self.shares.items())
        width = max((len(row.source) for row in self.longest), default=0)
        lines = []
        for row in self.longest:
            more = f" and {row.others} more" if row.others else ""
            where = f"{row.kind:13}  {row.source or '-':{width}}"
            lines.append(f"{100 * row.share:6.1f}%  {where}  {row.name}{more} × {row.runs}")
        title = f"{self.seconds:.4g} s of the devices: {shares}; longest, by source line:"
        return "\n".join([title, *lines])

    def to_dict(self, steps: str) -> dict[str, Any]:
        """The content of profile/steps-N-M.json."""
        rows = [dataclasses.asdict(row) for row in self.longest]
        return {"steps": steps, "seconds": self.seconds, "shares": self.shares, "operations": rows}


def operations(xplane: bytes) -> list[Operation]:
    """Return the operations of a trace, the content of an .xplane.pb file.

    TPUs have a line of them, GPUs streams of kernels that name their operation, and CPUs the
    threads of the host. Copies between a GPU and the host are no operations of a program.
    """
    found = []
    for plane in jax.profiler.ProfileData.from_serialized_xspace(xplane).planes:
        is_device = plane.name.startswith("/device:")
        tpu_lines = [line for line in plane.lines if is_device and line.name == "XLA Ops"]
        for line in tpu_lines or plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                is_copy = is_device and event.name.startswith("Memcpy")
                if not tpu_lines and "hlo_op" not in stats and not is_copy:
                    continue
                name = str(stats.get("hlo_op", event.name)).partition(" = ")[0].lstrip("%")
                device = plane.name if is_device else f"host {stats.get('device_ordinal', 0)}"
                thread, start = f"{plane.name} {line.name}", event.start_ns
                end, program = start + event.duration_ns, str(stats.get("hlo_module", ""))
                found.append(Operation(name, device, thread, start, end, program))
    return found


Key = tuple[str, Origin]  # the name and the origin of an operation
Interval = tuple[float, float]


@dataclasses.dataclass
class _Open:
    """An operation that may have others inside; `since` is the end of the last one of them."""

    key: Key
    device: str
    since: float
    end: float


def summarize(found: Iterable[Operation], program: Program | None = None) -> ProfileSummary | None:
    """Return the summary of operations; None where there are none.

    program: has the source lines of those that are its own.
    """
    ordered = sorted(found, key=lambda op: (op.start, -op.end))
    if not ordered:
        return None
    times: dict[Key, float] = collections.defaultdict(float)
    runs = collections.Counter[Key]()
    busy: dict[str, dict[str, list[Interval]]] = collections.defaultdict(
        lambda: {kind: [] for kind in KINDS}
    )
    open_: dict[str, list[_Open]] = collections.defaultdict(list)  # in each thread

    def own(op: _Open, until: float) -> None:
        """Count the time of an operation up to `until`, its end or the start of an inner one."""
        if until > op.since:
            times[op.key] += until - op.since
            busy[op.device][op.key[1].kind].append((op.since, until))

    for op in ordered:
        outer = open_[op.thread]
        while outer and outer[-1].end <= op.start:
            own(outer[-1], outer[-1].end)
            outer.pop()
        if outer:
            own(outer[-1], op.start)
            outer[-1].since = max(outer[-1].since, op.end)
        key = (op.name, _origin(op, program))
        outer.append(_Open(key, op.device, op.start, op.end))
        runs[key] += 1
    for op in (op for outer in open_.values() for op in outer):
        own(op, op.end)
    span = max(op.end for op in ordered) - ordered[0].start
    shares = _shares(list(busy.values()), span)
    return ProfileSummary(span / 1e9, shares, _rows(times, runs)[:LONGEST])


def _origin(op: Operation, program: Program | None) -> Origin:
    known = program and (not op.program or op.program == program.name)
    found = program.origins.get(op.name) if program and known else None
    return found or Origin(kind_of(op.name))


def _shares(devices: Sequence[Mapping[str, Sequence[Interval]]], span: float) -> dict[str, float]:
    """{kind: share of the span in which a device runs it and no earlier kind, the mean}."""
    totals = dict.fromkeys((*KINDS, IDLE), 0.0)
    for device in devices:
        intervals: list[Interval] = []
        before = 0.0
        for kind in KINDS:
            intervals += device[kind]
            covered = _length(intervals)
            totals[kind] += covered - before
            before = covered
        totals[IDLE] += span - before
    scale = len(devices) * span
    return {kind: total / scale if scale else 0.0 for kind, total in totals.items()}


def _length(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals."""
    total, until = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _rows(times: Mapping[Key, float], runs: Mapping[Key, int]) -> list[Row]:
    """The rows of the table, longest first."""
    total = sum(times.values())
    groups: dict[tuple[str, str], list[Key]] = collections.defaultdict(list)
    for name, origin in times:
        groups[origin.kind, origin.source or name].append((name, origin))
    rows = []
    for (kind, _), keys in groups.items():
        keys.sort(key=lambda key: -times[key])
        (name, origin), seconds = keys[0], sum(times[key] for key in keys)
        count = sum(runs[key] for key in keys)
        if total and seconds > 0:
            rows.append(Row(origin.source, kind, name, len(keys) - 1, seconds / total, count))
    return sorted(rows, key=lambda row: -row.share)


class Profiler:
    """Profiler of the steps of `window`, a context; its end, whatever the reason, ends a profile.

    Each process writes its trace below WORKDIR/profile, as xprof and TensorBoard read it.
    """

    def __init__(
        self,
        workdir: str,
        window: range,
        show: Callable[[str], object] | None = None,
        program: Callable[[], str] | None = None,
    ) -> None:
        """show: called with the summary; None: no summary is made. program: returns the text of the
        compiled step.
        """
        self._folder, self._window = f"{workdir}/profile", window
        self._show, self._program = show, program
        self._first: int | None = None  # step of the profile that is on
        self._next = 0

    @property
    def is_on(self) -> bool:
        return self._first is not None

    def is_over(self, step: int) -> bool:
        """True if a profile is on that ends before step number `step`."""
        return self.is_on and step >= self._window.stop

    def step(self, step: int) -> None:
        """Start a profile where step number `step`, which comes next, is in the window."""
        self._next = step + 1
        if self.is_on or step not in self._window:
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the host down, and the devices with it
        self._local = tempfile.TemporaryDirectory()
        jax.profiler.start_trace(self._local.name, profiler_options=options)
        self._first = step

    def stop(self) -> None:
        """End the profile that is on, if any: write its traces, and show the summary."""
        if self._first is None:
            return
        steps, self._first = f"{self._first}-{min(self._next, self._window.stop) - 1}", None
        jax.profiler.stop_trace()
        with self._local as local:
            target = f"{self._folder}/plugins/profile/steps-{steps}"
            name = f"{socket.gethostname()}-{jax.process_index()}"
            for path in Path(local).glob("plugins/profile/*/*"):
                kind = next(k for k in (".xplane.pb", ".trace.json.gz") if path.name.endswith(k))
                files.write_atomically(f"{target}/{name}{kind}", path.read_bytes())
                if kind == ".xplane.pb" and self._show is not None:
                    program = hlo_text.parse(self._program()) if self._program else None
                    summary = summarize(operations(path.read_bytes()), program)
                    self._show(f"profile of steps {steps}: {target}; {summary or 'no operations'}")
                    if summary:
                        text = jsonl.dumps(summary.to_dict(steps), indent=1)
                        files.write_atomically(f"{self._folder}/steps-{steps}.json", text)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with contextlib.suppress(*([OSError] if error else [])):  # the first error is the one
            self.stop()
