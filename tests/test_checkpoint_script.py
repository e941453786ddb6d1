"""scripts/checkpoint.py: what it says of real folders, and its exit codes."""

import pathlib
import subprocess
import sys

import faults
import jax.numpy as jnp
import numpy as np
import pytest
from environment import run_script

from lm.checkpoint.manager import Checkpoints
from lm.config.schema import CheckpointConfig
from lm.types import TrainState

SCRIPT = pathlib.Path(__file__).parent.parent / "scripts" / "checkpoint.py"


def run(*arguments):
    return run_script("checkpoint", *arguments)


def state(step, change=0.0):
    w = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    params = {"mlp": {"weight": jnp.asarray(w), "bias": jnp.full(3, change, jnp.bfloat16)}}
    return TrainState(jnp.int32(step), params, {"m": jnp.zeros(4)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs: a (steps 10 and 20), b (step 20, another bias), c (step 5, damaged)."""
    root = tmp_path_factory.mktemp("runs")
    config = CheckpointConfig(keep_last=5)
    extras = {"config": {"seed": 7, "data": {"train": ["x"]}}}
    with Checkpoints(str(root / "a"), config) as checkpoints:
        for step in (10, 20):
            ledger = {"filled": step * 100_000}
            checkpoints.save(state(step), manifest_extras={**extras, "ledger": ledger})
    parent = {"workdir": "runs/a", "step": 10}
    with Checkpoints(str(root / "b"), config) as checkpoints:
        checkpoints.save(state(20, change=0.5), manifest_extras={**extras, "parent": parent})
    with Checkpoints(str(root / "c"), config) as checkpoints:
        checkpoints.save(state(5))
    data = [p for p in faults.files(root / "c") if p.parent.name == "d"]
    largest = max(data, key=lambda p: p.stat().st_size)
    faults.flip_bit(largest, 4 * largest.stat().st_size)
    return root


def test_ls_has_one_line_for_each_checkpoint(runs):
    done = run("ls", runs / "a")
    assert done.returncode == 0, done.stderr
    head, first, second = done.stdout.splitlines()
    assert head.split() == ["step", "saved", "size", "verified", "tokens", "parent"]
    assert first.split()[0] == "10" and second.split()[0] == "20"
    assert first.split()[5:] == ["yes", "1M", "-"] and second.split()[5:] == ["yes", "2M", "-"]
    assert run("ls", runs / "b").stdout.splitlines()[1].endswith("runs/a@10")


def test_verify_ends_with_44_where_a_bit_is_wrong_and_says_where(runs):
    done = run("verify", runs / "a")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(";")[0] for line in lines] == ["step 10: good", "step 20: good"]
    assert len(run("verify", runs / "a", "--step=10").stdout.splitlines()) == 1
    command = [sys.executable, str(SCRIPT), "verify", str(runs / "c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 44
    assert "step 5: BAD: " in done.stdout and done.stderr == ""


def test_diff_compares_leaf_by_leaf(runs):
    same = run("diff", f"{runs}/a@10", runs / "a")
    assert same.returncode == 0, same.stderr
    assert "3 leaves are equal, 0 are not" in same.stdout
    other = run("diff", runs / "a", f"{runs}/b@20")
    assert other.returncode == 1
    lines = {line.split()[0]: line.split()[1:] for line in other.stdout.splitlines()}
    assert lines["params.mlp.bias"] == ["differ", "0.5", "inf"]  # of zeros
    assert lines["params.mlp.weight"] == lines["opt_state.m"] == ["equal"]


def test_diff_names_leaves_of_one_side_and_other_shapes(runs, tmp_path):
    params = {"mlp": {"weight": jnp.zeros((8, 15)), "gate": jnp.zeros(2)}}
    with Checkpoints(str(tmp_path), CheckpointConfig()) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), params, {"m": jnp.zeros(4)}))
    done = run("diff", runs / "a", tmp_path)
    assert done.returncode == 1, done.stderr
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines()}
    assert lines["params.mlp.bias"] == "only in A"
    assert lines["params.mlp.gate"] == "only in B"
    assert lines["params.mlp.weight"] == "float32 [8, 16] / float32 [8, 15]"


def test_show_prints_the_manifest_and_the_parameters(runs):
    done = run("show", f"{runs}/a@10")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert lines["step"] == ["10"] and lines["config.seed"] == ["7"]
    assert lines["ledger.filled"] == ["1000000"] and len(lines["code.source"][0]) == 64
    norm = np.linalg.norm(state(10).params["mlp"]["weight"])
    assert lines["mlp.weight"][:3] == ["[8,", "16]", "float32"]
    assert float(lines["mlp.weight"][3]) == pytest.approx(norm, rel=1e-5)
    assert "131 parameters; 1 leaves of the optimizer's state" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ls", "nothing"], "no checkpoint in"),
        (["verify", "a", "--step=3"], "no checkpoint of step 3 in"),
        (["show", "a@11"], "there are [10, 20]"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(runs, arguments, message):
    command, workdir, *rest = arguments
    done = run(command, runs / workdir, *rest)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
