"""Killed at random moments, a run ends with the bits of one that nobody touched."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SHORT = ("--", f"--config={ROOT}/configs/smoke.py", "--config.train.num_steps=80")


def kill_test(folder, *flags, timeout=600):
    script = str(ROOT / "scripts" / "kill_test.py")
    command = [sys.executable, script, f"--out={folder}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])


# by number of kills: a save, an evaluation, then a step and a start
@pytest.mark.parametrize("kills", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_kills_in_a_save_and_an_evaluation_change_nothing(tmp_path, kills):
    result = kill_test(tmp_path, f"--kills={kills}", "--devices-per-process=2", *SHORT)
    assert result["kills"] == kills and result["leaves_that_differ"] == 0
    assert result["leaves"] > 20 and result["same_ledger"]
    assert result["inside_a_save"] >= 1


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_processes_sees_the_same_data(tmp_path):
    flags = ("--kills=2", "--processes=2", "--devices-per-process=1", "--restart-on=1,2")
    result = kill_test(tmp_path, *flags, *SHORT)
    assert result["same_ledger"]
    assert result["largest_relative_difference"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)])
def test_fifty_kills_change_nothing(tmp_path, mesh):
    processes, devices = mesh
    flags = ("--kills=50", f"--processes={processes}", f"--devices-per-process={devices}")
    result = kill_test(tmp_path, *flags, timeout=7200)
    assert result["kills"] == 50 and result["leaves_that_differ"] == 0
