"""Attempts of a run: each is noted, and those that come to nothing end the run with evidence."""

from __future__ import annotations

import dataclasses
import errno
import json

import pytest

from lm.config.schema import GuardConfig
from lm.exit_codes import Exit, RunError
from lm.reliability import attempts
from lm.reliability.attempts import Attempts, NoProgress
from lm.telemetry import jsonl
from lm.training.loop import train
from lm.training.session import CannotWrite, TrainingSession

GUARD = GuardConfig()


class DeviceError(RunError):
    code = Exit.DEVICE_ERROR


class Stopped(RunError):
    code = Exit.TERMINATED


class Killed(BaseException):
    """Ends an attempt without a word."""


def make(folder, from_step=0, guard=GUARD):
    return Attempts(str(folder), guard, from_step, active=True)


def batch(step):
    return [{"source": "web", "row": step}]


def check(folder, from_step=0, guard=GUARD):
    make(folder, from_step, guard).check(lambda step: {step: batch(step)}, interrupted=lambda: True)


def attempt(folder, *, until, from_step=0, end=DeviceError, ledger=True):
    """One that does the steps from `from_step` to below `until`, and ends so in `until`."""
    own = make(folder, from_step)
    if end is Killed:
        own.__enter__()
    else:
        context = pytest.raises(end) if end else None
        if context:
            with context, own:
                steps(folder, own, from_step, until, ledger)
                raise end("the link to the chip is down")
            return
    steps(folder, own, from_step, until, ledger)


def steps(folder, own, start, stop, ledger):
    own.begin_steps()
    path = folder / "ledger.jsonl"
    for step in range(start, stop):
        own.end_step(step)
        if ledger and step >= len(jsonl.read(path)):
            with path.open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")


def test_a_step_that_fails_three_times_in_a_row_stops_the_run_with_evidence(tmp_path):
    for from_step in (0, 2, 2):
        check(tmp_path, from_step)
        attempt(tmp_path, until=5, from_step=from_step)
    with pytest.raises(NoProgress, match=r"step 5 or the next one ended the last 3 .*link to the"):
        check(tmp_path, 2)
    [path] = (tmp_path / "evidence").iterdir()
    evidence = json.loads(path.read_text())
    assert evidence["step"] == 5 and evidence["batches"] == {"5": batch(5)}
    assert [a["from_step"] for a in evidence["attempts"]] == [0, 2, 2]
    for told in evidence["attempts"]:
        assert (told["code"], told["error"]) == (48, "the link to the chip is down")
        assert told["host"] and told["began"] <= told["ended"]
    assert attempts.read(str(tmp_path))[-1]["code"] == Exit.NO_PROGRESS
    check(tmp_path, 2)  # whoever looked at it may start again


def test_kills_count_only_at_one_and_the_same_step(tmp_path):
    for until in (5, 9, 7, 7, 9):
        check(tmp_path)
        attempt(tmp_path, until=until, end=Killed)
    assert [a["step"] for a in make(tmp_path)._before] == [5, 9, 7, 7, 9]
    attempt(tmp_path, until=4, end=Killed)  # of steps that were done before, none in the ledger
    check(tmp_path)
    for until in (5, 4):  # as late as the results of a step are read
        attempt(tmp_path, until=until, end=Killed)
    with pytest.raises(
        NoProgress, match=r"step 4 or the next one ended the last 3 attempts.*no word"
    ):
        check(tmp_path)


def test_kills_before_the_first_step_are_the_failure_of_no_step(tmp_path):
    for _ in range(4):
        check(tmp_path)
        make(tmp_path).__enter__()
    assert all("step" not in a for a in attempts.read(str(tmp_path)))


@pytest.mark.parametrize("end", [Stopped, ValueError])
def test_an_end_that_saved_or_that_nothing_mends_starts_the_count_again(tmp_path, end):
    for one in (DeviceError, DeviceError, end, DeviceError, DeviceError):
        attempt(tmp_path, until=5, end=one)
    check(tmp_path)
    attempt(tmp_path, until=5)
    with pytest.raises(NoProgress):
        check(tmp_path)


def test_attempts_without_a_new_checkpoint_are_limited_and_wait_for_longer(tmp_path, monkeypatch):
    guard = dataclasses.replace(GUARD, max_attempts=4)
    pauses = []
    monkeypatch.setattr(attempts.process_group, "print_on_lead", pauses.append)
    monkeypatch.setattr(attempts, "_now", lambda: "2026-12-02T00:00:00+00:00")
    for from_step, until in ((0, 3), (0, 4), (2, 6), (2, 7), (2, 8), (2, 9)):
        check(tmp_path, from_step, guard)
        attempt(tmp_path, from_step=from_step, until=until)
    with pytest.raises(NoProgress, match="no checkpoint after that of step 2 came of the last 4"):
        check(tmp_path, 2, guard)
    check(tmp_path, 5, guard)  # where there is a checkpoint, all is well
    seconds = [int(text.split()[-2]) for text in pauses]
    assert len(seconds) == 4  # before the second, and from the fourth on
    for found, longest in zip(seconds, (1, 1, 2, 4), strict=True):
        assert longest // 2 <= found <= longest
    pauses.clear()
    check(tmp_path, 2, dataclasses.replace(GUARD, max_attempts=0, step_attempts=0))
    assert not pauses


def test_the_watchdogs_end_is_noted_once(tmp_path):
    with make(tmp_path) as own:
        steps(tmp_path, own, 0, 3, ledger=True)
        own.end(Exit.HUNG, "no progress for 4 s in phase 'step'\n\nstacks: x")
    [found] = attempts.read(str(tmp_path))
    assert (found["code"], found["step"]) == (Exit.HUNG, 3)
    assert found["error"] == "no progress for 4 s in phase 'step' … stacks: x"


@pytest.fixture
def fail(monkeypatch, shared_steps):
    """The error with which every run fails in step 4; none once it is cleared."""
    on: list[Exception] = [DeviceError("the link to the chip is down")]
    push = TrainingSession.push_results

    def failing(self, step, *rest):
        push(self, step, *rest)
        if step == 4 and on:
            raise on[0]

    monkeypatch.setattr(TrainingSession, "push_results", failing)
    return on


def test_a_run_stops_with_the_records_of_the_batch_and_goes_on_when_told(
    make_config, tmp_path, devices, fail
):
    changes = {"train.num_steps": 6, "guard.self_check": False, "checkpoint.every": 2}
    config = make_config(changes)
    for _ in range(3):
        with pytest.raises(DeviceError):
            train(config, str(tmp_path), devices[:1])
    with pytest.raises(NoProgress, match="step 4 or the next one ended the last 3"):
        train(config, str(tmp_path), devices[:1])
    [path] = (tmp_path / "evidence").iterdir()
    batches = json.loads(path.read_text())["batches"]
    assert list(batches) == ["4", "5"]
    for rows in batches.values():
        assert len(rows) == 16 and {row["source"] for row in rows} == {"synthetic:markov"}
        assert all(row["documents"] for row in rows)
    fail.clear()
    assert train(config, str(tmp_path), devices[:1]) == Exit.SUCCESS
    codes = [a["code"] for a in attempts.read(str(tmp_path))]
    assert codes == [48, 48, 48, Exit.NO_PROGRESS, 0]


def test_a_full_disk_is_noted_with_the_code_that_the_process_ends_with(
    make_config, tmp_path, devices, fail
):
    config = make_config({"train.num_steps": 6, "guard.self_check": False})
    fail[0] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(CannotWrite, match="can't be written: No space left") as ended:
        train(config, str(tmp_path), devices[:1])
    [found] = attempts.read(str(tmp_path))
    assert found["code"] == ended.value.code == Exit.SAVE_FAILED
    assert "make space" in found["error"]
