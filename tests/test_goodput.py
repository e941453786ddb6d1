"""Goodput: the division of a run's wall time, and the clock behind it."""

import subprocess
import sys
import time

import pytest

from lm.telemetry.goodput import Goodput, process_start, read, report
from lm.telemetry.phase_timer import PhaseTimer


def test_phases_share_all_of_the_time_and_nest():
    phases = PhaseTimer()
    time.sleep(0.05)
    with phases("evaluate"):
        time.sleep(0.05)
        with phases("data"):
            assert phases.moment.phase == "data"
            time.sleep(0.1)
        assert phases.moment.phase == "evaluate"
        time.sleep(0.05)
    before = time.monotonic() - phases.began
    seconds = phases.seconds()
    assert before <= sum(seconds.values()) <= time.monotonic() - phases.began
    for phase, least in {"start": 0.05, "evaluate": 0.1, "data": 0.1}.items():
        assert least <= seconds[phase]
    with pytest.raises(KeyError, match="'lunch' is no phase"), phases("lunch"):
        pass


def test_an_error_ends_its_phase():
    phases = PhaseTimer()
    with pytest.raises(ValueError, match="x"), phases("save"):
        raise ValueError("x")
    assert phases.moment.phase == "start"


def test_a_beat_starts_the_budget_again():
    phases = PhaseTimer()
    before = phases.moment
    time.sleep(0.02)
    phases.heartbeat()
    assert phases.moment.phase == before.phase and phases.moment.since >= before.since + 0.02


def test_what_was_before_the_run_counts_but_was_not_watched():
    phases = PhaseTimer(time.monotonic() - 3600.0)
    assert phases.seconds()["start"] >= 3600
    assert time.monotonic() - phases.moment.since < 1800


def test_imports_count_as_start():
    code = (
        "import time; time.sleep(0.5); from lm.telemetry.goodput import process_start;"
        "print(time.monotonic() - process_start())"
    )
    took = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 < float(took.stdout) < 20
    assert process_start() <= time.monotonic()


def record(began, wrote, first_step, done, /, **seconds):
    return {
        "began": began,
        "wrote": wrote,
        "first_step": first_step,
        "step": done,
        "seconds": seconds,
    }


def test_goodput_of_a_run_without_interruption():
    result = report([record(0.0, 100.0, 0, 50, start=10.0, compile=5.0, step=80.0, save=5.0)])
    assert result.goodput == 0.8
    assert result.losses["start"] == 10.0 and result.losses["redone"] == 0.0
    assert result.wall == result.productive + sum(result.losses.values())


def test_steps_after_the_checkpoint_that_the_next_process_starts_from_are_lost():
    records = [
        record(0.0, 100.0, 0, 50, start=50.0, step=50.0),  # one second a step; killed later
        record(130.0, 230.0, 40, 80, start=20.0, step=80.0),  # from the checkpoint at 40
        record(240.0, 260.0, 30, 30, start=20.0),  # that of 80 was bad, and so was 40's
    ]
    result = report(records)
    assert result.productive == pytest.approx(30.0)
    assert result.losses["redone"] == pytest.approx(20.0 + 80.0)
    assert result.losses["down"] == pytest.approx(30.0 + 10.0)
    assert result.wall == pytest.approx(result.productive + sum(result.losses.values()))
    assert "3 starts" in str(result) and "redone 38.5%" in str(result)


def test_the_last_line_of_every_process_counts(tmp_path):
    assert read(str(tmp_path)) is None
    phases = PhaseTimer(time.monotonic() - 5.0)
    goodput = Goodput(str(tmp_path), phases, first_step=0)
    begun = read(str(tmp_path))  # as a kill before the first log line leaves it
    assert begun.processes == 1 and begun.losses["start"] == pytest.approx(5.0, abs=0.05)
    goodput.write(1)
    with phases("step"):
        time.sleep(0.1)
    goodput.write(2)
    goodput.close()
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write('{"began": 1')  # cut by a kill
    result = read(str(tmp_path))
    assert result.processes == 1
    assert result.productive == pytest.approx(0.1, abs=0.05)
    assert result.losses["start"] == pytest.approx(5.0, abs=0.05)

    Goodput(str(tmp_path), PhaseTimer(time.monotonic()), first_step=2).write(
        3
    )  # not onto the cut line
    assert read(str(tmp_path)).processes == 2
