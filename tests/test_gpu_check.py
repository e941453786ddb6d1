"""scripts/gpu_check.py: time boxes, rows and goals; all parts on small shapes of a CPU."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.config import command_line
from lm.storage.epaths import StoragePath
from lm.training.experiment import Experiment
from scripts import gpu_check
from scripts.gpu import kernels, resume, rows, shapes

ROOT = Path(__file__).parents[1]
ROW = """
import pathlib, sys, time
from scripts.gpu.rows import Goal, Writer
Writer(pathlib.Path(sys.argv[1]), sys.argv[2]).add("first", {"platform": "cpu", "step_ms": 2.5},
    [Goal("step_ms", high=float(sys.argv[3])), Goal("peak_bytes", low=1)])
"""
HANG = "import subprocess; subprocess.run(['sleep', '500'])"


def arguments(folder, *names, **changes):
    parts = [part for part in gpu_check.PARTS if part.name in names]
    given = {"parts": parts, "budget": 100.0, "small": True, "plans": None}
    return argparse.Namespace(out=folder / "out.jsonl", **given | changes)


def test_a_part_is_killed_at_its_time_and_the_rest_goes_on(tmp_path, monkeypatch, capfd):
    """The rows of a part that hangs after them, of one that fails, and of one that is well."""
    ends = {"machine": "", "kernels": HANG, "experts": "raise SystemExit('broken')", "matmul": ""}

    def command(args, part):
        limit = "2" if part.name == "matmul" else "3"
        code = ROW + ends[part.name]
        return [sys.executable, "-c", code, str(args.out), part.name, limit]

    monkeypatch.setattr(gpu_check, "command", command)
    monkeypatch.setattr(gpu_check, "SMALL_BOX", 8.0)
    monkeypatch.setenv("XLA_FLAGS", "")
    args = arguments(tmp_path, *ends)
    args.out.write_text('{"of": "an earlier run"}\n')
    assert gpu_check.run_all(args) == 1
    text = args.out.read_text().splitlines()[1:]
    found = [json.loads(line) for line in text]
    assert [(r["part"], r["status"]) for r in found] == [
        ("machine", "measured"),
        *(("kernels", "measured"), ("kernels", "failed")),
        *(("experts", "measured"), ("experts", "failed")),
        ("matmul", "measured"),
    ]
    assert [r["reason"] for r in found if r["status"] == "failed"] == [
        "killed at the end of its 8 s",
        "exit code 1: broken",
    ]
    assert found[0]["figures"] == {"platform": "cpu", "step_ms": 2.5}
    assert found[0]["goals"] == {"step_ms at most 3": True, "peak_bytes at least 1": None}
    table = capfd.readouterr().out
    assert "matmul             first" in table and "step 2.5 ms" in table
    assert "goals: 3 passed, 1 missed, 4 not measured" in table
    assert "MISS  matmul first: step_ms at most 2" in table
    assert "failed  kernels: killed at the end of its 8 s" in table


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"  # a zombie has ended
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_killed_part_has_started_ends_with_it():
    began = time.monotonic()
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '500']).pid, file=sys.stderr, "
    code += "flush=True); import time; time.sleep(500)"
    status = gpu_check.run_boxed([sys.executable, "-c", code], 5.0)
    assert time.monotonic() - began < 20
    killed, _, pid = status.partition(": ")
    assert killed == "killed at the end of its 5 s"
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(pid)


def test_parts_beyond_the_budget_are_not_started(tmp_path, capfd):
    assert gpu_check.run_all(arguments(tmp_path, "matmul", budget=1.0)) == 1
    reasons = [row["reason"] for row in rows.read(tmp_path / "out.jsonl")]
    assert reasons == ["not started: --budget=1 is used up"] * 2


def test_figures_that_are_not_finite_miss_their_goal():
    goal = rows.Goal("error", high=1)
    assert goal.is_met({"error": float("nan")}) is False
    assert goal.is_met({}) is None and goal.is_met({"error": 1}) is True


def test_measured_figures_are_set_against_the_plan():
    plan = {"memory_bytes": 100, "lower_bound_s": 0.1, "upper_bound_s": 0.3}
    found = shapes.against_plan(plan, 0.25, 94)
    assert found["beyond_plan_time_percent"] == pytest.approx(25)
    assert found["beyond_plan_memory_percent"] == pytest.approx(-6)
    assert shapes.against_plan(plan, 0.25, None)["beyond_plan_memory_percent"] is None


def test_stored_plans_are_of_the_shapes_that_are_measured():
    plans = shapes.read_plans(ROOT / "docs" / "gpu_plans.json")
    assert set(plans) == set(shapes.SHAPES)
    for name, shape in shapes.SHAPES.items():
        assert (plans[name]["rows"], plans[name]["length"]) == (shape.rows, shape.length)
        assert plans[name]["fits"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_pairs_of_the_attention_that_is_timed_are_those_of_its_mask(causal, window):
    changes = {"causal": causal, "window": window}
    heads = kernels._heads(2, 16, "xla", changes, 64)
    tokens = kernels._packed(3, 64, 20)
    mask = kernels.self_mask(tokens, causal, window=heads.window)
    np.testing.assert_array_equal(kernels._seen(heads, tokens), mask.allowed().sum(-1))
    assert (tokens.segments == 0).any() and tokens.segments.max() >= 3


def test_rows_of_matrix_products_are_measured_in_this_process(tmp_path, capfd):
    out = tmp_path / "out.jsonl"
    gpu_check.measure("matmul", rows.Check(rows.Writer(out, "matmul"), True, {}))
    *products, copy = rows.read(out)
    assert [row["name"] for row in products] == ["square 256", "square 512"]
    for row, n in zip(products, (256, 512), strict=True):
        figures = row["figures"]
        rate = 2 * n**3 / (figures["time_ms"] / 1e3)
        assert figures["best_flop_per_s"] == pytest.approx(rate)
    assert copy["figures"]["hbm_bytes_per_s"] > 0
    assert "square 512" in capfd.readouterr().out


def test_the_run_that_is_killed_on_a_gpu_is_a_run(tmp_path):
    """Its config, which no test trains: schedule, data, shapes of the step."""
    words = resume._train_command(StoragePath(str(tmp_path)), small=False)
    [name, _], settings = command_line.split(words[2:])
    config = command_line.read(name.removeprefix("--config="), settings)
    experiment = Experiment(config, jax.devices()[:1])
    assert experiment.num_steps == 100 > 2 * experiment.config.checkpoint.every
    assert experiment.abstract_batch.targets.shape == (32, 1024)
    assert sum(x.size for x in jax.tree.leaves(experiment.abstract_state)) > 3e7


@pytest.mark.slow
def test_all_parts_run_small(tmp_path):
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    options = environment["XLA_FLAGS"].split()
    environment["XLA_FLAGS"] = " ".join(o for o in options if "device_count" not in o)
    words = [sys.executable, str(ROOT / "scripts/gpu_check.py"), "--small", "--budget=1200"]
    out = tmp_path / "out.jsonl"
    done = subprocess.run(
        [*words, f"--out={out}"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows.read(out)
    assert {row["part"] for row in found} == {p.name for p in gpu_check.PARTS if p.is_small}
    for row in found:
        assert row["status"] == "measured" or row["reason"], row
        assert all(row["goals"].values()), row
    [resumed] = [row["figures"] for row in found if row["part"] == "resume"]
    assert resumed["leaves"] > 20 and resumed["leaves_that_differ"] == 0
    assert 20 <= resumed["killed_after_step"] < 100
