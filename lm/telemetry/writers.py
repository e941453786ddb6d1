"""Writer of metrics: the records that trackers get, and the progress line."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from lm.telemetry import jsonl, metrics
from lm.telemetry.deferred import StepResult
from lm.telemetry.progress import SEPARATOR, Progress, format_duration, format_quantity
from lm.telemetry.trackers.opening import Trackers
from lm.telemetry.trackers.tracker import Status


def _throughput(window: Sequence[StepResult]) -> tuple[float, float] | None:
    """(tokens per second, seconds per step) of the steps that have a time; None where none has, as
    the first of a process. Tokens are those that model FLOPs count: non-padding, scored or not.
    """
    timed = [(r.seconds, int(r.info["filled"])) for r in window if r.seconds is not None]
    elapsed = sum(seconds for seconds, _ in timed)
    return (sum(n for _, n in timed) / elapsed, elapsed / len(timed)) if elapsed else None


def _host_work(window: Sequence[StepResult]) -> dict[str, float]:
    """Seconds of the main thread a step, outside waiting for devices and data: the median of the
    steps that have them, by the clock and in which it had a core.
    """
    names = metrics.HOST_WORK
    values = {n: [x for r in window if (x := getattr(r, n)) is not None] for n in names}
    return {name: statistics.median(found) for name, found in values.items() if found}


def _means(applied: Sequence[StepResult]) -> dict[str, float]:
    """Per-token means over the steps; {} where there are none."""
    if not applied:
        return {}
    return metrics.means({n: sum(r.sums[n] for r in applied) for n in applied[-1].sums})


def _noise_scale(window: Sequence[StepResult]) -> dict[str, float]:
    """Mean `noise` and `signal` of lm/training/gradient_noise_scale.py, and their ratio in tokens.

    Over several records, divide the mean of `noise` by the mean of `signal`.
    """
    if "noise" not in window[-1].info:
        return {}
    means = {n: sum(float(r.info[n]) for r in window) / len(window) for n in ("noise", "signal")}
    if means["signal"] > 0:
        means["noise_scale"] = means["noise"] / means["signal"]
    return means


class MetricsWriter:
    """Means of the steps' metrics over windows of `every` steps.

    Steps whose update was skipped count as `skipped` and stay out of the means. trackers: what the
    records go to; None for processes but the first, which write nothing.
    """

    def __init__(
        self,
        trackers: Trackers | None,
        *,
        num_steps: int,
        every: int,
        flops_per_token: float,
        peak_flops: float | None,
    ) -> None:
        self._num_steps, self._every = num_steps, every
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._active, self._trackers = trackers is not None, trackers or Trackers()
        self._window: list[StepResult] = []
        self._last_throughput: tuple[float, float] | None = None  # of the last window with one
        self._learning_rate: float | None = None
        self.progress = Progress()

    def roll_back(self, step: int) -> None:
        """Drop the records of steps after `step`, which will be redone."""
        self._window = [result for result in self._window if result.step < step]
        self._trackers.roll_back(step)

    def is_due(self, num_done: int) -> bool:
        """True if a record is written after `num_done` steps."""
        return num_done % self._every == 0 or num_done == self._num_steps

    def train(self, result: StepResult, **extra: float) -> None:
        """Add the result of a step, and write a record where one is due."""
        self._window.append(result)
        if self.is_due(result.step + 1):
            self._write_window(result.step + 1, extra)
        elif self._active and self.progress.is_terminal:
            throughput = self._last_throughput or _throughput(self._window)
            self.progress.show(self._progress_line([result], throughput))

    def eval(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Write the metrics of every validation source, {source: {name: value}}."""
        names = metrics.short_names([*results])
        head = {"step": step, "kind": metrics.EVAL}
        self._trackers.write(step, [head | {"source": s, **v} for s, v in results.items()])
        for source, values in results.items():
            shown = SEPARATOR.join(f"{k} {v:.4g}" for k, v in values.items() if k != "tokens")
            self.note(f"eval {step} · {names[source]} · {shown}")

    def evaluation(self, record: jsonl.Record, text: str) -> None:
        """Write the record of one of `config.evaluations`; text: the line that says it."""
        self._trackers.write(record["step"], [record])
        self.note(f"eval {record['step']} · {text}")

    def layers(self, record: jsonl.Record) -> None:
        """Give trackers a record of layers.jsonl."""
        self._trackers.write(record["step"], [{"kind": metrics.LAYERS, **record}])

    def note(self, text: str) -> None:
        """Write a permanent line above the progress line."""
        if self._active:
            self.progress.note(text)

    def flush(self) -> None:
        """Return when all records are stored in the run's folder."""
        self._trackers.flush()

    def close(self, status: Status = "finished") -> None:
        self._trackers.close(status)

    def _write_window(self, step: int, extra: dict[str, float]) -> None:
        window, self._window = self._window, []
        applied = [r for r in window if not r.bad]
        record: jsonl.Record = {"step": step, "kind": metrics.TRAIN, **_means(applied)}
        if applied:
            record |= {"grad_norm": applied[-1].grad_norm, **_noise_scale(applied)}
        if "sparsity" in window[-1].info:
            record["sparsity"] = float(window[-1].info["sparsity"])
        if len(applied) < len(window):
            record["skipped"] = len(window) - len(applied)
        record |= extra | {"seconds": sum(r.seconds or 0.0 for r in window)}
        if (throughput := _throughput(window)) is not None:
            record |= {"tokens_per_second": throughput[0], **_host_work(window)}
            if self._peak_flops:
                record["mfu"] = throughput[0] * self._flops_per_token / self._peak_flops
        self._trackers.write(step, [record])
        self._last_throughput = throughput or self._last_throughput
        self._learning_rate = extra.get("learning_rate", self._learning_rate)
        if self._active:
            line = self._progress_line(window, self._last_throughput)
            self.progress.show(line, keep=True, final=step == self._num_steps)

    def _progress_line(
        self, window: Sequence[StepResult], throughput: tuple[float, float] | None
    ) -> str:
        num_done, means = window[-1].step + 1, _means([r for r in window if not r.bad])
        skipped = "every update skipped" if len(window) > 1 else "update skipped"
        parts = [f"step {num_done}/{self._num_steps}"]
        parts.append(f"loss {means['loss']:.4f}" if means else skipped)
        speed = []
        if throughput is not None:
            tokens_per_second, step_seconds = throughput
            left = format_duration((self._num_steps - num_done) * step_seconds)
            parts += [f"{format_quantity(tokens_per_second)} tok/s", f"{left} left"]
            flops, peak = tokens_per_second * self._flops_per_token, self._peak_flops
            mfu = f"{100 * flops / peak:.1f}% MFU" if peak else f"{format_quantity(flops)}FLOP/s"
            speed = [mfu]
        parts.append(f"grad norm {window[-1].grad_norm:.3g}")
        if "sparsity" in window[-1].info:
            parts.append(f"sparsity {float(window[-1].info['sparsity']):.1%}")
        if self._learning_rate is not None:
            parts.append(f"lr {self._learning_rate:.2g}")
        return SEPARATOR.join([*parts, *speed])
