"""A run is a pure function of (config, step): killed, stopped and resumed runs end with the same
bytes.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from environment import fake_devices, run_script

from lm.checkpoint.manager import Checkpoints
from lm.config import conversion
from lm.exit_codes import Exit
from lm.reliability.workdir_lock import lock_workdir
from lm.telemetry import metrics
from lm.training.experiment import Experiment
from lm.training.restore import restore
from lm.training.stored_run import load

ROOT = pathlib.Path(__file__).parent.parent


def command(workdir: pathlib.Path, *overrides: str) -> list[str]:
    script = str(ROOT / "scripts" / "train.py")
    config = f"--config={ROOT / 'configs' / 'smoke.py'}"
    return [sys.executable, script, config, f"--workdir={workdir}", *overrides]


def run(
    workdir: pathlib.Path, num_devices: int, *overrides: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(workdir, *overrides),
        env=fake_devices(num_devices),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def stop_at(
    workdir: pathlib.Path, step: int, number: signal.Signals, num_devices: int, *overrides: str
) -> int:
    """Starts the run, sends it the signal once it has logged `step`, and returns its exit code."""
    process = subprocess.Popen(
        command(workdir, *overrides),
        env=fake_devices(num_devices),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        records = metrics.read(str(workdir))
        if records and records[-1]["step"] >= step:
            break
        assert process.poll() is None, f"ended before step {step} with {process.returncode}"
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=600)


def final_state(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """Every parameter and optimizer leaf of the checkpoint at `step`, as bytes."""
    experiment = load(str(workdir), jax.devices()[:1])
    with Checkpoints(str(workdir), experiment.config.checkpoint, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(experiment.abstract_state, step)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(devices, steps) -> the folder of a run that nothing interrupted, and its flags."""

    @functools.cache
    def make(num_devices, num_steps):
        flags = [f"--config.train.num_steps={num_steps}"]
        flags += ["--config.mesh.data=2", "--config.mesh.fsdp=2"] if num_devices == 4 else []
        folder = tmp_path_factory.mktemp("whole")
        assert run(folder, num_devices, *flags).returncode == 0
        return folder, flags

    return make


@pytest.mark.slow  # with two kills in one run: tests/test_kill.py
@pytest.mark.parametrize(("num_devices", "num_steps"), [(1, 100), (1, 200), (4, 75), (4, 200)])
def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(
    whole, tmp_path, num_devices, num_steps
):
    folder, flags = whole(num_devices, num_steps)
    code = stop_at(tmp_path, num_steps * 3 // 5, signal.SIGKILL, num_devices, *flags)
    assert code == -signal.SIGKILL
    resumed = run(tmp_path, num_devices, *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "from step 0 " not in resumed.stdout
    expected, killed = (final_state(path, num_steps) for path in (folder, tmp_path))
    assert expected.keys() == killed.keys()
    assert [name for name in expected if expected[name] != killed[name]] == []
    losses = [
        {r["step"]: r["loss"] for r in metrics.read(str(path)) if r["kind"] == "train"}
        for path in (folder, tmp_path)
    ]
    assert losses[0] == losses[1]
    assert sorted(losses[0]) == list(range(1, num_steps + 1))


@pytest.mark.parametrize("name", ["lstm", "conv"])
def test_recurrent_and_convolutional_models_go_on_with_the_same_bytes(
    tmp_path, make_config, devices, name
):
    config = make_config({"mesh.data": 1})
    config.model = conversion.default(model=name).model
    config.model.update({"vocab_size": 264, "embed_dim": 16, "num_layers": 2, "dropout": 0.3})

    def go(experiment, state, start, stop):
        for _, batch in experiment.batches(start, stop):
            state, _, _ = experiment.train_step(state, batch)
        return state

    experiment = Experiment(config, devices[:1])
    with Checkpoints(str(tmp_path), experiment.config.checkpoint) as checkpoints:
        state = go(experiment, experiment.init_state(), 0, 2)
        checkpoints.save(state)
        whole = jax.device_get(go(experiment, state, 2, 4))
    again = Experiment(config, devices[:1])
    with Checkpoints(str(tmp_path), again.config.checkpoint) as checkpoints:
        state, _ = restore(again, checkpoints)
    assert int(state.step) == 2
    resumed = jax.device_get(go(again, state, 2, 4))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_ctrl_c_saves_at_the_step_it_came_in_and_the_run_goes_on(tmp_path):
    flags = ("--config.checkpoint.every=0", "--config.train.num_steps=80")
    code = stop_at(tmp_path, 20, signal.SIGINT, 1, *flags)
    assert code == 130
    stopped_at = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert stopped_at >= 20
    resumed = run(tmp_path, 1, *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert f"from step {stopped_at} to 80" in resumed.stdout


def run_here(workdir: pathlib.Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """As `run`, on the eight devices of this process."""
    return run_script("train", *command(workdir, *overrides)[2:])


def test_a_finished_run_says_so(whole):
    folder, flags = whole(1, 100)
    assert "finished" in run_here(folder, *flags).stdout


def test_a_changed_model_is_refused_unless_allowed_by_name(whole, tmp_path):
    folder, flags = whole(1, 100)
    shutil.copytree(folder, tmp_path / "run")
    changes = "--config.model.embed_dim=64", "--config.data.length=16"
    refused = run_here(tmp_path / "run", *flags, *changes)
    assert refused.returncode == 1
    assert "config.model.embed_dim: 32 -> 64" in refused.stderr
    assert "config.data.length: 32 -> 16" in refused.stderr
    assert "Traceback" not in refused.stderr
    allowed = run(
        tmp_path / "run",
        1,
        "--config.train.num_steps=102",
        "--config.data.batch_size=4",
        "--config.checkpoint.allow_changed=('data.batch_size','optimizer.schedule')",
    )
    assert allowed.returncode == 0, allowed.stderr
    assert "config.data.batch_size: 8 -> 4" in allowed.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.model.num_layer=2", "did you mean config.model.num_layers?"),
        (
            "--config.model.num_heads=5",
            "config.model.embed_dim (32) must be divisible by num_heads (5)",
        ),
        ("--config.model.num_layers=two", "config.model.num_layers must be int, got 'two'"),
        ("--config.data.batch_size=9", "config.data.batch_size (9) must be divisible by"),
        ("--config.data.train=('nowhere',)", "nowhere"),
        ("--config.mesh.fsdp=3", "must use all devices (8)"),
        (
            "--config.data.length=64",
            "config.model.max_length (32) must be at least config.data.length (64)",
        ),
        (
            "--config.optimizer.name=adam",
            "config.optimizer.name ('adam') is not in lm.optim.optimizers",
        ),
    ],
)
def test_a_bad_value_gives_one_clear_error_before_any_compile(tmp_path, override, message):
    result = run_here(tmp_path / "run", override)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_process_in_the_folder_of_a_run_ends_before_it_touches_anything(tmp_path):
    with lock_workdir(str(tmp_path / "run")):
        second = run_here(tmp_path / "run")
    assert second.returncode == Exit.ERROR
    assert f"process {os.getpid()} on " in second.stderr and "--workdir" in second.stderr
    assert "Traceback" not in second.stderr
    assert not (tmp_path / "run").exists()  # the first made it for its lock, and wrote nothing


def test_evaluation_of_a_run_uses_the_averaged_weights_as_training_did(whole):
    folder, _ = whole(1, 100)
    result = run_script("evaluate", f"--workdir={folder}")
    trained = metrics.read(str(folder))[-1]
    assert json.loads(result.stdout)["loss"] == pytest.approx(trained["loss"], rel=1e-6)
