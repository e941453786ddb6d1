"""What a run writes down: `metrics.jsonl`, TensorBoard events, and one line on the terminal."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax
from etils import epath

from lm.types import Sums

# Sums that are divided by the number of scored tokens when they are printed; the rest is printed as the last value.
COUNTS = ("tokens", "steps")


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Per-token means of additive sums, with the count itself under `tokens`. No tokens: zeros."""
    tokens = float(sums["tokens"])
    result = {n: float(v) / max(tokens, 1.0) for n, v in sums.items() if n not in COUNTS}
    return result | {"tokens": tokens}


class TensorBoard:
    """Scalars as TensorBoard events, without TensorFlow."""

    def __init__(self, directory: epath.Path) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{os.getpid()}"
        self._file = (directory / name).open("wb")
        self._records = RecordWriter(self._file)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=scalars))
        self._records.write(event.SerializeToString())
        self._records.flush()


def seconds(count: float) -> str:
    """1h02m, 3m20s or 12s."""
    minutes, rest = divmod(round(count), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def quantity(value: float) -> str:
    """1234567 -> 1.23M."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


class Progress:
    """One line that is drawn over itself on a terminal; elsewhere a new line at most every `pause` seconds."""

    def __init__(self, stream: TextIO = sys.stderr, pause: float = 10.0) -> None:
        self._stream, self._pause, self._last = stream, pause, -math.inf
        self._live = stream.isatty()

    def show(self, text: str, *, final: bool = False) -> None:
        now = time.monotonic()
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[K" + text[:width] + ("\n" if final else ""))
        elif final or now - self._last >= self._pause:
            self._stream.write(text + "\n")
        else:
            return
        self._last = now
        self._stream.flush()

    def note(self, text: str) -> None:
        """A line that stays, above the progress line."""
        self._stream.write(("\r\x1b[K" if self._live else "") + text + "\n")
        self._stream.flush()


class Writer:
    """Collects the sums of steps and writes their means; values are read one step late, so devices never wait.

    `first_step` is where this process starts; what a killed process wrote after it is dropped from `metrics.jsonl`.
    """

    def __init__(
        self,
        workdir: str,
        *,
        first_step: int,
        num_steps: int,
        every: int,
        flops_per_token: float,
        peak_flops: float | None,
        tensorboard: bool,
        active: bool = True,
    ) -> None:
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._num_steps, self._every = num_steps, every
        self._flops_per_token, self._peak = flops_per_token, peak_flops
        self._active = active
        self._pending: tuple[int, Sums, dict[str, float]] | None = None
        self._window: list[Sums] = []
        self._clock: float | None = None
        self._first_step = first_step
        self._start = time.monotonic()
        self.tokens = 0.0
        self.seconds = 0.0  # spent in steps after the first, which compiles
        self.progress = Progress()
        if active:
            kept = truncate(self._path, first_step)
            self._file = self._path.open("w")
            self._file.write("".join(json.dumps(record) + "\n" for record in kept))
            directory = epath.Path(workdir) / "tensorboard"
            self._tensorboard = TensorBoard(directory) if tensorboard else None

    def train(self, step: int, sums: Sums, **extra: float) -> None:
        """Takes the sums of the step that ended at `step` (device arrays) and reads those of the step before."""
        pending, self._pending = self._pending, (step, sums, extra)
        if pending is not None:
            self._read(*pending)

    def eval(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the metrics of every validation source."""
        self.flush()
        for source, values in results.items():
            self._write({"step": step, "kind": "eval", "source": source, **values})
            shown = " · ".join(f"{k} {v:.4g}" for k, v in values.items() if k != "tokens")
            if self._active:
                self.progress.note(f"eval {step} · {source} · {shown}")
        self._clock = time.monotonic()  # evaluation is not training time

    def flush(self) -> None:
        """Reads and writes what is still pending."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(*pending, last=True)

    def pause(self) -> None:
        """Leaves the time until the next step out of the speed."""
        self.flush()
        self._clock = None

    def close(self) -> None:
        self.flush()
        if self._active:
            self._file.close()

    def _read(self, step: int, sums: Sums, extra: dict[str, float], last: bool = False) -> None:
        host = jax.device_get(sums)  # waits for that step
        now = time.monotonic()
        self._window.append(host)
        if self._clock is None:  # the first step compiles: its time says nothing about speed
            self._clock, self._window_start = now, now
            self._timed = 0.0
        else:
            self.seconds += now - self._clock
            self.tokens += float(host["tokens"])
            self._timed += float(host["tokens"])
            self._clock = now
        if not math.isfinite(float(host["loss"])):
            self._emit(step, extra)
            raise FloatingPointError(
                f"the loss of step {step} is {float(host['loss'])}; lower config.optimizer.learning_rate, or look at "
                f"batch_at({step - 1}) with explain_batch"
            )
        if step % self._every == 0 or step == self._num_steps or last:
            self._emit(step, extra)

    def _emit(self, step: int, extra: dict[str, float]) -> None:
        window, self._window = self._window, []
        total = {name: sum(float(s[name]) for s in window) for name in window[0]}
        record = means({k: v for k, v in total.items() if k not in ("grad_norm",)})
        record["grad_norm"] = float(window[-1]["grad_norm"])
        rate = self.tokens / self.seconds if self.seconds else 0.0
        elapsed = self._clock - self._window_start if self._clock else 0.0
        now_rate = self._timed / elapsed if elapsed else rate
        self._window_start, self._timed = time.monotonic(), 0.0
        record |= extra | {"tokens_per_second": now_rate, "time": time.monotonic() - self._start}
        flops = now_rate * self._flops_per_token
        if self._peak:
            record["mfu"] = flops / self._peak
        self._write({"step": step, "kind": "train", **record})
        if not self._active:
            return
        left = (self._num_steps - step) * record["tokens"] / len(window) / rate if rate else 0.0
        speed = f"{100 * record['mfu']:.1f}% MFU" if self._peak else f"{quantity(flops)}FLOP/s"
        self.progress.show(
            f"step {step}/{self._num_steps} · loss {record['loss']:.4f} · {quantity(now_rate)} tokens/s · {speed}"
            f" · {seconds(left)} left",
            final=step == self._num_steps,
        )

    def _write(self, record: dict[str, Any]) -> None:
        if not self._active:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            prefix = record["kind"] + (f"/{record['source']}" if "source" in record else "")
            values = {f"{prefix}/{k}": v for k, v in record.items() if isinstance(v, float)}
            self._tensorboard.write(record["step"], values)


def read(workdir: str) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; a last line cut by a kill is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [
        json.loads(line) for line in lines[:-1]
    ]  # what follows the last newline is cut or empty


def truncate(path: epath.Path, step: int) -> list[dict[str, Any]]:
    """The records up to `step`: those after it belong to steps that will be done again."""
    return [r for r in read(str(path.parent)) if r["step"] <= step]
