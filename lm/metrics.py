"""What a run writes down: `metrics.jsonl`, TensorBoard events, and one line on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax
from etils import epath

from lm.types import Sums

METRICS_FILE = "metrics.jsonl"


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Per-token means of additive sums, with the count itself under `tokens`. No tokens: zeros."""
    tokens = float(sums["tokens"])
    divided = {n: float(v) / max(tokens, 1.0) for n, v in sums.items() if n != "tokens"}
    return divided | {"tokens": tokens}


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


def seconds(count: float) -> str:
    """1h02m, 3m20s or 12s; ? for nan."""
    if math.isnan(count):
        return "?"
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
    """One line, drawn over itself on a terminal; elsewhere at most a line every `pause` seconds."""

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

    def clear(self) -> None:
        """Takes the progress line off the terminal."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def note(self, text: str) -> None:
        """A line that stays, above the progress line."""
        self._stream.write(("\r\x1b[K" if self._live else "") + text + "\n")
        self._stream.flush()


class Writer:
    """Collects the sums of steps and writes their means; values are read one step late, so devices
    never wait.

    `first_step` is where this process starts: what an earlier one wrote of later steps is dropped
    from `metrics.jsonl`, since they will be done again. Only `active` writers (process 0) write.
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
        self._pending: tuple[int, Sums, dict[str, float]] | None = None
        self._window: list[Sums] = []
        self._seconds = self._timed_tokens = 0.0  # of the window
        self._clock: float | None = (
            None  # when the last step ended; the first one of a process is not timed
        )
        self.progress = Progress()
        if active:
            path = epath.Path(workdir) / METRICS_FILE
            kept = [record for record in read(workdir) if record["step"] <= first_step]
            new = path.parent / (METRICS_FILE + ".new")
            new.write_text("".join(json.dumps(record) + "\n" for record in kept))
            new.replace(path)  # a kill leaves the old file or the new one
            self._file = path.open("a")
            directory = epath.Path(workdir) / "tensorboard"
            self._tensorboard = TensorBoard(directory) if tensorboard else None

    def train(self, step: int, sums: Sums, **extra: float) -> None:
        """Takes the sums of the step ending at `step`, on devices; reads those of the last one."""
        pending, self._pending = self._pending, (step, sums, extra)
        if pending is not None:
            self._read(*pending)

    def eval(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the metrics of every validation source."""
        for source, values in results.items():
            self._write({"step": step, "kind": "eval", "source": source, **values})
            shown = " · ".join(f"{k} {v:.4g}" for k, v in values.items() if k != "tokens")
            if self._active:
                self.progress.note(f"eval {step} · {source} · {shown}")

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time inside of this context out of the speed."""
        self.flush()
        yield
        self._clock = time.monotonic()

    def flush(self) -> None:
        """Reads and writes what is still pending."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(*pending)

    def close(self) -> None:
        self.flush()
        if self._active:
            self._file.close()

    def _read(self, step: int, sums: Sums, extra: dict[str, float]) -> None:
        host = {name: float(value) for name, value in jax.device_get(sums).items()}  # waits
        now = time.monotonic()
        if self._clock is not None:
            self._seconds += now - self._clock
            self._timed_tokens += host["tokens"]
        self._clock = now
        self._window.append(host)
        finite = math.isfinite(host["loss"])
        if step % self._every == 0 or step == self._num_steps or not finite:
            self._emit(step, extra)
        if not finite:
            raise FloatingPointError(
                f"the loss of step {step} is {host['loss']}: try a lower "
                "config.optimizer.learning_rate or a longer warm-up, and "
                f"look at the data with explain_batch({step - 1})"
            )

    def _emit(self, step: int, extra: dict[str, float]) -> None:
        count, last = len(self._window), self._window[-1]
        total = {n: sum(s[n] for s in self._window) for n in last if not n.endswith("_norm")}
        rate = self._timed_tokens / self._seconds if self._seconds else 0.0
        record = means(total) | {n: v for n, v in last.items() if n.endswith("_norm")} | extra
        record |= {"seconds": self._seconds, "tokens_per_second": rate}
        speed = ""
        if self._flops_per_token is not None:
            flops = rate * self._flops_per_token
            speed = f" · {quantity(flops)}FLOP/s"
            if self._peak_flops:
                record["mfu"] = flops / self._peak_flops
                speed = f" · {100 * record['mfu']:.1f}% MFU"
        self._window, self._seconds, self._timed_tokens = [], 0.0, 0.0
        self._write({"step": step, "kind": "train", **record})
        if self._active:
            left = (self._num_steps - step) * record["tokens"] / count / rate if rate else math.nan
            self.progress.show(
                f"step {step}/{self._num_steps} · loss {record['loss']:.4f} · "
                f"{quantity(rate)} tokens/s{speed} · {seconds(left)} left",
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
    """The records of a run's metrics; a last line that a kill has cut is left out."""
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [
        json.loads(line) for line in lines[:-1]
    ]  # what follows the last newline is cut or empty
