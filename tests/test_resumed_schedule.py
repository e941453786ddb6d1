"""A resumed run is the run that the new config would have been, or is refused before compiling."""

import jax
import numpy as np
import pytest

from lm.checkpoint import step_files
from lm.checkpoint.manager import Checkpoints
from lm.config import conversion
from lm.exit_codes import Exit
from lm.telemetry import metrics
from lm.training.experiment import Experiment
from lm.training.loop import train
from lm.training.restore import restore
from lm.training.session import TrainingSession

CHANGES = {
    "train.num_steps": 6,
    "train.log_every": 1,
    "optimizer.learning_rate": 1e-3,
    "guard.self_check": False,
    "mesh.data": -1,
}


@pytest.fixture
def go(make_config, devices, tmp_path):
    """(changes, num_devices) -> the exit code of the run in one folder."""

    def start(changes=None, num_devices=1):
        config = make_config({**CHANGES, **(changes or {})})
        return train(config, str(tmp_path), devices[:num_devices])

    return start


def rates(folder):
    return [r["learning_rate"] for r in metrics.read(str(folder)) if r["kind"] == "train"]


def test_another_length_under_cosine_is_refused_with_both_learning_rates(go, tmp_path, monkeypatch):
    assert go() == Exit.SUCCESS
    before = (tmp_path / "config.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "lower_train_step", None)  # nothing is compiled
        with pytest.raises(ValueError, match="6 -> 12 steps") as error:
            go({"train.num_steps": 12})
    assert "from 0.0001603 at step 5 to 0.00055 at step 6" in str(error.value)
    assert "allow_changed=\"('optimizer.schedule',)\"" in str(error.value)
    assert (tmp_path / "config.json").read_text() == before
    allowed = {"train.num_steps": 12, "checkpoint.allow_changed": ("optimizer.schedule",)}
    assert go(allowed) == Exit.SUCCESS
    assert rates(tmp_path)[5:7] == pytest.approx([1.603e-4, 5.5e-4], rel=1e-3)
    assert go({"train.num_steps": 12}) == Exit.SUCCESS  # finished: it is this run now


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.schedule.kind": "constant"},
        pytest.param(
            {"optimizer.schedule.kind": "wsd", "optimizer.schedule.decay_steps": 2},
            marks=pytest.mark.slow,
        ),
        {"train.num_steps": None, "train.num_tokens": 3072, "optimizer.schedule.kind": "constant"},
    ],
    ids=["constant", "wsd", "tokens"],
)
def test_a_run_whose_done_steps_stay_as_they_were_can_be_made_longer(
    go, tmp_path, changes, monkeypatch
):
    """wsd from before its decay; the length in tokens is the same when given in steps."""
    if changes["optimizer.schedule.kind"] == "wsd":
        save = TrainingSession.save

        def stop_at_four(self, state):
            save(self, state)
            if int(state.step) == 4:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(TrainingSession, "save", stop_at_four)
            with pytest.raises(KeyboardInterrupt):
                go({**changes, "checkpoint.every": 4})
    else:
        assert go(changes) == Exit.SUCCESS
    longer = {**changes, "train.num_steps": 8, "train.num_tokens": None}
    assert go(longer) == Exit.SUCCESS
    assert max(step_files.steps(tmp_path / "checkpoints")) == 8


def test_wsd_in_its_decay_is_not_made_longer_by_surprise(go):
    changes = {"optimizer.schedule.kind": "wsd", "optimizer.schedule.decay_steps": 3}
    assert go(changes) == Exit.SUCCESS
    with pytest.raises(ValueError, match=r"wsd\): 6 -> 9 steps"):
        go({**changes, "train.num_steps": 9})


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("data.tran", "data.train"),
        ("config.data.train", "data.train"),
        ("learning_rate", "optimizer.learning_rate"),
    ],
)
def test_what_may_change_is_named_by_paths_that_exist(go, path, meant):
    with pytest.raises(ValueError, match=f"'{path}' is no path .* did you mean '{meant}'"):
        go({"checkpoint.allow_changed": ("data.tokenizer", path)})


def test_a_path_of_a_component_that_the_run_had_before_may_be_named(make_config):
    conversion.check_paths(("objective.mask_fraction", "model"), [make_config({})], "key")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"optimizer.name": "adafactor"}, marks=pytest.mark.slow),
        {"model.num_layers": 3},
    ],
    ids=["optimizer", "model"],
)
def test_other_arrays_are_refused_with_the_change_whatever_is_allowed(go, change, monkeypatch):
    assert go({"train.num_steps": 2, "optimizer.schedule.kind": "constant"}) == Exit.SUCCESS
    longer = {"optimizer.schedule.kind": "constant", "checkpoint.allow_changed": ("model",)}
    monkeypatch.setattr(Experiment, "lower_train_step", None)  # nothing is compiled
    with pytest.raises(ValueError, match=r"--config\.init\.from=") as error:
        go({**change, **longer})
    assert f"  config.{next(iter(change))}: " in str(error.value)


def test_rows_per_device_on_other_devices_are_another_batch(go, tmp_path, capsys):
    per_device = {"data.batch_size": None, "data.batch_size_per_device": 4}
    constant = {"optimizer.schedule.kind": "constant"}
    assert go({**per_device, **constant}, num_devices=2) == Exit.SUCCESS
    longer = {**constant, "train.num_steps": 8}
    with pytest.raises(ValueError, match=r"\(4\) on 1 devices: 8 -> 4 rows a batch") as error:
        go({**per_device, **longer}, num_devices=1)
    assert "allow_changed=\"('data.batch_size_per_device',)\"" in str(error.value)
    # the same rows, said in another way
    assert go({"data.batch_size": 8, **longer}, num_devices=1) == Exit.SUCCESS
    assert "consumed something else" not in capsys.readouterr().out


def test_a_skipped_update_does_not_put_off_the_end_of_the_schedule(make_experiment):
    """Steps 1 and 2 of four are spikes; the last has the learning rate of a last one."""
    experiment = make_experiment(
        {
            "train.num_steps": 4,
            "optimizer.name": "sgd",
            "optimizer.learning_rate": 1.0,
            "optimizer.b1": 0.0,
            "optimizer.weight_decay": 0.0,
            "optimizer.clip_norm": 0.0,
            "optimizer.schedule.kind": "linear",
            "optimizer.schedule.final_fraction": 0.0,
        }
    )
    state = experiment.init_state()
    for step, batch in experiment.batches(0, 4):
        if step in (1, 2):
            batch = batch.replace(weights=batch.weights * np.nan)
        gradients, sums = experiment.gradients(state.params, batch, step)
        before, scale = jax.device_get(state.params), 1 / np.float32(sums["tokens"])
        state, _, info = experiment.train_step(state, batch)
    assert not info["bad"]
    jax.tree.map(
        lambda old, new, g: np.testing.assert_allclose(new, old - 0.25 * scale * g, atol=1e-7),
        *jax.device_get((before, state.params, gradients)),
    )


def test_a_checkpoint_that_counted_updates_goes_on_with_the_rates_of_its_steps(
    make_experiment, tmp_path
):
    """As older code left it after skipped updates: the count of the schedule is behind the step."""
    changes = {"train.num_steps": 8, "optimizer.schedule.kind": "linear"}
    experiment = make_experiment(changes)
    state, ends = experiment.init_state().replace(step=jax.numpy.int32(6)), []
    for at in (3, 6):
        counted = jax.tree.map(
            lambda x, at=at: x._replace(count=jax.numpy.int32(at)) if hasattr(x, "count") else x,
            state.opt_state,
            is_leaf=lambda x: type(x).__name__ == "ScaleByScheduleState",
        )
        folder = str(tmp_path / str(at))
        with Checkpoints(folder, experiment.config.checkpoint) as checkpoints:
            checkpoints.save(state.replace(opt_state=counted))
        with Checkpoints(folder, experiment.config.checkpoint) as checkpoints:
            back, manifest = restore(experiment, checkpoints)
        assert manifest.resolved == {}  # it has none of a loop, as none of older code
        [(_, batch)] = experiment.batches(6, 7)
        ends.append(jax.device_get(experiment.train_step(back, batch)[0]))
    jax.tree.map(np.testing.assert_array_equal, *ends)
