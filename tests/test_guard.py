"""Signals and the watchdog, in real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lm.config.schema import GuardConfig
from lm.exit_codes import Exit
from lm.parallel.consensus import Consensus, Vote
from lm.reliability.stop_signals import SAME
from lm.reliability.watchdog import Watchdog
from lm.reliability.workdir_lock import WorkdirLocked, lock_workdir
from lm.telemetry.phase_timer import PhaseTimer


def start(body, *arguments):
    code = """
        import signal, sys, time
        from lm.config.schema import GuardConfig
        from lm.reliability.stop_signals import StopSignals
        from lm.reliability.watchdog import Watchdog
        from lm.reliability.workdir_lock import lock_workdir
        from lm.telemetry.phase_timer import PhaseTimer
    """
    program = textwrap.dedent(code) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(number):
    process = start(
        """
        with StopSignals() as signals:
            print("up", flush=True)
            while signals.received is None:
                time.sleep(0.01)
            print(signals.received.name, flush=True)
            import ctypes
            mutex = ctypes.create_string_buffer(64)
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
            ctypes.CDLL(None).pthread_mutex_lock(mutex)  # waits in C for ever, as for a device
        """
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    if number == signal.SIGTERM:  # `timeout` sends one to the process, and one to its group
        process.send_signal(number)
        time.sleep(SAME + 0.2)
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=90) == {2: Exit.INTERRUPTED, 15: Exit.TERMINATED}[number]
    assert "second signal" in process.stderr.read()


def test_outside_of_the_context_signals_are_as_before():
    process = start(
        """
        with StopSignals():
            pass
        print("up", flush=True)
        time.sleep(60)
        """
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM


STUCK = """
    config = GuardConfig(
        start_seconds=1, compile_seconds=1, step_seconds=1, data_seconds=1, save_seconds=1,
        evaluate_seconds=1, step_factor=2,
    )
    phases = PhaseTimer()
    def forever():
        with phases(sys.argv[2]):
            print("stuck", flush=True)
            time.sleep(60)
    with Watchdog(config, phases, sys.argv[1]):
        forever()
"""


def test_a_folder_is_for_one_process_until_that_is_gone(tmp_path):
    folder = tmp_path / "run"
    body = """
        with lock_workdir(sys.argv[1]):
            print("held", flush=True)
            time.sleep(300)
    """
    other = start(body, str(folder))
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(WorkdirLocked, match=f"process {other.pid} on .* trains there"),
            lock_workdir(str(folder)),
        ):
            pass
        with lock_workdir(str(folder), active=False):  # another process of the same run
            pass
    finally:
        other.kill()
        other.communicate()
    for _ in range(2):
        with lock_workdir(str(folder)):
            assert (folder / "lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_lock_that_nothing_came_of_leaves_no_trace(tmp_path, is_there):
    folder = tmp_path / "run"
    if is_there:
        folder.mkdir()
    with lock_workdir(str(folder)):
        pass
    assert folder.exists() == is_there and not (folder / "lock").exists()
    with lock_workdir(str(folder)):
        (folder / "config.json").touch()
    assert (folder / "lock").exists()


@pytest.mark.parametrize("phase", ["compile", "step", "data", "save", "evaluate"])
def test_a_phase_without_progress_ends_the_process_with_its_stacks(tmp_path, phase):
    began = time.monotonic()
    process = start(STUCK, tmp_path, phase)
    assert process.wait(timeout=60) == Exit.HUNG
    assert time.monotonic() - began < 30
    errors = process.stderr.read()
    assert f"no progress for 1 s in phase '{phase}', whose budget is 1 s" in errors
    [stacks] = (tmp_path / "stacks").iterdir()
    assert "in forever" in stacks.read_text() and "Thread" in stacks.read_text()


def test_beats_and_ends_of_phases_keep_the_watchdog_quiet(tmp_path):
    process = start(
        """
        config = GuardConfig(evaluate_seconds=0.5, data_seconds=0.5)
        phases = PhaseTimer()
        with Watchdog(config, phases, sys.argv[1]):
            for _ in range(20):
                with phases("data"):
                    time.sleep(0.1)
            with phases("evaluate"):
                for _ in range(20):
                    time.sleep(0.1)
                    phases.heartbeat()
        time.sleep(1)
        """,
        tmp_path,
    )
    assert process.wait(timeout=60) == 0, process.stderr.read()
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_process_writes_its_stacks_when_it_is_woken(tmp_path):
    process = start(STUCK.replace("step_seconds=1", "step_seconds=3"), tmp_path, "data")
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    assert not (tmp_path / "stacks").exists()
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=30) == Exit.HUNG
    assert (tmp_path / "stacks" / "process-0.txt").exists()


def test_the_budget_of_a_step_follows_the_running_median(tmp_path):
    config = GuardConfig(step_seconds=5.0, step_factor=10.0, compile_seconds=1000.0)
    watchdog = Watchdog(config, PhaseTimer(), str(tmp_path))
    assert watchdog.budget("step") == 1000.0  # the first ones may still compile
    for seconds in (0.1, 0.1, 0.1):
        watchdog.add_step(seconds)
    assert watchdog.budget("step") == 5.0
    for seconds in (2.0, 2.0, 2.0, 2.0, 300.0):
        watchdog.add_step(seconds)
    assert watchdog.budget("step") == 20.0  # one slow step doesn't loosen it


def test_one_process_needs_no_vote(rules_on):
    votes = Consensus(rules_on(data=4))
    for vote in (Vote(), Vote(signal.SIGTERM), Vote(None, save=True)):
        assert votes.collect(votes.start(vote, 1.5)) == (vote, 0, 0.0)
