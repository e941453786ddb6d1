"""The loop's work besides stepping."""

import json
from types import SimpleNamespace

import jax
import pytest

from lm.config.schema import LogConfig
from lm.telemetry.phase_timer import PhaseTimer
from lm.training.loop import _batches, train


def profiled(folder, log, start, stop):
    """(step, None) of the steps of a run that is profiled."""
    experiment = SimpleNamespace(
        config=SimpleNamespace(log=log),
        num_steps=stop,
        batches=lambda start, stop: ((i, None) for i in range(start, stop)),
    )
    session = SimpleNamespace(experiment=experiment, phases=PhaseTimer(), workdir=str(folder))
    return _batches(session, start)


def names_in_trace(folder):
    [trace] = folder.glob("profile/plugins/profile/*/*.xplane.pb")
    return {f"work{i}" for i in range(10) if f"work{i}".encode() in trace.read_bytes()}


@pytest.mark.parametrize("start, expected", [(0, {"work2", "work3"}), (3, {"work3"})])
def test_the_profiler_sees_the_steps_of_its_window_alone(tmp_path, start, expected):
    config = LogConfig(profile_start=2, profile_steps=2)
    steps = []
    for step, _ in profiled(tmp_path, config, start, 6):
        with jax.profiler.TraceAnnotation(f"work{step}"):
            steps.append(step)
    assert steps == list(range(start, 6))
    assert names_in_trace(tmp_path) == expected


def test_a_window_that_the_run_ends_in_is_written(tmp_path):
    config = LogConfig(profile_start=1, profile_steps=100)
    for step, _ in profiled(tmp_path, config, 0, 3):
        with jax.profiler.TraceAnnotation(f"work{step}"):
            pass
    assert names_in_trace(tmp_path) == {"work1", "work2"}


def test_a_schedule_longer_than_the_run_is_refused_before_anything_is_compiled(make_experiment):
    changes = {"optimizer.schedule.warmup_steps": 20, "train.num_steps": 10}
    with pytest.raises(ValueError, match=r"warmup_steps \(20\) .* need 20 steps; the run has 10"):
        make_experiment(changes).num_steps  # noqa: B018
    changes = {"optimizer.schedule.kind": "range", "optimizer.schedule.final_fraction": 0.0}
    with pytest.raises(ValueError, match=r"final_fraction \(0\.0\) must be above 0 and below 1"):
        make_experiment(changes).num_steps  # noqa: B018


def test_a_run_whose_objective_was_given_by_name_alone_goes_on(make_config, tmp_path, capsys):
    config = make_config({"train.num_steps": 2, "guard.self_check": False})
    config.objective = {"name": "prefix"}  # and no field of it
    for _ in range(2):
        assert train(config, str(tmp_path), jax.devices()[:1]) == 0
    assert "finished, all 2 steps are done" in capsys.readouterr().out
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["objective"] == {"name": "prefix", "bidirectional": True}

    config.objective.name = "causal"
    with pytest.raises(ValueError, match=r"config\.objective\.name: 'prefix' -> 'causal'"):
        train(config, str(tmp_path), jax.devices()[:1])


def test_a_run_of_an_older_version_without_a_components_fields_goes_on(make_config, tmp_path):
    config = make_config({"train.num_steps": 2, "guard.self_check": False})
    config.objective = {"name": "prefix"}
    assert train(config, str(tmp_path), jax.devices()[:1]) == 0
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["objective"]["bidirectional"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert train(config, str(tmp_path), jax.devices()[:1]) == 0
