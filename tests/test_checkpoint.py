"""Checkpoints: bitwise, on any mesh, and at the step they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoint import Checkpoints
from lm.config import CheckpointConfig
from lm.experiment import Experiment
from lm.train import train
from lm.types import TrainState

CHANGES = {"optimizer.name": "adamw", "optimizer.ema_decay": 0.9}


def assert_bitwise(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def noise(state, step):
    """A state of the same layout with other values in every leaf, moments included."""
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    values = [rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
    made = jax.tree.unflatten(tree, values)
    made = jax.device_put(made, jax.tree.map(lambda x: x.sharding, state))
    return made.replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def saved(make_experiment, tmp_path_factory):
    """(folder, state) of a checkpoint at step 7, written from 8 devices under FSDP."""
    experiment = make_experiment(CHANGES, fsdp=8)
    folder = str(tmp_path_factory.mktemp("run"))
    state = noise(experiment.abstract_state, 7)
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        assert checkpoints.save(state)
        assert not checkpoints.save(state)  # it is there
    return folder, jax.device_get(state)


@pytest.mark.parametrize(
    "axes", [{}, {"fsdp": 8}, {"tensor": 4, "fsdp": 2}, {"data": 2, "tensor": 2}], ids=str
)
def test_a_checkpoint_is_restored_bitwise_on_any_mesh(make_experiment, saved, axes):
    folder, state = saved
    experiment = make_experiment(CHANGES, **axes)
    with Checkpoints(folder, CheckpointConfig(), read_only=True) as checkpoints:
        restored = checkpoints.restore(experiment.abstract_state)
    assert int(restored.step) == 7
    assert_bitwise(restored, state)
    for leaf, wanted in zip(
        jax.tree.leaves(restored), jax.tree.leaves(experiment.abstract_state), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_parameters_are_restored_alone(make_experiment, saved):
    folder, state = saved
    other = make_experiment({"optimizer.name": "sgd"}, tensor=2)  # its state has another shape
    with Checkpoints(folder, CheckpointConfig(), read_only=True) as checkpoints:
        step, params = checkpoints.restore_params(other.abstract_params)
    assert step == 7
    assert_bitwise(params, state.params)


@pytest.mark.parametrize(
    "changes",
    [{"model.mlp_dim": 48}, {"model.tie_embeddings": False}, {"model.num_layers": 3}],
    ids=str,
)
def test_parameters_of_another_model_are_refused(make_experiment, saved, changes):
    experiment = make_experiment(changes)
    with (
        Checkpoints(saved[0], CheckpointConfig(), read_only=True) as checkpoints,
        pytest.raises(ValueError),
    ):
        checkpoints.restore_params(experiment.abstract_params)


def small(step):
    """A state of a few bytes on one device."""
    values = np.full(4, step, np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(values)}, {"m": jnp.asarray(-values)})


def abstract(state):
    sharding = jax.tree.leaves(state)[0].sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def test_a_missing_step_lists_those_that_exist(tmp_path):
    with Checkpoints(str(tmp_path), CheckpointConfig(keep_last=5)) as checkpoints:
        assert checkpoints.restore(abstract(small(0))) is None
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*; train first"):
            checkpoints.restore_params(abstract(small(0)).params)
        for step in (3, 6):
            checkpoints.save(small(step))
        checkpoints.wait()
        with pytest.raises(FileNotFoundError, match=r"step 5 in .*; there are \[3, 6\]"):
            checkpoints.restore(abstract(small(0)), 5)
        for step in (3, 6):
            restored = checkpoints.restore(abstract(small(0)), step)
            assert_bitwise(restored, small(step))
        assert_bitwise(checkpoints.restore(abstract(small(0))), small(6))  # the newest


@pytest.mark.parametrize(
    "config, kept",
    [
        (CheckpointConfig(keep_last=2), [9, 10]),
        (CheckpointConfig(keep_last=1, keep_every=4), [4, 8, 10]),
        (CheckpointConfig(keep_last=3, keep_every=5), [5, 8, 9, 10]),
    ],
    ids=str,
)
def test_the_last_ones_and_every_nth_are_kept(tmp_path, config, kept):
    with Checkpoints(str(tmp_path), config) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(small(step))
    with Checkpoints(str(tmp_path), config, read_only=True) as checkpoints:
        assert checkpoints.steps() == kept
        for step in kept:
            assert_bitwise(checkpoints.restore(abstract(small(0)), step), small(step))


def test_reading_writes_nothing(tmp_path):
    with Checkpoints(str(tmp_path), CheckpointConfig(keep_last=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(small(step))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with Checkpoints(str(tmp_path), CheckpointConfig(keep_last=1), read_only=True) as checkpoints:
        checkpoints.restore(abstract(small(0)))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_checkpoint_at_step_n_is_the_state_before_batch_n(make_config, devices, tmp_path):
    changes = {"train.num_steps": 4, "checkpoint.every": 2, "checkpoint.keep_last": 9}
    config = make_config(changes)
    assert train(config, str(tmp_path), devices[:1]) == 0
    experiment = Experiment(config, devices[:1])
    with Checkpoints(str(tmp_path), CheckpointConfig(), read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        middle, last = (checkpoints.restore(experiment.abstract_state, step) for step in (2, 4))
    for start, state, wanted in ((0, experiment.init_state(), middle), (2, middle, last)):
        wanted = jax.device_get(wanted)
        assert int(state.step) == start
        for step in (start, start + 1):
            batch = experiment.put(experiment.train_data.batch_at(step))
            state, _ = experiment.train_step(state, batch)  # takes the memory of the old state
        assert_bitwise(state, wanted)


def test_keep_last_must_keep_something(tmp_path):
    with pytest.raises(ValueError, match=r"config.checkpoint.keep_last \(0\) must be at least 1"):
        Checkpoints(str(tmp_path), CheckpointConfig(keep_last=0))
