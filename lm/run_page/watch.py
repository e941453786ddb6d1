"""The live view of a run in a terminal, drawn by rich from the files of the run's folder alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lm.exit_codes import restarts
from lm.run_page import folder
from lm.run_page.folder import RunFolder
from lm.storage import files, growing
from lm.storage.paths import is_url
from lm.telemetry import goodput, jsonl
from lm.telemetry.jsonl import Record
from lm.telemetry.metrics import ERROR_SUFFIX, short_names
from lm.telemetry.progress import SEPARATOR, format_duration, format_quantity

SECONDS, BUCKET_SECONDS = 2.0, 15.0  # between two looks
LOG_FILE = "log.txt"  # of a sweep's run
TAIL_BYTES = 20_000
FIXED_LINES = 12  # of a frame, without its last lines
_BARS = "▁▂▃▄▅▆▇█"
_COLORS = {
    folder.FINISHED: "green",
    folder.RUNNING: "cyan",
    folder.STOPPED: "yellow",
    folder.FAILED: "red",
    folder.UNKNOWN: "yellow",
}


class LineFollower:
    """Reader of growing files of lines that parses only what is new since its last look."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[bytes, list[Record]]] = {}

    def __call__(self, path: str) -> list[Record]:
        before, records = self._known.get(path, (b"", []))
        content = growing.read(path)
        content = content[: content.rfind(b"\n") + 1]
        if not content.startswith(before):  # a rollback has dropped records
            before, records = b"", []
        records = records + jsonl.parse(content[len(before) :])
        self._known[path] = content, records
        return records


def watch(workdir: str, *, once: bool = False, every: float | None = None) -> None:
    """Draw the run until it ends or Ctrl-C; one frame where `once`, or where nobody looks at a
    terminal.

    every: seconds between two looks; None: `SECONDS`, in a bucket `BUCKET_SECONDS`.

    Raises:
        NoRun: the folder is not there, or, for one frame, holds no run.
    """
    console = Console()
    if not files.is_folder(workdir):
        raise folder.NoRun(f"{workdir} is not there")
    if once or not console.is_terminal:
        run = RunFolder(workdir)
        run.check()
        console.print(frame(run, console.size.height))
        return
    pause = every or (BUCKET_SECONDS if is_url(workdir) else SECONDS)
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        for run in _looks(workdir):
            view = frame(run, console.size.height)
            # two columns are left for the ^C that a terminal writes, which else begins a new line
            live.update(Constrain(view, console.size.width - 3), refresh=True)
            if has_ended(run):
                return
            time.sleep(pause)


def _looks(workdir: str) -> Iterator[RunFolder]:
    reader = LineFollower()
    while True:
        yield RunFolder(workdir, reader)


def has_ended(run: RunFolder) -> bool:
    """True where the last attempt has ended with a code after which no launcher starts another."""
    code = run.attempts[-1].get("code") if run.attempts else None
    return code is not None and not restarts(code)


def frame(run: RunFolder, height: int = 40) -> RenderableType:
    """The view of a run, for a terminal of `height` lines."""
    state = run.state()
    title = Text.assemble((run.name, "bold"), "  ", (state.kind, f"bold {_COLORS[state.kind]}"))
    parts: list[RenderableType] = [Text(state.text, style="dim")]
    if run.num_steps:
        parts.append(_progress(run))
    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    if losses := [r["loss"] for r in run.train if "loss" in r]:
        rows.add_row("loss", _Sparkline(losses, f" {losses[-1]:.4f}"))
    for label, text in _facts(run):
        rows.add_row(label, text)
    parts.append(rows)
    lines = last_lines(run, max(3, height - FIXED_LINES - rows.row_count))
    if lines:
        parts.append(Text("\n".join(lines), style="dim", overflow="ellipsis", no_wrap=True))
    return Panel(Group(*parts), title=title, title_align="left", padding=(0, 1))


def _progress(run: RunFolder) -> Table:
    total, grid = run.num_steps or 1, Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    left = time_left(run)
    note = f"{format_duration(left)} left" if left else ""
    bar = ProgressBar(total=total, completed=min(run.step, total))
    grid.add_row(f"step {run.step:,} of {total:,}", bar, f"{100 * run.step / total:.1f}% {note}")
    return grid


def time_left(run: RunFolder) -> float | None:
    """Seconds to the last step at the speed of the last log window; None where it is unknown."""
    last = [r["step"] for r in run.train[-2:]]
    seconds = run.train[-1].get("seconds") if run.train else None
    if not seconds or not run.num_steps or run.num_steps <= run.step:
        return None
    steps = last[-1] - (last[0] if len(last) > 1 else 0)
    return (run.num_steps - run.step) * seconds / steps if steps > 0 else None


def _facts(run: RunFolder) -> Iterator[tuple[str, str]]:
    """(label, text) of speed, optimizer, goodput, last evaluation and what went wrong."""
    if run.train:
        last = run.train[-1]
        speed = []
        if "tokens_per_second" in last:
            speed.append(f"{format_quantity(last['tokens_per_second'])} tokens/s")
        if "mfu" in last:
            speed.append(f"{100 * last['mfu']:.1f}% MFU")
        if "tokens_seen" in last:
            speed.append(f"{format_quantity(last['tokens_seen'])} tokens seen")
        if devices := run.overview.get("devices"):
            speed.append(devices)
        yield "speed", SEPARATOR.join(speed)
        if "grad_norm" in last:
            rate = f"{SEPARATOR}learning rate {last.get('learning_rate', 0.0):.3g}"
            yield "optimizer", f"gradient norm {last['grad_norm']:.3g}{rate}"
    if run.goodput:
        report = goodput.report(run.goodput)
        yield "goodput", str(report).removeprefix("goodput ")
        if report.energy is not None:
            yield "energy", str(report.energy)
    if run.evals:
        yield from _evaluations(run.evals)
    if run.evaluations:
        yield from _evaluations(run.evaluations)
    skipped = int(sum(r.get("skipped", 0) for r in run.train))
    evidence = run.names("evidence")
    if skipped or evidence:
        reports = (
            f"{SEPARATOR}{len(evidence)} reports in {run.workdir}/evidence" if evidence else ""
        )
        yield "bad steps", f"{skipped} updates skipped{reports}"


def _evaluations(evals: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """(label, text) of the last evaluation of each source."""
    names = short_names(sorted({r["source"] for r in evals}))
    for record in {r["source"]: r for r in evals}.values():
        hidden = ("tokens", "seconds")
        values = {k: v for k, v in record.items() if isinstance(v, float) and k not in hidden}
        errors = {k: f" ± {v:.2g}" for k, v in values.items() if k.endswith(ERROR_SUFFIX)}
        text = SEPARATOR.join(
            f"{k} {v:.4g}{errors.get(k + ERROR_SUFFIX, '')}"
            for k, v in values.items()
            if k not in errors
        )
        yield f"eval {record['step']:,}", f"{names[record['source']]}{SEPARATOR}{text}"


def last_lines(run: RunFolder, count: int) -> list[str]:
    """The end of the run's log where its folder has one, else its last records and starts."""
    if LOG_FILE in run.names(""):
        path = f"{run.workdir}/{LOG_FILE}"
        start = max(0, files.stat(path).size - TAIL_BYTES)
        text = files.read_bytes(path, start).decode(errors="replace")
        # a progress line is redrawn in place
        lines = [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()]
        return lines[-count:]
    found = [_record_line(r) for r in run.metrics[-count:]]
    if run.attempts and (error := run.attempts[-1].get("error")):
        found.append(f"error: {error}")
    return found[-count:]


def _record_line(record: Record) -> str:
    keys = [k for k, v in record.items() if isinstance(v, float)]
    kept = ("loss", "bits_per_byte", "grad_norm", "tokens_per_second")
    values = [f"{k.replace('_', ' ')} {record[k]:.4g}" for k in kept if k in keys]
    name = "eval" if record["kind"] == "eval" else "step"
    return SEPARATOR.join([f"{name} {record['step']:,}", *values])


class _Sparkline:
    """A line of bars as wide as its cell, the means of as many intervals of the values."""

    def __init__(self, values: Sequence[float], note: str) -> None:
        self._values, self._note = values, note

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(sparkline(self._values, options.max_width - len(self._note)) + self._note)


def sparkline(values: Sequence[float], width: int) -> str:
    """Bars of the means of at most `width` intervals, cut above the 97th percentile: the first
    losses of a run are far above all others.
    """
    finite = np.asarray([v for v in values if np.isfinite(v)])
    if not len(finite) or width < 1:
        return ""
    means = np.array([part.mean() for part in np.array_split(finite, min(width, len(finite)))])
    low, high = means.min(), np.percentile(means, 97)
    scaled = np.clip((means - low) / (high - low or 1.0), 0.0, 1.0) * (len(_BARS) - 1)
    return "".join(_BARS[round(x)] for x in scaled)
