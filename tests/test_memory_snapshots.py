"""Snapshots in the memory of hosts: a run goes on from them with the bits of an undisturbed one."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from environment import some
from test_launch import FAILING, ROOT, children, finish, launch, saved_leaves, wait_for

from lm.checkpoint import memory
from lm.exit_codes import Exit, RunError
from lm.reliability import attempts
from lm.training.loop import train
from lm.training.restore import memory_snapshots, stored_state
from lm.training.session import TrainingSession


class DeviceError(RunError):
    code = Exit.DEVICE_ERROR


CHANGES = {
    "train.num_steps": 8,
    "guard.self_check": False,
    "checkpoint.every": 3,
    "checkpoint.memory_every": 2,
    "optimizer.ema_decay": 0.9,
}


@pytest.fixture
def config(make_config, tmp_path):
    return make_config({**CHANGES, "checkpoint.memory_dir": str(tmp_path / "memory")})


def kept(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("own-*"))


@pytest.fixture
def fail_at(monkeypatch, shared_steps):
    """(step) -> runs fail once they come to it."""
    push = TrainingSession.push_results
    at = []

    def failing(self, step, *rest):
        push(self, step, *rest)
        if at and step == at[0]:
            raise DeviceError("the link to the chip is down")

    monkeypatch.setattr(TrainingSession, "push_results", failing)
    return at.append


def test_a_run_goes_on_from_memory_with_the_same_bits(config, tmp_path, devices, fail_at, capsys):
    config.mesh.update({"data": 2, "fsdp": 2})
    fail_at(7)
    with pytest.raises(DeviceError):
        train(config, str(tmp_path / "run"), devices[:4])
    assert kept(tmp_path / "memory") == ["own-4", "own-6"]
    shutil.move(tmp_path / "run" / "checkpoints" / "6", tmp_path / "6")
    fail_at.__self__.clear()
    assert train(config, str(tmp_path / "run"), devices[:4]) == Exit.SUCCESS
    out = capsys.readouterr().out
    assert "restored from the memory of the hosts at step 6\n" in out and "from step 6 to 8" in out
    assert not list((tmp_path / "memory").iterdir())  # it is over: the memory is free again
    assert train(config, str(tmp_path / "other"), devices[:4]) == Exit.SUCCESS
    assert saved_leaves(tmp_path / "run", 8) == saved_leaves(tmp_path / "other", 8)
    assert [a["from_step"] for a in attempts.read(str(tmp_path / "run"))] == [0, 6]


@pytest.mark.parametrize(
    "fault", some(["damaged", "another run", "another config", "older"], "damaged")
)
def test_storage_is_read_where_memory_has_nothing_good(
    config, tmp_path, devices, fail_at, capsys, fault
):
    fail_at(5)
    with pytest.raises(DeviceError):
        train(config, str(tmp_path / "run"), devices[:1])
    assert kept(tmp_path / "memory") == ["own-2", "own-4"]
    start = 3
    if fault == "damaged":
        for path in (tmp_path / "memory").rglob("own-*"):
            with path.open("r+b") as file:
                file.seek(-5, os.SEEK_END)
                file.write(b"\xa5")
    elif fault == "another run":
        shutil.rmtree(tmp_path / "run")
        start = 0
    elif fault == "another config":
        config.train.log_every = 3
    else:
        for path in (tmp_path / "memory").rglob("own-4"):
            path.unlink()
    fail_at.__self__.clear()
    assert train(config, str(tmp_path / "run"), devices[:1]) == Exit.SUCCESS
    out = capsys.readouterr().out
    assert "restored from the memory" not in out and f"from step {start} to 8" in out


def test_without_snapshots_nothing_is_done(config, tmp_path, devices, monkeypatch, shared_steps):
    config.checkpoint.memory_every = 0
    monkeypatch.setattr(memory, "MemorySnapshots", None)
    assert train(config, str(tmp_path / "run"), devices[:1]) == Exit.SUCCESS
    assert not (tmp_path / "memory").exists()


def test_a_folder_that_is_too_small_is_refused_before_the_first_step(
    make_experiment, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage)
    changes = {**CHANGES, "checkpoint.memory_dir": str(tmp_path / "memory")}
    with pytest.raises(ValueError, match=r"1 processes need .* GiB in .*memory .*memory_dir\)"):
        memory_snapshots(make_experiment(changes), str(tmp_path))
    with pytest.raises(ValueError, match="memory_dir: 'gs://b' is in a bucket"):
        memory_snapshots(make_experiment({**changes, "checkpoint.memory_dir": "gs://b"}), "run")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_state_in_host_memory_is_kept_with_every_bit(make_experiment, tmp_path, dtype):
    changes = {**CHANGES, "checkpoint.memory_dir": str(tmp_path / "memory")}
    changes |= {"optimizer.memory": "host", "optimizer.moment_dtype": dtype}
    experiment = make_experiment(changes, data=2, fsdp=2)
    snapshots = memory_snapshots(experiment, str(tmp_path / "run"))
    state = experiment.init_state()
    config = {"config": experiment.config_dict.to_dict()}
    snapshots.save(stored_state(experiment, state), config)
    found = snapshots.find(0)
    again = snapshots.restore(found)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert a.sharding == b.sharding and a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    [run] = (tmp_path / "memory").iterdir()
    assert run.stat().st_mode & 0o77 == 0  # parameters are nobody else's


# ---- two processes of two devices, started by scripts/launch/local.py ----

STEPS = 60


def job(folder: pathlib.Path, marker: pathlib.Path, *flags: str):
    """A run whose storage has no checkpoint before the end; its device fails unless `marker` is
    there.
    """
    path = folder / "failing.py"
    path.write_text(FAILING.format(root=str(ROOT), marker=str(marker)))
    return launch(
        *("--processes=2", "--devices-per-process=2", "--max-restarts=1", "--"),
        *(ROOT / "scripts" / "train.py", f"--config={path}", f"--workdir={folder / 'run'}"),
        *("--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.guard.self_check=False"),
        *(f"--config.train.num_steps={STEPS}", "--config.loader.kind=thread"),
        *(
            "--config.checkpoint.memory_every=4",
            f"--config.checkpoint.memory_dir={folder / 'memory'}",
        ),
        *flags,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The arrays at the end of a run without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "marker").touch()
    code, out, errors = finish(job(folder, folder / "marker"))
    assert code == 0 and "starting again" not in errors, out + errors
    return saved_leaves(folder / "run", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["device", "kill", "kill 0", "kill and loss", "kill and loss 0"])
def test_two_processes_go_on_from_memory_after_a_fault_of_one(undisturbed, tmp_path, fault):
    marker = tmp_path / "marker"
    if fault != "device":
        marker.touch()
    process = job(tmp_path, marker)
    victim = 0 if fault.endswith("0") else 1
    if fault != "device":
        try:
            wait_for(lambda: len(kept(tmp_path / "memory")) == 4)
            os.kill(children(process)[victim], signal.SIGKILL)
            if "loss" in fault:  # with the machine's memory
                [folder] = (tmp_path / "memory").glob(f"*/process-{victim}")
                shutil.rmtree(folder)
        except BaseException:
            process.kill()
            raise
    code, out, errors = finish(process)
    assert code == 0, out + errors
    assert "starting again" in errors
    [line] = [line for line in out.splitlines() if line.startswith("restored from the memory")]
    # a process may also be killed between its copy at the neighbour and its own file
    assert "loss" not in fault or "the shards of process" in line
    [_, second] = attempts.read(str(tmp_path / "run"))
    assert second["from_step"] > 0 and f"at step {second['from_step']}" in line
    assert saved_leaves(tmp_path / "run", STEPS) == undisturbed
    assert not kept(tmp_path / "memory")
