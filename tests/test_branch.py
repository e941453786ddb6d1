"""A run that branches off another one is the run that it would be by itself."""

import json
import time

import jax
import numpy as np
import pytest

from lm.checkpoint.manager import Checkpoints
from lm.reliability import data_ledger
from lm.telemetry import metrics
from lm.telemetry.goodput import GOODPUT_FILE
from lm.training.experiment import Experiment
from lm.training.loop import train

SCHEDULE = {
    "train.num_steps": 10,
    "optimizer.schedule.kind": "wsd",
    "optimizer.schedule.warmup_steps": 2,
    "optimizer.schedule.decay_steps": 3,
    "optimizer.schedule.final_fraction": 0.0,
    "data.validation": ("synthetic:markov:16:7",),
    "model.dropout": 0.1,
    "train.log_every": 1,
    "checkpoint.every": 4,
    "checkpoint.keep_last": 5,
    "guard.self_check": False,
    "mesh.data": 1,
}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, make_config, devices):
    """The folder of a run of ten steps, with checkpoints at 4, 8 and 10."""
    folder = tmp_path_factory.mktemp("runs") / "trunk"
    assert train(make_config(SCHEDULE), str(folder), devices[:1]) == 0
    return folder


@pytest.fixture(scope="module")
def branch_config(trunk, make_config):
    """(changes) -> the config of a run of 7 steps that goes on from step 4 of the trunk."""

    def make(changes=None):
        branch = {"train.num_steps": 7, "init.branch_from": str(trunk), "init.step": 4}
        return make_config({**SCHEDULE, **branch, **(changes or {})})

    return make


def final_state(config, folder, devices, step):
    experiment = Experiment(config, devices[:1])
    with Checkpoints(str(folder), experiment.config.checkpoint, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(experiment.abstract_state, step)
    return jax.device_get(state)


def test_a_cool_down_is_bit_for_bit_the_run_of_its_length(
    trunk, branch_config, make_config, devices, tmp_path
):
    config = branch_config()
    called = time.time()
    assert train(config, str(tmp_path / "branch"), devices[:1]) == 0
    # the time of this process before the call is not the run's
    assert (
        json.loads((tmp_path / "branch" / GOODPUT_FILE).read_text().split("\n")[0])["began"]
        > called - 1
    )
    whole = make_config({**SCHEDULE, "train.num_steps": 7})
    assert train(whole, str(tmp_path / "whole"), devices[:1]) == 0

    a, b = (final_state(whole, tmp_path / name, devices, 7) for name in ("branch", "whole"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    mine, others = (metrics.read(str(tmp_path / name)) for name in ("branch", "whole"))
    assert mine[-1]["kind"] == "eval" and mine[-1] == others[-1]
    assert [r["step"] for r in mine if r["kind"] == "train"] == [5, 6, 7]
    # it consumed what the other one did, and its chain is that of all seven steps
    assert (
        data_ledger.read(str(tmp_path / "branch")) == data_ledger.read(str(tmp_path / "whole"))[4:]
    )
    # and the cool-down is none: without it the parameters are others
    longer = final_state(make_config(SCHEDULE), trunk, devices, 8)
    assert not np.array_equal(jax.tree.leaves(a.params)[0], jax.tree.leaves(longer.params)[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"optimizer.schedule.decay_steps": 5},
            "at step 3 the learning rate is 1 of its peak -> 0.8; the runs agree up to step 3",
        ),
        ({"optimizer.schedule.warmup_steps": 3}, "at step 0 the learning rate is 0.5 of its peak"),
        ({"optimizer.learning_rate": 1e-3}, "config.optimizer.learning_rate: 0.0003 -> 0.001"),
        ({"data.batch_size": 8}, "config.data.batch_size: 16 -> 8"),
        ({"seed": 1}, "config.seed: 0 -> 1"),
        ({"init.step": None}, "needs config.init.step"),
        (
            {"train.num_steps": 4, "optimizer.schedule.decay_steps": 2},
            "must be less than the steps",
        ),
        ({"init.from_": "elsewhere"}, "leave out config.init.from"),
        ({"init.step": 5}, "no checkpoint of step 5"),
    ],
)
def test_a_branch_that_would_be_another_run_is_refused(branch_config, devices, changes, message):
    experiment = Experiment(branch_config(changes), devices[:1])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        _ = experiment.fork
    assert message in str(error.value)
    assert "branch_from" in str(error.value) or "config.init.step" in str(error.value)


def test_what_is_named_may_differ(branch_config, devices):
    changes = {
        "data.batch_size": 8,
        "optimizer.schedule.decay_steps": 5,
        "checkpoint.allow_changed": ("data.batch_size", "optimizer.schedule"),
    }
    assert Experiment(branch_config(changes), devices[:1]).fork is not None
