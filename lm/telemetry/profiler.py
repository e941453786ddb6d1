"""Profile of a window of steps: traces for xprof, the longest operations and the idle share."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from lm.storage import files

LONGEST = 10  # operations that are shown


@dataclasses.dataclass(frozen=True)
class Operation:
    """One run of an operation on a device; times in nanoseconds."""

    name: str
    device: str
    thread: str  # operations of one thread nest
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class ProfileSummary:
    """Shares of the time between the first operation and the last one's end."""

    seconds: float  # that time
    idle: float  # share in which a device runs no operation, the mean over devices
    # (name, share of the time of all operations without those inside them, runs), longest first
    longest: list[tuple[str, float, int]]

    def __str__(self) -> str:
        lines = [f"{100 * share:6.1f}%  {name} × {runs}" for name, share, runs in self.longest]
        title = f"devices idle for {100 * self.idle:.1f}% of {self.seconds:.4g} s; operations:"
        return "\n".join([title, *lines])


def operations(xplane: bytes) -> list[Operation]:
    """Return the operations of a trace, the content of an .xplane.pb file.

    TPUs have a line of them, GPUs streams of kernels that name their operation, and CPUs the
    threads of the host.
    """
    found = []
    for plane in jax.profiler.ProfileData.from_serialized_xspace(xplane).planes:
        is_device = plane.name.startswith("/device:")
        tpu_lines = [line for line in plane.lines if is_device and line.name == "XLA Ops"]
        for line in tpu_lines or plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if not tpu_lines and "hlo_op" not in stats:
                    continue
                name = str(stats.get("hlo_op", event.name)).partition(" = ")[0].lstrip("%")
                device = plane.name if is_device else f"host {stats.get('device_ordinal', 0)}"
                thread, start = f"{plane.name} {line.name}", event.start_ns
                found.append(Operation(name, device, thread, start, start + event.duration_ns))
    return found


def summarize(found: Iterable[Operation]) -> ProfileSummary | None:
    """Return the summary of operations; None where there are none."""
    ordered = sorted(found, key=lambda op: (op.start, -op.end))
    if not ordered:
        return None
    own, busy = (
        collections.defaultdict[str, float](float),
        collections.defaultdict[str, float](float),
    )
    runs, until = collections.Counter[str](), dict[str, float]()
    open_: dict[str, list[Operation]] = collections.defaultdict(list)  # in each thread
    for op in ordered:
        outer = open_[op.thread]
        while outer and outer[-1].end <= op.start:
            outer.pop()
        if outer:
            own[outer[-1].name] -= op.end - op.start
        outer.append(op)
        own[op.name] += op.end - op.start
        runs[op.name] += 1
        covered = max(op.start, until.get(op.device, op.start))
        busy[op.device] += max(0.0, op.end - covered)
        until[op.device] = max(op.end, covered)
    span = max(until.values()) - ordered[0].start
    total = sum(own.values())
    idle = 1 - sum(busy.values()) / len(busy) / span if span else 0.0
    names = sorted(own, key=lambda name: -own[name])[:LONGEST]
    longest = [(name, own[name] / total, runs[name]) for name in names if total]
    return ProfileSummary(span / 1e9, idle, longest)


class Profiler:
    """Profiler of the steps of `window`, a context; its end, whatever the reason, ends a profile.

    Each process writes its trace below WORKDIR/profile, as xprof and TensorBoard read it.
    """

    def __init__(
        self, workdir: str, window: range, show: Callable[[str], object] | None = None
    ) -> None:
        """show: called with the summary; None: no summary is made."""
        self._folder, self._window, self._show = f"{workdir}/profile", window, show
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
                    summary = summarize(operations(path.read_bytes()))
                    self._show(f"profile of steps {steps}: {target}; {summary or 'no operations'}")

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with contextlib.suppress(*([OSError] if error else [])):  # the first error is the one
            self.stop()
