"""What a run writes down: `metrics.jsonl`, TensorBoard events, and one line on the terminal."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import jax
from etils import epath

from lm.telemetry import jsonl
from lm.types import StepInfo, Sums

METRICS_FILE = "metrics.jsonl"
SEPARATOR = " · "  # between the parts of a line of progress


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Per-token means of additive sums, with the count itself under `tokens`. No tokens: zeros.

    What is summed over the tokens of a task, `loss/TASK`, is divided by `tokens/TASK`; a task
    without tokens has no mean.
    """
    tokens = float(sums["tokens"])
    result = {"tokens": tokens}
    for name, value in sums.items():
        count = sums.get(f"tokens/{name.partition('/')[2]}", tokens)
        if not name.startswith("tokens") and (count or count is tokens):
            result[name] = float(value) / max(float(count), 1.0)
    return result


class TensorBoard:
    """Scalars as TensorBoard events, without TensorFlow."""

    def __init__(self, directory: epath.Path) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}"
        self._file = (directory / name).open("wb")
        self._records = RecordWriter(self._file)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        event = event_pb2.Event(step=step, wall_time=time.time())  # pyright: ignore
        event.summary.CopyFrom(
            summary_pb2.Summary(  # pyright: ignore
                value=[{"tag": name, "simple_value": value} for name, value in values.items()]
            )
        )
        self._records.write(event.SerializeToString())
        self._records.flush()


def format_duration(count: float) -> str:
    """1h02m, 3m20s or 12s; ? for nan."""
    if math.isnan(count):
        return "?"
    minutes, rest = divmod(round(count), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_quantity(value: float) -> str:
    """1234567 -> 1.23M."""
    value = float(f"{value:.3g}")  # 999,999 is 1M
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def short_names(sources: Sequence[str], separator: str = "/") -> dict[str, str]:
    """A name for each source (a path, a URL): the fewest last parts of it that no other one ends
    with, so that runs that read the same store in other folders call it the same.

    short_names(["/data/books/validation", "/data/code/validation"]) are books/validation and
    code/validation; a source that is alone is called by its last part.
    """
    parts = {source: source.rstrip(separator).split(separator) for source in sources}
    found = {}
    for source, mine in parts.items():
        others = [p for other, p in parts.items() if other != source]
        counts = range(1, len(mine) + 1)
        count = next((n for n in counts if all(mine[-n:] != p[-n:] for p in others)), None)
        found[source] = separator.join(mine[-count:]) if count else source
    return found


class Progress:
    """One line, drawn over itself on a terminal; elsewhere at most a line every `pause` seconds."""

    def __init__(self, stream: TextIO = sys.stderr, pause: float = 10.0) -> None:
        self._stream, self._pause, self._last = stream, pause, -math.inf
        self._live = stream.isatty()

    @property
    def live(self) -> bool:
        """True if lines are drawn over each other: the stream is a terminal."""
        return self._live

    def show(self, text: str, *, keep: bool = False, final: bool = False) -> None:
        """Draws the line. keep: it stays on a terminal, and the next one is drawn below it; final:
        it also comes at once where lines are `pause` seconds apart.
        """
        now = time.monotonic()
        if self._live:
            shown = _fit(text, shutil.get_terminal_size().columns - 1)
            self._stream.write("\r\x1b[K" + shown + ("\n" if keep or final else ""))
        elif final or now - self._last >= self._pause:
            self._stream.write(text + "\n")
        else:
            return
        self._last = now
        self._stream.flush()

    def clear(self) -> None:
        """Takes the progress line off the terminal."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def note(self, text: str) -> None:
        """A line that stays, above the progress line."""
        self._stream.write(("\r\x1b[K" if self._live else "") + text + "\n")
        self._stream.flush()


def _fit(text: str, width: int) -> str:
    """The first parts of a line, which " · " sets apart, that fit into `width` characters."""
    while len(text) > width and SEPARATOR in text:
        text = text.rpartition(SEPARATOR)[0]
    return text[:width]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """A step whose values have reached the host."""

    step: int  # its number, from 0
    sums: dict[str, float]
    facts: dict[str, Any]
    votes: Any
    seconds: float | None  # since the step before; None after a pause, and for a process's first

    @property
    def bad(self) -> bool:
        return bool(self.facts["bad"])


class DeferredMetrics:
    """Reads the values of a step when the next one is on its way, so devices never wait."""

    def __init__(self) -> None:
        self._pending: tuple[int, Sums, StepInfo, Any] | None = None
        self._clock: float | None = None
        self._paused = False

    def push(self, step: int, sums: Sums, facts: StepInfo, votes: Any = None) -> list[StepResult]:
        """Takes what step number `step` returned; gives the step before it, if there is one."""
        finished = self._read()
        self._pending = (step, sums, facts, votes)
        return finished

    def flush(self) -> list[StepResult]:
        """Waits for the last step, and gives it; what follows is no part of a step's time."""
        finished = self._read()
        self._clock, self._paused = None, True
        return finished

    def resume(self) -> None:
        """Starts the clock again, if it was stopped."""
        if self._paused:
            self._clock, self._paused = time.monotonic(), False

    def drop(self) -> None:
        """Forgets what is pending."""
        self._pending = self._clock = None

    def _read(self) -> list[StepResult]:
        if self._pending is None:
            return []
        (step, *values), self._pending = self._pending, None
        sums, facts, votes = jax.device_get(values)  # waits
        now = time.monotonic()
        seconds = None if self._clock is None else now - self._clock
        self._clock = now
        host = {name: float(value) for name, value in sums.items()}
        return [StepResult(step, host, facts, votes, seconds)]


def _noise(steps: Sequence[StepResult]) -> dict[str, float]:
    """Mean noise and signal of the steps, as `lm.training.gradient_noise_scale` estimates them, and
    their ratio, in tokens. For more steps, divide the mean `noise` of several records by their mean
    `signal`.
    """
    if "noise" not in steps[-1].facts:
        return {}
    found = {n: sum(float(s.facts[n]) for s in steps) / len(steps) for n in ("noise", "signal")}
    if found["signal"] > 0:
        found["noise_scale"] = found["noise"] / found["signal"]
    return found


class Writer:
    """Collects the values of steps and writes their means every few steps.

    Steps whose update was not applied count as `skipped` and stay out of the means. `first_step` is
    where this process starts: what an earlier one wrote of later steps is dropped from
    `metrics.jsonl`, since they will be done again. Only `active` writers (process 0) write.
    """

    def __init__(
        self,
        workdir: str,
        *,
        first_step: int,
        num_steps: int,
        every: int,
        flops_per_token: float | None,
        peak_flops: float | None,
        tensorboard: bool,
        active: bool = True,
    ) -> None:
        self._num_steps, self._every = num_steps, every
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._active = active
        self._window: list[StepResult] = []
        self._speed: _Speed | None = None  # of the last window that has one
        self._learning_rate: float | None = None
        self.progress = Progress()
        self._workdir = workdir
        if active:
            self._file = self._reopen(first_step)
            directory = epath.Path(workdir) / "tensorboard"
            self._tensorboard = TensorBoard(directory) if tensorboard else None

    def _reopen(self, step: int) -> Any:
        """The file, without records of steps after `step`."""
        kept = [record for record in read(self._workdir) if record["step"] <= step]
        return jsonl.reopen(epath.Path(self._workdir) / METRICS_FILE, kept)

    def rewind(self, step: int) -> None:
        """Drops what was written and collected of steps after `step`: they will be done again."""
        self._window = [finished for finished in self._window if finished.step < step]
        if self._active:
            self._file.close()
            self._file = self._reopen(step)

    def is_due(self, done: int) -> bool:
        """Whether a record is written after `done` steps."""
        return done % self._every == 0 or done == self._num_steps

    def train(self, finished: StepResult, **extra: float) -> None:
        """Takes a finished step, and writes a record where one is due."""
        self._window.append(finished)
        if self.is_due(finished.step + 1):
            self._emit(finished.step + 1, extra)
        elif self._active and self.progress.live:
            self.progress.show(self._line([finished], self._speed or _speed(self._window)))

    def eval(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the metrics of every validation source."""
        names = short_names([*results])
        for source, values in results.items():
            record = {"step": step, "kind": "eval", "source": source, **values}
            self._write(record, f"eval/{names[source]}")
            shown = SEPARATOR.join(f"{k} {v:.4g}" for k, v in values.items() if k != "tokens")
            self.note(f"eval {step} · {names[source]} · {shown}")

    def note(self, text: str) -> None:
        """A line that stays on the terminal, above the progress line."""
        if self._active:
            self.progress.note(text)

    def close(self) -> None:
        if self._active:
            self._file.close()

    def _emit(self, step: int, extra: dict[str, float]) -> None:
        window, self._window = self._window, []
        good = [f for f in window if not f.bad]
        record: dict[str, Any] = {}
        if good:
            record = means({n: sum(f.sums[n] for f in good) for n in good[-1].sums})
            record["grad_norm"] = float(good[-1].facts["grad_norm"])
            record |= _noise(good)
        if len(good) < len(window):
            record["skipped"] = len(window) - len(good)
        speed = _speed(window)
        record |= extra | {"seconds": sum(f.seconds or 0.0 for f in window)}
        if speed is not None:
            record["tokens_per_second"] = speed.tokens
            if self._flops_per_token is not None and self._peak_flops:
                record["mfu"] = speed.tokens * self._flops_per_token / self._peak_flops
        self._write({"step": step, "kind": "train", **record}, "train")
        self._speed = speed or self._speed
        self._learning_rate = extra.get("learning_rate", self._learning_rate)
        if self._active:
            self.progress.show(
                self._line(window, self._speed), keep=True, final=step == self._num_steps
            )

    def _line(self, window: Sequence[StepResult], speed: _Speed | None) -> str:
        """The line of progress: what the steps of `window` gave, and how fast they come."""
        done, good = window[-1].step + 1, [f for f in window if not f.bad]
        parts = [f"step {done}/{self._num_steps}"]
        if good:
            tokens = sum(f.sums["tokens"] for f in good)
            parts.append(f"loss {sum(f.sums['loss'] for f in good) / max(tokens, 1.0):.4f}")
        else:
            parts.append("every update skipped" if len(window) > 1 else "update skipped")
        if speed is not None:
            left = (self._num_steps - done) * speed.step_seconds
            parts += [f"{format_quantity(speed.tokens)} tok/s", f"{format_duration(left)} left"]
        parts.append(f"grad norm {float(window[-1].facts['grad_norm']):.3g}")
        if self._learning_rate is not None:
            parts.append(f"lr {self._learning_rate:.2g}")
        if speed is not None and self._flops_per_token is not None:
            flops = speed.tokens * self._flops_per_token
            known = bool(self._peak_flops)
            mfu = 100 * flops / self._peak_flops if self._peak_flops else 0.0
            parts.append(f"{mfu:.1f}% MFU" if known else f"{format_quantity(flops)}FLOP/s")
        return SEPARATOR.join(parts)

    def _write(self, record: dict[str, Any], tag: str) -> None:
        """Writes a record; its numbers are called `tag`/NAME in TensorBoard."""
        if not self._active:
            return
        self._file.write(jsonl.line(record))
        self._file.flush()
        if self._tensorboard is not None:
            values = {f"{tag}/{k}": v for k, v in record.items() if isinstance(v, float)}
            self._tensorboard.write(record["step"], values)


@dataclasses.dataclass(frozen=True)
class _Speed:
    tokens: float  # non-padding tokens a second, scored or not: what model FLOPs are counted for
    step_seconds: float


def _speed(window: Sequence[StepResult]) -> _Speed | None:
    """That of the steps with a time; None where no step has one, as a process's first."""
    timed = [(f.seconds, int(f.facts["filled"])) for f in window if f.seconds is not None]
    elapsed = sum(seconds for seconds, _ in timed)
    if not elapsed:
        return None
    return _Speed(sum(filled for _, filled in timed) / elapsed, elapsed / len(timed))


def read(workdir: str) -> list[dict[str, Any]]:
    """The records of a run's metrics; a last line that a kill has cut is left out."""
    return jsonl.read(epath.Path(workdir) / METRICS_FILE)
