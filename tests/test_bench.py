"""scripts/bench.py, every part of it, on a model that takes no time."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    f"--config={ROOT}/configs/bench.py:small8k",
    "--config.model.num_layers=1",
    "--config.model.embed_dim=32",
    "--config.model.vocab_size=512",
    "--config.data.length=64",
    "--config.loss.chunk_size=64",
    "--config.loader.kind=thread",
    "--steps=8",
    "--warmup=2",
    "--batch=4",
    "--loss-shape=2x64x16x4096",
]
PARAMETERS = (512 + 256) * 32 + 12 * 32**2 + 3 * 32  # tables, one layer, norms
# A part of the benchmark, imports of these failing.
WITHOUT = """
import runpy, sys
for name in ("tensorflow", "tensorflow_datasets", "tensorboard", "sentencepiece", "tokenizers",
             "matplotlib", "zstandard"):
    sys.modules[name] = None
sys.argv = ["bench", *sys.argv[1:]]
runpy.run_path({path!r}, run_name="__main__")
"""


def run(command, *flags, folder):
    """(results, stdout) of a benchmark on one device."""
    environment = dict(os.environ, TMPDIR=str(folder))
    options = environment["XLA_FLAGS"].split()
    environment["XLA_FLAGS"] = " ".join(o for o in options if "device_count" not in o)
    command = [sys.executable, *command, *SMALL, *flags]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measure(parts, folder):
    """(measurements, printed text, files left in the folder)."""
    flags = [f"--parts={parts}", "--json=all.json"]
    printed = run([str(ROOT / "scripts/bench.py")], *flags, folder=folder)
    left = sorted(path.name for path in folder.iterdir())
    return json.loads((folder / "all.json").read_text()) | {"printed": printed, "left": left}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All parts but training."""
    return measure("start,loss_memory,generate,checkpoint,data", tmp_path_factory.mktemp("bench"))


def test_training_is_measured_without_tensorflow_or_any_file(tmp_path):
    script = WITHOUT.format(path=str(ROOT / "scripts/bench.py"))
    printed = run(["-c", script], "--parts=train", folder=tmp_path)
    train = json.loads(printed.splitlines()[-1])["train"]
    assert train["parameters"] == PARAMETERS
    assert math.isclose(train["tokens_per_s"] * train["step_ms"] / 1e3, 4 * 64)
    assert 0 < train["step_min_ms"] <= train["step_ms"]
    assert 0 < train["of_best_gemm_percent"] < 100 and train["mfu_percent"] is None
    # parameters and both moments, and every new one where the old one was
    assert train["outputs_in_place_bytes"] >= 3 * 4 * train["parameters"]
    # untrained, and nothing can be learned from random tokens
    assert abs(train["loss_first"] - math.log(512)) < 0.1 > abs(train["loss_last"] - math.log(512))
    assert train["loss_first"] != train["loss_last"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_loop_is_measured_beside_the_bare_step(tmp_path):
    results = measure("loop", tmp_path)
    loop = results["loop"]
    assert results["left"] == ["all.json"]
    ratio = loop["step_ms"] / loop["bare_step_ms"]
    assert math.isclose(loop["beyond_bare_step_percent"], 100 * (ratio - 1), rel_tol=1e-6)
    assert loop["host_cpu_ms"] > 0 and 0 < loop["host_ms"] < loop["step_ms"] < 1e3 * loop["run_s"]


@pytest.mark.slow
def test_the_loop_of_two_processes_is_measured(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/launch/local.py"), "--processes=2", "--"]
    command += [str(ROOT / "scripts/bench_loop.py"), "--steps=5", "--config.mesh.data=2"]
    flags = [f for f in SMALL if f.startswith("--config")]
    environment = dict(os.environ, TMPDIR=str(tmp_path), JAX_PLATFORMS="cpu")
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"processes +2\n", done.stdout)
    assert re.search(r"host cpu +[\d.]+ +ms\n", done.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_parts_of_the_start_add_up_and_the_cache_shortens_it(results):
    start = results["start"]
    for name in ("cold", "warm"):
        parts = ("start", "lower", "compile", "init", "data_and_step")
        values = [start[f"{name}_{part}_s"] for part in parts]
        assert all(value > 0 for value in values)
        assert sum(values) == pytest.approx(start[f"{name}_first_step_s"])
    assert start["warm_compile_s"] < start["cold_compile_s"]


@pytest.mark.slow
def test_the_chunked_loss_needs_less_memory_for_the_same_value(results):
    memory = results["loss_memory"]
    assert (memory["chunked_chunks"], memory["whole_chunks"]) == (2, 1)
    assert memory["chunked_loss"] == pytest.approx(memory["whole_loss"], rel=1e-6)
    assert memory["chunked_temporaries_bytes"] < memory["whole_temporaries_bytes"]
    assert memory["whole_rss_before_bytes"] <= memory["whole_peak_rss_bytes"]


@pytest.mark.slow
def test_generation_reports_both_batches_and_the_floor(results):
    generate = results["generate"]
    assert (generate["prompt_tokens"], generate["new_tokens"]) == (64, 128)
    assert generate["weights_bytes"] == 4 * PARAMETERS
    assert generate["floor_ms"] < generate["batch_1_step_ms"]
    assert generate["batch_8_tokens_per_s"] > 0


def test_checkpoints_hold_parameters_and_moments(tmp_path):
    checkpoint = measure("checkpoint", tmp_path)["checkpoint"]
    assert 0 <= checkpoint["state_bytes"] - 3 * 4 * PARAMETERS < 64  # and a few counts
    assert checkpoint["second_blocking_s"] < checkpoint["second_save_s"]
    assert checkpoint["restore_s"] > 0


@pytest.mark.slow
def test_data_is_measured_at_both_lengths_and_through_every_iterator(results):
    data = results["data"]
    for length in (64, 1024):
        assert data[f"length_{length}_step_million_ms"] > 0
        for kind in ("batch_at", "thread", "tf.data"):
            assert data[f"length_{length}_{kind}_tokens_per_s"] > 0


@pytest.mark.slow
def test_tables_are_aligned_and_no_temporary_file_is_left(results):
    assert results["left"] == ["all.json"]
    tables = [table.splitlines() for table in results["printed"].strip().split("\n\n")]
    assert [table[0] for table in tables] == [
        *("start", "loss_memory", "generate", "checkpoint", "data", "machine")
    ]
    for title, *rows in tables[:-1]:  # that of the machine has no units
        units = [re.search(r"  (?:[KMG]\S*|ms|s|/s|%)$", row) for row in rows]
        assert len({unit.start() for unit in units if unit}) == 1, (title, rows)
