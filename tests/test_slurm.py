"""scripts/launch/slurm.sbatch on a real SLURM of one node: see tests/slurm/setup.sh."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest
from test_launch import FAILING, saved_leaves

from lm.exit_codes import Exit
from lm.reliability import attempts
from lm.telemetry import metrics

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 120


def no_slurm() -> str:
    """Why there is none to test with, or ""."""
    if shutil.which("sbatch") is None:
        return "SLURM isn't installed"
    # a cluster that just happens to be there has other users
    if "lm-slurm" not in os.environ.get("SLURM_CONF", ""):
        return "SLURM_CONF isn't that of tests/slurm/setup.sh"
    done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=30)
    return "" if done.returncode == 0 else f"SLURM doesn't answer: {done.stdout}"


pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(no_slurm()), reason=no_slurm())]


class Job:
    """A run of configs/smoke.py as two tasks of one device."""

    def __init__(self, folder: pathlib.Path, *flags: str, options: tuple[str, ...] = ()):
        self.workdir, self.log = folder / "run", folder / "log"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
        command = [
            *("sbatch", "--parsable", "--ntasks-per-node=2", "--overcommit"),
            *(f"--output={self.log}", *options, "scripts/launch/slurm.sbatch"),
            *("--config=configs/smoke.py", f"--workdir={self.workdir}"),
            *("--config.mesh.data=2", f"--config.train.num_steps={STEPS}", *flags),
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def record(self) -> dict[str, str]:
        """SLURM's record of the job: JobState, Restarts, ExitCode, ..."""
        done = subprocess.run(
            ["scontrol", "show", "job", self.number], capture_output=True, text=True, check=True
        )
        return dict(re.findall(r"(\w+)=(\S*)", done.stdout))

    def wait_for(self, condition, timeout: float = 600.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)

    def wait_until(self, *states: str) -> None:
        self.wait_for(lambda: self.record()["JobState"] in states)

    def signal(self, *flags: str) -> None:
        subprocess.run(["scancel", *flags, self.number], check=True)

    def steps(self) -> list[int]:
        if not self.workdir.exists():
            return []
        return [
            record["step"]
            for record in metrics.read(str(self.workdir))
            if record["kind"] == "train"
        ]

    def go_on(self) -> None:
        """Starts it soon: SLURM lets two minutes pass before it starts a requeued job."""
        self.wait_until("PENDING")
        time.sleep(3)  # slurmd refuses what starts in the second in which it revoked the first
        subprocess.run(["scontrol", "update", f"JobId={self.number}", "StartTime=now"], check=True)


@pytest.fixture
def submit(tmp_path):
    """(flags, options=) -> a Job; ended with the test."""
    jobs = []

    def start(*flags: str, options: tuple[str, ...] = ()) -> Job:
        folder = tmp_path / str(len(jobs))
        folder.mkdir()
        jobs.append(Job(folder, *flags, options=options))
        return jobs[-1]

    yield start
    for job in jobs:
        subprocess.run(["scancel", job.number], capture_output=True)


def test_two_tasks_are_one_run_that_goes_on_after_sigterm(submit):
    job = submit()
    job.wait_for(lambda: len(job.steps()) > 5)
    job.signal("--signal=TERM")
    job.go_on()
    first = job.said()
    assert "launcher: SLURM; 2 processes, coordinator localhost:" in first
    assert "2 × cpu · data=2" in first
    # SLURM names tasks that end at one moment together
    one_by_one = all(f"task {task}: Exited with exit code 143" in first for task in (0, 1))
    assert one_by_one or "tasks 0-1: Exited with exit code 143" in first
    assert "slurm.sbatch: exit code 143: back into the queue" in first
    saved = max(job.steps())
    assert saved < STEPS

    job.wait_until("COMPLETED")
    second = job.said().removeprefix(first)
    assert "restarts: 1" in second and "slurm.sbatch: exit code 0" in second
    assert f"from step {saved} to {STEPS}" in second
    assert job.steps() == list(range(1, STEPS + 1))  # none twice, none left out
    assert job.record()["Restarts"] == "1"


def test_before_its_time_is_over_a_job_saves_and_goes_back_into_the_queue(submit):
    # SLURM counts in minutes, and may signal up to a minute early: the first of them is enough
    job = submit("--config.train.num_steps=100000", options=("--time=2", "--signal=TERM@60"))
    job.wait_for(lambda: "back into the queue" in job.said())
    job.wait_until("PENDING")
    assert "exit code 143: back into the queue" in job.said() and job.steps()


def test_a_mistake_ends_the_job(submit):
    job = submit("--config.model.num_heads=5")
    job.wait_for(lambda: "slurm.sbatch: exit code 1" in job.said())
    job.wait_until("FAILED")
    assert job.record()["ExitCode"] == "1:0" and "num_heads" in job.said()


def test_a_job_whose_device_fails_ends_with_the_bits_of_an_undisturbed_one(submit, tmp_path):
    path, marker = tmp_path / "failing.py", tmp_path / "failed"
    path.write_text(FAILING.format(root=str(ROOT), marker=str(marker)))
    flags = [f"--config={path}", "--config.checkpoint.every=5", "--config.train.num_steps=24"]
    job = submit(*flags)
    job.wait_for(lambda: "exit code 48: back into the queue" in job.said())
    job.go_on()
    assert marker.exists()
    assert "error: a device failed: INTERNAL" in job.said()
    job.wait_until("COMPLETED")
    [first, second] = attempts.read(str(job.workdir))
    assert (first["code"], second["code"], second["from_step"]) == (Exit.DEVICE_ERROR, 0, 10)
    assert job.record()["Comment"] == "lm-restarts-1"
    undisturbed = submit(*flags)  # as the marker is there
    undisturbed.wait_until("COMPLETED")
    assert undisturbed.record()["Restarts"] == "0"
    assert saved_leaves(job.workdir, 24) == saved_leaves(undisturbed.workdir, 24)


def test_a_job_that_needs_more_memory_than_there_is_is_not_started_again(submit):
    job = submit(f"--config.model.mlp_dim={2**40}", "--config.guard.self_check=False")
    job.wait_until("FAILED")
    assert job.record()["ExitCode"] == "49:0" and "back into the queue" not in job.said()
    assert "Try --config.train.num_microbatches=2" in job.said()


def test_a_cancelled_job_stays_cancelled(submit):
    job = submit("--config.train.num_steps=100000")
    job.wait_for(lambda: len(job.steps()) > 5)
    job.signal()
    job.wait_until("CANCELLED")
    time.sleep(5)  # what a requeue would have needed
    assert job.record()["JobState"] == "CANCELLED" and "back into the queue" not in job.said()


def test_a_sweep_in_a_folder_of_any_name_is_an_array(tmp_path):
    root = tmp_path / 'a b\'s "c" %j 100% {} [*]? # & ; $HOME `x` é'
    command = [sys.executable, "scripts/sweep.py", "--config=configs/smoke.py", f"--workdir={root}"]
    command += ["--grid=optimizer.learning_rate=1e-3,1e30", "--slots=2"]
    command += ["--config.train.num_steps=4", "--config.guard.self_check=False"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
    go = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    written = subprocess.run([*command, "--write=slurm"], **go)
    assert written.returncode == 0 and "2 runs in" in written.stdout, written.stderr
    submit = ["sbatch", "--parsable", "--overcommit", "--oversubscribe", str(root / "array.sbatch")]
    done = subprocess.run(submit, **go)
    assert done.returncode == 0, done.stderr
    number = done.stdout.strip()
    try:
        deadline = time.monotonic() + 600
        while len(list((root / "codes").iterdir())) < 2:
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.5)
    finally:
        subprocess.run(["scancel", number], capture_output=True)
    collected = subprocess.run([*command, "--collect"], **go)
    assert collected.returncode == 0, collected.stderr
    assert "2 runs: 1 finished, 1 diverged" in collected.stdout
    rows = [json.loads(line) for line in (root / "sweep.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["finished", "diverged"]
    logs = [root / f"lm-{number}_{task}.log" for task in (0, 1)]
    assert [log.read_text().splitlines()[-1] for log in logs] == [
        "slurm.sbatch: exit code 0",
        "slurm.sbatch: exit code 41",
    ]
