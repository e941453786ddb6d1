"""Measure the steps of a real run, as the training loop takes them, beside the bare train step.

    python scripts/bench_loop.py --config=configs/bench.py:small8k
    python scripts/launch/local.py --processes=8 -- scripts/bench_loop.py \\
        --config=configs/bench.py:small8k --config.data.batch_size=8 --config.model.embed_dim=64

The run has all that a run has at every step: the loader and the transfer of its batches, the votes
of the processes, ledger, metrics and TensorBoard, in a temporary folder. Rows are those of
scripts/bench.py, whose part `loop` this is, for one process. The bare step, of batches that are on
the devices, whose sums are read one step late, is timed before and after the run.

`host` is the time of the main thread a step outside of waiting for data and devices, and `host_cpu`
the time in which it had a core: with more processes than cores that is the one to look at.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lm import cli
from lm.config.tree import ConfigTree
from lm.data.pipeline import Pipeline
from lm.data.synthetic import Synthetic
from lm.exit_codes import Exit, RunError
from lm.parallel import process_group
from lm.planning.plan import without_data
from lm.telemetry import deferred, metrics
from lm.training import loop
from lm.training.experiment import Experiment
from lm.types import Batch, TrainState

RECORDS = 5  # of metrics.jsonl, of whose means and medians the figures are medians


class Stopped(RunError):
    """A signal stopped the run."""

    code = Exit.TERMINATED


def main() -> int:
    from scripts import bench

    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config()
    parser.add_argument("--steps", type=int, default=50, help="steps to time, at least 5")
    process_group.add_flags(parser)
    args = parser.parse_args()
    process_group.initialize_from(args)
    jax.config.update("jax_enable_compilation_cache", False)
    figures = {"processes": jax.process_count(), **measure(args.config, steps=args.steps)}
    if jax.process_index() == 0:
        bench.show("loop", figures)
    return 0


def random_rows(config: ConfigTree, **data: object) -> ConfigTree:
    """The config with random rows for data, or what `data` says, and no validation."""
    if not data and ("image_size" in config.model or {"fields", "num_codes"} & {*config.objective}):
        return without_data(config)  # rows with pictures, or of two fields
    config = config.copy_and_resolve_references()
    config.data.update({"weights": (), "validation": (), "tokenizer": "bytes"})
    config.data.update({"train": ("synthetic:random",), **data})
    config.model.max_length = max(config.model.max_length, config.data.length)
    return config


def random_batches(experiment: Experiment, count: int) -> list[Batch]:
    """Global batches of random tokens of the whole vocabulary, one document a row; for models of
    pictures and objectives with two fields, those of the experiment's own data.
    """
    c, layout = experiment.config, experiment.objective.layout
    if layout.image_size is not None or len(layout.fields) > 1:
        source = experiment.train_data
        return [
            experiment.make_global_batch(source.batch_at(i, experiment.rows)) for i in range(count)
        ]
    rows = Synthetic(
        "random", vocab_size=c.model.vocab_size, length=c.data.length, document_length=2**31
    )
    source = Pipeline(
        {"random": rows}, experiment.objective, batch_size=experiment.batch_size, seed=c.seed
    )
    return [experiment.make_global_batch(source.batch_at(i, experiment.rows)) for i in range(count)]


def bare_steps(
    step: Callable[..., Any], state: TrainState, batches: Sequence[Batch]
) -> tuple[TrainState, list[deferred.StepResult]]:
    """Take a step of every batch, and read its results one step late, as a run does."""
    clock, results = deferred.DeferredMetrics(), []
    for number, batch in enumerate(batches):
        state, *outputs = step(state, batch)
        results += clock.push(number, *outputs)
    return state, results + clock.flush()


def measure(config: ConfigTree, *, steps: int) -> dict[str, Any]:
    """Figures of the loop and of the bare step; all processes call it together."""
    if steps < RECORDS:
        raise ValueError(f"--steps ({steps}) must be at least {RECORDS} to measure the loop")
    every = steps // RECORDS
    config = random_rows(config)
    config.train.update({"num_steps": (RECORDS + 1) * every, "log_every": every})
    config.train.update({"num_epochs": None, "max_epochs": None})
    config.optimizer.schedule.update({"kind": "constant", "warmup_steps": 0})  # for any length
    config.guard.self_check, config.log.parameter_table = False, False
    experiment = Experiment(config, jax.devices())
    batches = random_batches(experiment, every + 2)  # of which the first has no time

    def bare() -> list[float]:
        _, results = bare_steps(experiment.train_step, experiment.init_state(), batches)
        return [result.seconds for result in results if result.seconds is not None]

    step = bare()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))

        def make_folder() -> str:
            return stack.enter_context(tempfile.TemporaryDirectory())

        folder = process_group.from_lead("bench folder", make_folder)
        began = time.monotonic()
        if loop.train(config, folder, jax.devices()):
            raise Stopped("a signal stopped the run that was measured")
        whole = time.monotonic() - began
        records = [r for r in metrics.read(folder) if r["kind"] == "train"][1:]
        process_group.agree("bench", {})  # before the lead deletes it
    step += bare()
    step_s = statistics.median(step)
    loop_s = statistics.median(record["seconds"] / every for record in records)
    host = {name: statistics.median(r[name] for r in records) for name in metrics.HOST_WORK}
    return {
        "run_s": whole,
        "step_ms": 1e3 * loop_s,
        "bare_step_ms": 1e3 * step_s,
        "beyond_bare_step_percent": 100 * (loop_s / step_s - 1),
        "host_ms": 1e3 * host["host_seconds"],
        "host_cpu_ms": 1e3 * host["host_cpu_seconds"],
    }


if __name__ == "__main__":
    cli.run(main)
