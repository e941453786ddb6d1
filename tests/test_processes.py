"""Two real processes of one run, and what the world does to one of them."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from environment import fake_devices

from lm.exit_codes import Exit
from lm.reliability import data_ledger
from lm.telemetry import metrics
from tests import faults

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def start(tmp_path):
    """(overrides) -> a launcher of two processes with one device each, in tmp_path / "run"."""
    started = []

    def begin(*overrides):
        command = [sys.executable, str(ROOT / "scripts" / "launch" / "local.py"), "--processes=2"]
        command += ["--grace=15", "--", str(ROOT / "scripts" / "train.py")]
        command += [f"--config={ROOT / 'configs' / 'smoke.py'}", f"--workdir={tmp_path / 'run'}"]
        command += ["--config.train.num_steps=100000", "--config.checkpoint.every=0"]
        command += ["--config.log.parameter_table=False", "--config.train.log_every=1", *overrides]
        with (tmp_path / "log").open("w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        return started[-1]

    yield begin
    for process in started:
        process.kill()  # its children die with it
        process.wait()


def reach(folder, process, step, timeout=600):
    """Waits until the run has done `step` steps."""
    deadline = time.monotonic() + timeout
    while len(data_ledger.read(str(folder / "run"))) < step:
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
        time.sleep(0.02)


def children(process):
    path = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return sorted(map(int, path.read_text().split()))


def checkpoints(folder):
    return sorted(int(p.name) for p in (folder / "run/checkpoints").iterdir() if p.name.isdigit())


def test_a_sigterm_to_one_of_two_saves_both_at_the_same_step(start, tmp_path):
    process = start()
    reach(tmp_path, process, 20)
    os.kill(children(process)[1], signal.SIGTERM)  # not the one that leads
    assert process.wait(timeout=300) == Exit.TERMINATED
    [step] = checkpoints(tmp_path)
    log = (tmp_path / "log").read_text()
    assert f"SIGTERM: saved at step {step}" in log
    folder = tmp_path / "run/checkpoints" / str(step)
    assert [p.name for p in folder.glob("verified-*")] == ["verified-0-of-1"]
    manifest = json.loads((folder / "manifest/manifest.json").read_text())
    assert manifest["ledger"]["steps"] == step == len(data_ledger.read(str(tmp_path / "run")))


@pytest.mark.slow  # a run that hangs: test_a_source_that_gives_nothing
def test_a_stopped_process_ends_both_with_their_stacks(start, tmp_path):
    process = start("--config.guard.step_seconds=4", "--config.guard.step_factor=2")
    reach(tmp_path, process, 20)
    began = time.monotonic()
    os.kill(children(process)[1], signal.SIGSTOP)
    assert process.wait(timeout=300) == Exit.HUNG
    assert time.monotonic() - began < 100
    stacks = {p.name: p.read_text() for p in (tmp_path / "run/stacks").iterdir()}
    assert set(stacks) == {"process-0.txt", "process-1.txt"}
    assert all("lm/training/loop.py" in text for text in stacks.values())


def test_a_source_that_gives_nothing_ends_the_run_with_its_stacks(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import importlib.util, pathlib\n"
        "from lm.config import conversion as config_tree\n"
        f"path = pathlib.Path({str(ROOT)!r}) / 'configs/smoke.py'\n"
        "spec = importlib.util.spec_from_file_location('smoke', path)\n"
        "smoke = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(smoke)\n"
        "def get_config(arg=None):\n"
        "    config = smoke.get_config()\n"
        "    slow = config_tree.default(objective='tests.slow_objective')\n"
        "    config.objective = slow.objective\n"
        "    return config\n"
    )
    command = [sys.executable, str(ROOT / "scripts" / "train.py")]
    command += [f"--config={tmp_path / 'slow.py'}", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.guard.data_seconds=2", "--config.train.log_every=1"]
    options = {"env": fake_devices(1), "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run(command, **options, check=False)
    assert done.returncode == Exit.HUNG, done.stderr
    assert "no progress for 2 s in phase 'data', whose budget is 2 s" in done.stderr
    assert "slow_objective.py" in (tmp_path / "run/stacks/process-0.txt").read_text()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_its_last_good_checkpoint(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train.py")]
    command += [f"--config={ROOT / 'configs' / 'smoke.py'}", f"--workdir={tmp_path / 'disk/run'}"]
    command += ["--config.checkpoint.keep_last=10", "--config.checkpoint.every=10"]
    command += ["--config.train.num_steps=80"]
    options = {"env": fake_devices(1), "capture_output": True, "text": True, "timeout": 600}
    with faults.small_disk(tmp_path / "disk", megabytes=2):
        full = subprocess.run(command, **options, check=False)
        assert full.returncode == Exit.SAVE_FAILED, full.stderr
        assert "No space left on device" in full.stderr
        assert "Traceback (most recent call last)" not in full.stderr
        good = max(checkpoints(tmp_path / "disk"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        again = subprocess.run(command, **options, check=False)
        assert again.returncode == Exit.SUCCESS, again.stderr
        assert f"from step {good} to 80" in again.stdout
        assert not (tmp_path / "disk/run/bad_checkpoints").exists()


def two(commands, roots=(ROOT, ROOT)):
    """(exit code, output) of two processes that meet on a port, each with the code below a root."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    given = [f"--coordinator=localhost:{port}", "--num-processes=2"]
    started = [
        subprocess.Popen(
            [sys.executable, *command, *given, f"--process-id={i}"],
            env=fake_devices(1) | {"PYTHONPATH": str(roots[i])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, command in enumerate(commands)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    return [(p.returncode, output) for p, output in zip(started, outputs, strict=True)]


def test_processes_with_different_configs_refuse_to_train_and_name_the_difference(tmp_path):
    config = f"--config={ROOT / 'configs' / 'smoke.py'}"
    command = [str(ROOT / "scripts" / "train.py"), config, f"--workdir={tmp_path / 'run'}"]
    changed = [*command, "--config.optimizer.learning_rate=0.5"]
    for code, output in two([command, changed]):
        assert code == Exit.MISMATCH, output
        expected = "config.optimizer.learning_rate: process 0 has 0.003, process 1 has 0.5"
        assert expected in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def run_two(folder, *names):
    """(folder, exit codes of each run) of the named runs of tests/two_process_runs.py."""
    command = [sys.executable, str(ROOT / "scripts" / "launch" / "local.py"), "--processes=2"]
    command += ["--devices-per-process=1", "--grace=15", "--"]
    command += [str(ROOT / "tests" / "two_process_runs.py"), str(folder), *names]
    done = subprocess.run(
        command, env=fake_devices(1), capture_output=True, text=True, timeout=590, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    codes = {}
    for line in (folder / "codes.jsonl").read_text().splitlines():
        name, code = json.loads(line)
        codes.setdefault(name, []).append(code)
    return folder, codes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_two(tmp_path_factory.mktemp("runs"), "rewind", "diverges", "time")


def saved(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def test_two_processes_do_what_was_due_at_a_last_step_that_was_bad(runs):
    folder, codes = runs
    assert codes["rewind"] == [Exit.SUCCESS]
    assert saved(folder / "rewind") == [4, 8]
    evaluated = [r["step"] for r in metrics.read(str(folder / "rewind")) if r["kind"] == "eval"]
    assert evaluated == [4, 8]
    assert json.loads((folder / "rewind/evidence/step-7.json").read_text())["verdict"] == "data"


@pytest.mark.slow  # on one process: tests/test_host_memory.py
def test_two_processes_with_their_state_in_host_memory_train_resume_and_save_the_same(tmp_path):
    folder, codes = run_two(tmp_path, "memory")
    # the last one of host: finished, though a process sees an old listing of the folder
    assert codes["device"] == [0, 0] and codes["host"] == [0, 0, 0]
    for step in (4, 8):
        leaves = [
            json.loads((folder / n / f"checkpoints/{step}/manifest/manifest.json").read_text())
            for n in ("device", "host")
        ]
        assert leaves[0]["leaves"] == leaves[1]["leaves"]


def test_two_processes_end_with_the_code_of_a_last_evaluation_that_is_not_finite(runs):
    folder, codes = runs
    assert codes["diverges"] == [Exit.DIVERGED, Exit.DIVERGED]
    assert saved(folder / "diverges") == [1]


def test_two_processes_save_once_each_time_that_it_is_time(runs):
    folder, codes = runs
    assert codes["time"] == [Exit.TERMINATED]
    *by_time, _ = saved(folder / "time")  # the last one is the signal's
    times = [
        json.loads((folder / f"time/checkpoints/{s}/manifest/manifest.json").read_text())["time"]
        for s in by_time
    ]
    assert len(times) >= 3
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.9


def test_processes_with_different_code_refuse_to_train_and_say_so(tmp_path):
    copy = tmp_path / "copy"
    for name in ("lm", "scripts", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "lm" / "types.py").open("a") as file:
        file.write("\n# another version\n")
    given = [f"--config={ROOT / 'configs' / 'smoke.py'}", f"--workdir={tmp_path / 'run'}"]
    commands = [[str(root / "scripts" / "train.py"), *given] for root in (ROOT, copy)]
    for code, output in two(commands, (ROOT, copy)):
        assert code == Exit.MISMATCH, output
        assert "code.source: process 0 has" in output and "Traceback" not in output
