"""Several processes on one machine: started, stopped, restarted and ended together."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lm.checkpoint import step_files
from lm.exit_codes import Exit, restarts
from lm.reliability import attempts
from lm.storage.epaths import StoragePath
from lm.telemetry import metrics
from scripts.launch.local import decisive

ROOT = pathlib.Path(__file__).parent.parent
TRAIN = ROOT / "scripts" / "train.py"
LAUNCHER = str(ROOT / "scripts" / "launch" / "local.py")


def launch(*arguments: object, **kwargs) -> subprocess.Popen[str]:
    command = [sys.executable, LAUNCHER, *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **{**pipes, **kwargs})


def finish(process: subprocess.Popen[str], timeout: float = 600) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a launcher."""
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()  # its children die with it
    return process.returncode, out, errors


def wait_for(condition, timeout=300):
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return result


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the run, in order."""
    path = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return sorted(map(int, path.read_text().split())) if path.exists() else []


def state(pid: int) -> str:
    """As in ps: R running, S sleeping, T stopped, Z ended, "" gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


@pytest.fixture
def script(tmp_path):
    """(body) -> a script without JAX that knows its process id as `me`, and `here`, a folder."""

    def write(body: str) -> pathlib.Path:
        head = (
            "import os, pathlib, signal, sys, time\n"
            "me = int(sys.argv[-1].removeprefix('--process-id=')) if len(sys.argv) > 3 else 0\n"
            f"here = pathlib.Path({str(tmp_path)!r})\n"
        )
        path = tmp_path / "script.py"
        path.write_text(head + body)
        return path

    return write


def test_the_first_cause_decides_the_exit_code():
    lost, killed = Exit.PEER_LOST, 128 + signal.SIGKILL
    assert decisive([0, 0]) == 0
    assert decisive([lost, Exit.HUNG]) == Exit.HUNG
    assert decisive([Exit.SAVE_FAILED, lost, killed]) == Exit.SAVE_FAILED
    assert decisive([lost, killed]) == killed
    assert decisive([0, lost]) == lost


def test_only_what_a_restart_can_mend_is_restarted():
    killed = [128 + number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)]
    mendable = {Exit.PEER_LOST, Exit.HUNG, Exit.DEVICE_ERROR, Exit.NO_STORAGE, Exit.TERMINATED}
    assert all(map(restarts, [*mendable, *killed]))
    others = [*(set(Exit) - mendable), 3, 127, 255, *(128 + n for n in (signal.SIGHUP, 13))]
    assert not any(map(restarts, others))


def test_output_keeps_its_stream_and_names_its_process(script, tmp_path):
    path = script("print('out', me, sys.argv[1:]); print('err', me, file=sys.stderr)")
    code, out, errors = finish(
        launch("--processes=2", f"--log-dir={tmp_path / 'logs'}", "--", path, "--x=1")
    )
    assert code == 0
    assert sorted(line.split(" [")[0] for line in out.splitlines()) == ["[1] out 1", "out 0"]
    assert sorted(errors.splitlines()) == ["[1] err 1", "err 0"]
    assert "'--x=1', '--coordinator=localhost:" in out and "'--num-processes=2'" in out
    assert "err 1" in (tmp_path / "logs" / "1.log").read_text()
    _, alone, _ = finish(launch("--", path, "--x=1"))
    assert alone.strip() == "out 0 ['--x=1']"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_processes_and_a_second_one_kills_them(script, tmp_path, number):
    body = """
def handle(number, frame):
    (here / f"got-{me}").write_text(str(number))
    if "kind" in sys.argv: sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, handle)
(here / f"up-{me}").touch()
while True: time.sleep(0.01)
"""
    for arguments, code in ((["kind"], 128 + number), ([], 128 + signal.SIGKILL)):
        process = launch("--processes=2", "--max-restarts=3", "--", script(body), *arguments)
        try:
            wait_for(lambda: all((tmp_path / f"up-{i}").exists() for i in (0, 1)))
            process.send_signal(number)
            wait_for(lambda: all((tmp_path / f"got-{i}").exists() for i in (0, 1)))
            if not arguments:
                process.send_signal(number)
        finally:
            result = finish(process)
        assert result[0] == code, result
        assert "starting again" not in result[2]  # the user wanted it to end
        for path in tmp_path.glob("*-*"):
            path.unlink()


def test_when_one_fails_the_others_are_woken_then_ended(script, tmp_path):
    body = """
if me == 0:
    while not (here / "stopped").exists(): time.sleep(0.01)
    sys.exit(43)
if me == 1:  # stopped; it notices when it is woken
    signal.signal(signal.SIGCONT, lambda *_: (here / "woken").touch())
    (here / "stopped").touch()
    os.kill(os.getpid(), signal.SIGSTOP)
    sys.exit(46)
signal.signal(signal.SIGTERM, lambda *_: ((here / "asked").touch(), sys.exit(143)))
while True: time.sleep(0.01)
"""
    began = time.monotonic()
    code, _, errors = finish(launch("--processes=3", "--grace=1", "--", script(body)))
    assert code == Exit.SAVE_FAILED
    assert "process 0 ended with exit code 43 (SAVE_FAILED)" in errors
    assert (tmp_path / "woken").exists() and (tmp_path / "asked").exists()
    assert time.monotonic() - began < 20


def test_processes_die_with_their_launcher(script, tmp_path):
    process = launch("--processes=2", "--", script("(here / f'up-{me}').touch(); time.sleep(60)"))
    wait_for(lambda: all((tmp_path / f"up-{i}").exists() for i in (0, 1)))
    pids = children(process)
    assert len(pids) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: all(state(pid) in ("", "Z") for pid in pids), timeout=10)


@pytest.mark.parametrize(
    ("end", "starts", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 3, 137),
        ("sys.exit(46)", 3, 46),
        ("sys.exit(42) if len(starts) < 2 else None", 2, 0),
        ("sys.exit(48)", 3, 48),
        ("sys.exit(49)", 1, 49),
        ("sys.exit(45)", 1, 45),
        ("sys.exit(1)", 1, 1),
    ],
)
def test_a_job_starts_again_as_often_as_it_may_help(script, tmp_path, end, starts, code):
    body = f"""
with open(here / "starts", "a") as file: file.write("x" * (me == 0))
starts = (here / "starts").read_text()
if me == 0: {end}
"""
    result = finish(launch("--processes=2", "--max-restarts=2", "--", script(body)))
    assert result[0] == code, result
    assert len((tmp_path / "starts").read_text()) == starts


# ---- training ----

STEPS = 24


def train(workdir: pathlib.Path, processes: int, devices: int, *launcher: str):
    """A run on as many devices as 2 processes of `devices` have."""
    return launch(
        *(f"--processes={processes}", f"--devices-per-process={2 * devices // processes}"),
        *(*launcher, "--", ROOT / "scripts" / "train.py"),
        *(f"--config={ROOT / 'configs' / 'smoke.py'}", f"--workdir={workdir}"),
        *(f"--config.train.num_steps={STEPS}", "--config.checkpoint.every=10"),
        *(f"--config.mesh.data={devices}", "--config.mesh.fsdp=2"),
    )


FAILING = """
import importlib.util, pathlib
from lm.config import conversion as config_tree
spec = importlib.util.spec_from_file_location("smoke", pathlib.Path({root!r}, "configs/smoke.py"))
smoke = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smoke)
def get_config(arg=None):
    config = smoke.get_config()
    failing = config_tree.default(model="tests.failing_device").model
    set_ = {{k: v for k, v in config.model.to_dict().items() if k != "name" and v is not None}}
    failing.update(set_)
    failing.marker = {marker!r}
    config.model = failing
    return config
"""


@pytest.mark.slow  # in one process: tests/test_attempts.py
def test_a_job_whose_device_fails_starts_again_and_ends_with_the_same_bits(tmp_path):
    path = tmp_path / "failing.py"
    path.write_text(FAILING.format(root=str(ROOT), marker=str(tmp_path / "failed")))
    flags = ["--config.mesh.data=2", "--config.train.num_steps=24", "--config.checkpoint.every=5"]
    flags += [f"--config={path}", "--config.guard.self_check=False"]

    def train(name: str) -> tuple[int, str, str]:
        command = ["--processes=2", "--max-restarts=1", "--", ROOT / "scripts" / "train.py"]
        return finish(launch(*command, *flags, f"--workdir={tmp_path / name}"))

    code, out, errors = train("run")
    assert code == 0, out + errors
    [first, second] = attempts.read(str(tmp_path / "run"))
    assert (first["code"], second["code"]) == (Exit.DEVICE_ERROR, 0)
    assert first["step"] in (11, 12)  # its results were read, or not yet
    assert "the link to the chip is down" in first["error"]
    undisturbed = train("undisturbed")  # as the marker of the failure is there
    assert undisturbed[0] == 0 and "starting again" not in undisturbed[2]
    found, expected = (saved_leaves(tmp_path / name, 24) for name in ("run", "undisturbed"))
    assert len(found) > 10 and found == expected
    assert "JaxRuntimeError: INTERNAL" in errors and "the link to the chip is down" in errors
    assert "error: a device failed: INTERNAL" in errors
    assert "launch: process 0 ended with exit code 48 (DEVICE_ERROR)" in errors
    assert "from step 10 to 24" in out
    assert sorted(losses(tmp_path / "run")) == list(range(1, 25))


@pytest.mark.slow  # in one process: tests/test_attempts.py
@pytest.mark.parametrize(("how", "processes"), [("error", 2), ("kill", 2), ("kill", 1)])
def test_a_step_that_kills_each_attempt_ends_the_job_with_evidence(tmp_path, how, processes):
    path = tmp_path / "failing.py"
    path.write_text(FAILING.format(root=str(ROOT), marker=""))
    flags = [f"--config={path}", f"--workdir={tmp_path / 'run'}", "--config.guard.self_check=False"]
    flags += ["--config.model.fail_after=7", f"--config.model.how={how}", "--config.mesh.data=-1"]
    code, out, errors = finish(
        launch(f"--processes={processes}", "--max-restarts=9", "--", TRAIN, *flags)
    )
    assert code == Exit.NO_PROGRESS, out + errors
    assert errors.count("launch: starting again") == 3
    [path] = (tmp_path / "run" / "evidence").iterdir()
    evidence = json.loads(path.read_text())
    assert evidence["step"] in (6, 7) and list(evidence["batches"])[-1] in ("7", "8")
    assert len(evidence["attempts"]) == 3
    assert all(attempt["error"] for attempt in evidence["attempts"])


def test_a_job_that_needs_more_memory_than_there_is_is_not_started_again(tmp_path):
    # half a tebibyte in one piece; jax 0.12 compiles nothing larger: it divides by zero
    flags = [f"--config={ROOT / 'configs' / 'smoke.py'}", f"--workdir={tmp_path / 'run'}"]
    flags += [f"--config.model.mlp_dim={2**29}", "--config.guard.self_check=False"]
    code, out, errors = finish(
        launch("--max-restarts=3", "--", ROOT / "scripts" / "train.py", *flags)
    )
    assert code == Exit.OUT_OF_MEMORY, out + errors
    assert "error: out of memory: RESOURCE_EXHAUSTED" in errors
    assert "Try --config.train.num_microbatches=2 (half the rows at a time)" in errors
    assert f"scripts/plan.py {flags[0]} --config.model.mlp_dim={2**29} " in errors
    assert "--topology=cpu:1` compiles it" in errors and "starting again" not in errors


def saved_leaves(workdir: pathlib.Path, step: int):
    """Shape, dtype and checksum of all arrays of a checkpoint."""
    return step_files.read_manifest(StoragePath(workdir) / "checkpoints" / str(step)).leaves


def losses(workdir: pathlib.Path) -> dict[int, float]:
    records = metrics.read(str(workdir))
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def whole(request, tmp_path_factory):
    """(folder of a run on 2 processes that nothing interrupted, devices of each)."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, out, errors = finish(train(workdir, 2, request.param))
    assert code == 0, out + errors
    assert "launcher: flags; 2 processes" in out
    return workdir, request.param


def test_two_processes_train_as_one_with_as_many_devices(whole, tmp_path):
    workdir, devices = whole
    code, out, errors = finish(train(tmp_path, 1, devices))
    assert code == 0, out + errors
    one, two = losses(tmp_path), losses(workdir)
    assert list(one) == list(two) == list(range(1, STEPS + 1))
    # gloo adds in another order
    assert [two[step] for step in two] == pytest.approx([one[step] for step in one], rel=1e-5)


@pytest.mark.slow  # with a failing device instead: above, slow too
def test_a_job_of_which_a_process_was_killed_goes_on_to_the_same_numbers(whole, tmp_path):
    workdir, devices = whole
    process = train(tmp_path, 2, devices, "--max-restarts=1", "--grace=60")
    try:
        wait_for(lambda: len(metrics.read(str(tmp_path))) >= 15)
        os.kill(children(process)[1], signal.SIGKILL)
    finally:
        code, out, errors = finish(process)
    assert code == 0, out + errors
    assert "error: process 1 went away" in errors
    assert "launch: process 1 was killed by SIGKILL" in errors
    assert f"from step 10 to {STEPS}" in out
    assert losses(tmp_path) == losses(workdir)
