"""Training steps and checkpoints on a GPU, for scripts/gpu_check.py."""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from lm.parallel import compiler_flags
from scripts import bench
from scripts.gpu.rows import Check, Goal, read
from scripts.gpu.shapes import SHAPES, Shape, against_plan

SCRIPT = str(Path(__file__).resolve().parents[1] / "gpu_check.py")


def step(check: Check, name: str, settings: tuple[str, ...] = ()) -> float:
    """Speed and memory of the training step of a shape; returns its seconds."""
    shape: Shape = SHAPES[name]
    shape = dataclasses.replace(shape, settings=(*shape.settings, *settings))
    found = bench.train(_arguments(shape, check.small))
    peak, on_gpu = found["peak_device_bytes"], jax.devices()[0].platform == "gpu"
    names = ("arguments_bytes", "temporaries_bytes", "outputs_bytes")
    compiled = sum(found[n] for n in names) - found["outputs_in_place_bytes"]
    figures = {
        "of_matmul_percent": found["of_best_gemm_percent"],
        "mfu_percent": found["mfu_percent"],
        "tokens_per_s": found["tokens_per_s"],
        "step_ms": found["step_ms"],
        "peak_bytes": peak,
        "compiled_bytes": compiled,
        "compile_s": found["compile_s"],
    }
    goals = [Goal("of_matmul_percent", low=shape.mfu)] if shape.mfu and on_gpu else []
    if (plan := check.plans.get(name)) and not settings:
        figures |= against_plan(plan, found["step_ms"] / 1e3, peak)
        if on_gpu:
            goals.append(Goal("beyond_plan_memory_percent", -5, 5))
            goals.append(Goal("beyond_plan_time_percent", -10, 10))
    check.rows.add(" ".join((name, *settings)), figures, goals, details=found)
    return found["step_ms"] / 1e3


def _arguments(shape: Shape, small: bool) -> argparse.Namespace:
    """The flags of scripts/bench.py for a shape."""
    steps, warmup = (4, 1) if small else (12, 3)
    return argparse.Namespace(config=shape.make_config(small), steps=steps, warmup=warmup)


def precision(check: Check, name: str) -> None:
    """The step of 1.3B with its products in the format `name`, beside that of `train-1.3b-2048`
    where its row is in the same file.
    """
    shape = "1.3b-2048"
    wide = [r for r in read(check.rows.path) if r["part"] == f"train-{shape}" and r["figures"]]
    narrow = step(check, shape, (f"model.quantization.format={name}",))
    if wide:
        figures = {"times_bfloat16": wide[-1]["figures"]["step_ms"] / 1e3 / narrow}
        check.rows.add(name, figures)


def flags(check: Check) -> None:
    """Step time with the compiler's flags of the platform, which a single device goes without by
    default, and without them: in turn, medians.
    """
    platform = jax.devices()[0].platform
    chosen = [f"{n}={v}" for s in compiler_flags.TABLE if s.platform == platform for n, v in
              s.flags.items()] or ["xla_llvm_disable_expensive_passes=true"]  # fmt: skip
    config = SHAPES["124m-1024"].make_config(check.small)
    made = {}
    for name, entries in {"without": (), "with": tuple(chosen)}.items():
        config.train.compiler_flags = entries
        made[name] = bench.experiment_on(config)
    steps = {name: experiment.train_step for name, experiment in made.items()}
    experiment = made["without"]
    state = experiment.init_state()
    batch = experiment.make_global_batch(experiment.train_data.batch_at(0, experiment.rows))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    sums = None
    for turn in range(4 if check.small else 12):
        for name, run in steps.items():
            began = time.perf_counter()
            for _ in range(3):
                state, sums, _ = run(state, batch)
            jax.block_until_ready(sums)
            if turn:  # the first one warms up
                seconds[name].append((time.perf_counter() - began) / 3)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures = {f"{name}_ms": 1e3 * value for name, value in medians.items()}
    figures["of_without_percent"] = 100 * medians["with"] / medians["without"]
    check.rows.add("124m-1024", figures, details={"flags": chosen, "seconds": seconds})


def memory_fraction(check: Check) -> None:
    """Step time by the share of the memory that jax takes, in processes of their own, in turn."""
    seconds: dict[str, list[float]] = {"0.75": [], "0.92": []}
    for _ in range(1 if check.small else 2):
        for share, values in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "step.jsonl")
                words = [sys.executable, SCRIPT, f"--out={out}"]
                words += ["--part=train-124m-1024"] + ["--small"] * check.small
                variable = {"XLA_PYTHON_CLIENT_MEM_FRACTION": share}
                quiet = subprocess.DEVNULL
                subprocess.run(words, env=os.environ | variable, stdout=quiet, check=True)
                values.append(read(out)[0]["figures"]["step_ms"] / 1e3)
    figures = {f"share_{n}_ms": 1e3 * statistics.median(v) for n, v in seconds.items()}
    check.rows.add("124m-1024", figures, details=seconds)


def checkpoint(check: Check) -> None:
    """Save and restore of GPT-2 124M, and the host's memory."""
    config = _arguments(SHAPES["124m-1024"], check.small)
    found = bench.checkpoint(config)
    names = ("state_bytes", "second_blocking_s", "second_save_s", "restore_s")
    names += ("save_bytes_per_s", "restore_bytes_per_s", "plain_write_and_sync_bytes_per_s")
    figures = {name: found[name] for name in names} | {"host_peak_bytes": bench.peak_rss()}
    check.rows.add("124m", figures, details=found)
