"""Checkpoints: bitwise, on any mesh, at the step they say; and whatever happens to their files is
found, or harmless.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import faults
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import fake_devices
from etils import epath

from lm.checkpoint import step_files, verification
from lm.checkpoint.arrays import StoredArrays
from lm.checkpoint.manager import Checkpoints, CorruptCheckpoint, SaveFailed
from lm.config.schema import CheckpointConfig
from lm.exit_codes import Exit
from lm.training.experiment import Experiment
from lm.training.loop import train
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
        restored, manifest = checkpoints.restore(experiment.abstract_state)
    assert int(restored.step) == manifest.step == 7
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
    "changes, lines",
    [
        (
            {"model.mlp_dim": 48},
            ["differs: params.layers.mlp.up.weight, float32 [2, 16, 32] in the checkpoint, "
             "float32 [2, 16, 48] in this run"],
        ),
        ({"model.tie_embeddings": False}, ["only in this run: params.head.weight, float32 ["]),
        ({"optimizer.name": "sgd"}, ["only in the checkpoint: opt_state.", "only in this run: "]),
    ],
    ids=str,
)  # fmt: skip
def test_a_state_of_other_leaves_is_refused_by_name_and_not_called_bad(
    make_experiment, saved, tmp_path, changes, lines
):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    experiment = make_experiment({**CHANGES, **changes})
    with (
        pytest.raises(ValueError, match="has other leaves than this run") as caught,
        Checkpoints(str(tmp_path), CheckpointConfig()) as checkpoints,
    ):
        checkpoints.restore(experiment.abstract_state)
    for line in lines:
        assert line in str(caught.value)
    assert not (tmp_path / "bad_checkpoints").exists()


def test_constants_that_an_older_optimizer_kept_are_left_aside(tmp_path):
    """Muon's state had the coefficients of its polynomials, until they were code."""
    state = small(3)
    old = dataclasses.replace(state, opt_state={**state.opt_state, "ns_coeffs": jnp.ones(3)})
    with Checkpoints(str(tmp_path), CheckpointConfig()) as checkpoints:
        checkpoints.save(old)
        found = checkpoints.restore(abstract(state))
    assert found is not None
    assert_bitwise(found[0], state)


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
            assert_bitwise(checkpoints.restore(abstract(small(0)), step)[0], small(step))
        assert_bitwise(checkpoints.restore(abstract(small(0)))[0], small(6))  # the newest


@pytest.mark.parametrize(
    "config, kept",
    [
        (CheckpointConfig(keep_last=2), [9, 10]),
        (CheckpointConfig(keep_last=1, keep_every=4), [4, 8, 10]),
        (CheckpointConfig(keep_last=3, keep_every=5), [5, 8, 9, 10]),
        (CheckpointConfig(keep_last=8), [3, 4, 5, 6, 7, 8, 9, 10]),
        (CheckpointConfig(keep_last=2, verify=False), [9, 10]),
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
            assert_bitwise(checkpoints.restore(abstract(small(0)), step)[0], small(step))


def test_reading_writes_nothing_and_passes_over_what_is_bad(tmp_path, capsys):
    with Checkpoints(str(tmp_path), CheckpointConfig(keep_last=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(small(step))
    (tmp_path / "checkpoints" / "3" / "manifest" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / ("4" + step_files.TEMPORARY)).mkdir()  # of a save under way
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with Checkpoints(str(tmp_path), CheckpointConfig(keep_last=1), read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(small(0)))[1].step == 2
        assert checkpoints.restore_params(abstract(small(0)).params)[0] == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "step 3 is bad and was passed over: no manifest can be read" in capsys.readouterr().out


def test_the_checkpoint_at_step_n_is_the_state_before_batch_n(make_config, devices, tmp_path):
    changes = {"train.num_steps": 4, "checkpoint.every": 2, "checkpoint.keep_last": 9}
    config = make_config(changes)
    assert train(config, str(tmp_path), devices[:1]) == 0
    experiment = Experiment(config, devices[:1])
    with Checkpoints(str(tmp_path), CheckpointConfig(), read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        middle, last = (checkpoints.restore(experiment.abstract_state, step)[0] for step in (2, 4))
    for start, state, wanted in ((0, experiment.init_state(), middle), (2, middle, last)):
        wanted = jax.device_get(wanted)
        assert int(state.step) == start
        for step in (start, start + 1):
            batch = experiment.make_global_batch(experiment.train_data.batch_at(step))
            state = experiment.train_step(state, batch)[0]  # takes the memory of the old state
        assert_bitwise(state, wanted)


# ---- manifests, and what is done with damage ----


def step_folder(workdir, step):
    return pathlib.Path(workdir) / "checkpoints" / str(step)


def damage(workdir, step):
    """Inverts a bit in the largest file of a checkpoint."""
    path = max(faults.files(step_folder(workdir, step)), key=lambda f: f.stat().st_size)
    faults.flip_bit(path, 4 * path.stat().st_size)


def large(step, size=100_000):
    """A state whose values no compression makes small."""
    w, m = np.random.default_rng(step).normal(size=(2, size)).astype(np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(w)}, {"m": jnp.asarray(m)})


@pytest.fixture
def three(tmp_path):
    """A folder with checkpoints of steps 1, 2, 3, of large states."""
    with Checkpoints(str(tmp_path), CheckpointConfig(keep_last=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(large(step))
    return tmp_path


def test_the_manifest_keeps_what_the_run_says(tmp_path):
    extras = {
        "ledger": {"tokens": 2**40},
        "config": {"seed": 3, "a": (1, 2)},
        "parent": {"step": 1},
    }
    with Checkpoints(str(tmp_path), CheckpointConfig()) as checkpoints:
        checkpoints.save(small(5), manifest_extras=extras)
        _, manifest = checkpoints.restore(abstract(small(0)))
    assert manifest.ledger == extras["ledger"] and manifest.parent == extras["parent"]
    assert manifest.config == {"seed": 3, "a": [1, 2]}
    assert manifest.code["jax"] == jax.__version__
    assert abs(manifest.time - time.time()) < 600
    assert set(manifest.leaves) == {"params.w", "opt_state.m"}


def test_a_bad_checkpoint_is_set_aside_and_the_newest_good_one_used(three, capsys):
    damage(three, 3)
    step_folder(three, 2).joinpath("params", "manifest.ocdbt").unlink()
    (three / "bad_checkpoints" / "3").mkdir(parents=True)  # of an earlier time
    with Checkpoints(str(three), CheckpointConfig(keep_last=3)) as checkpoints:
        state, _ = checkpoints.restore(abstract(large(0)))
        assert_bitwise(state, large(1))
        assert checkpoints.steps() == [1]
        checkpoints.save(large(3))  # the step can be saved again
        assert_bitwise(checkpoints.restore(abstract(large(0)))[0], large(3))
    assert sorted(p.name for p in (three / "bad_checkpoints").iterdir()) == ["2", "3", "3-1"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "step 3 is bad and was moved to" in lines[0] and "bad_checkpoints/3-1: " in lines[0]
    assert "checksum" in lines[0] and "the manifest says" in lines[0]
    assert "step 2 is bad" in lines[1] and "params.w: NOT_FOUND" in lines[1]


NAMES = ["my run", "a%20b", "%zz", "a#b", "a?b=c&d", "[x]*", "**", "{0} %s", "运行", "a\nb", "~"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_holds_its_checkpoints(name, tmp_path, capsys):
    (tmp_path / "x").mkdir()  # what the pattern [x]* would find
    workdir = str(tmp_path / name)
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
        checkpoints.save(small(1))
        assert_bitwise(checkpoints.restore(abstract(small(0)))[0], small(1))
        checkpoints.save(small(2))
    with Checkpoints(workdir, CheckpointConfig(), read_only=True) as checkpoints:
        assert_bitwise(checkpoints.restore(abstract(small(0)))[0], small(2))
    assert capsys.readouterr().out == ""  # nothing was passed over
    folder = epath.Path(workdir) / "checkpoints" / "2"
    manifest = step_files.read_manifest(folder)
    verification.verify(folder, manifest)
    w = StoredArrays(folder, manifest.leaves).read("params.w")
    np.testing.assert_array_equal(w, small(2).params["w"])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become a user who may not read")
@pytest.mark.parametrize("file", ["params/manifest.ocdbt", "manifest/manifest.json"])
def test_a_checkpoint_that_may_not_be_read_is_not_called_bad(file, capsys):
    workdir = pathlib.Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are root's alone
    try:
        with Checkpoints(str(workdir), CheckpointConfig(keep_last=2)) as checkpoints:
            checkpoints.save(small(1))
            checkpoints.save(small(2))
        for path in [workdir, *workdir.rglob("*")]:
            path.chmod(0o777 if path.is_dir() else 0o666)
        (step_folder(workdir, 2) / file).chmod(0)
        os.seteuid(65534)
        with Checkpoints(str(workdir), CheckpointConfig()) as checkpoints:
            with pytest.raises(
                PermissionError, match=r"checkpoints/2 cannot be opened: .*as it was"
            ):
                checkpoints.restore(abstract(small(0)))
            assert checkpoints.steps() == [1, 2]
    finally:
        os.seteuid(0)
        shutil.rmtree(workdir)
    assert not capsys.readouterr().out


def test_no_good_checkpoint_ends_the_run_with_its_code(three):
    for step in (1, 2, 3):
        damage(three, step)
    for _ in range(2):  # all are set aside now, and asking again is no way to begin at step 0
        with (
            pytest.raises(CorruptCheckpoint, match=r"no checkpoint in .* is good; move") as caught,
            Checkpoints(str(three), CheckpointConfig()) as checkpoints,
        ):
            checkpoints.restore(abstract(large(0)))
        assert caught.value.code == Exit.CORRUPT == 44
    assert sorted(p.name for p in (three / "bad_checkpoints").iterdir()) == ["1", "2", "3"]


def test_a_bad_checkpoint_that_is_asked_for_is_refused_and_stays(three):
    damage(three, 2)
    with Checkpoints(str(three), CheckpointConfig()) as checkpoints:
        with pytest.raises(CorruptCheckpoint, match="the checkpoint of step 2 is bad: "):
            checkpoints.restore(abstract(large(0)), 2)
        assert checkpoints.steps() == [1, 2, 3]


def test_damage_to_the_optimizer_state_does_not_matter_to_who_reads_parameters(three):
    for path in faults.files(step_folder(three, 3) / "opt_state"):
        path.unlink()
    with Checkpoints(str(three), CheckpointConfig(), read_only=True) as checkpoints:
        step, params = checkpoints.restore_params(abstract(large(0)).params)
    assert step == 3
    assert_bitwise(params, large(3).params)


def test_a_checkpoint_under_another_steps_name_is_bad(three):
    step_folder(three, 3).rename(step_folder(three, 9))
    with Checkpoints(str(three), CheckpointConfig()) as checkpoints:
        assert checkpoints.restore(abstract(large(0)))[1].step == 2


def test_arrays_of_another_checkpoint_are_found(three, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other")
    with Checkpoints(str(other), CheckpointConfig()) as checkpoints:
        checkpoints.save(large(1, 50_000))
    for step, source in ((3, step_folder(other, 1)), (2, step_folder(three, 1))):
        shutil.rmtree(step_folder(three, step) / "params")
        shutil.copytree(source / "params", step_folder(three, step) / "params")
    with Checkpoints(str(three), CheckpointConfig()) as checkpoints:
        assert checkpoints.restore(abstract(large(0)))[1].step == 1
    lines = capsys.readouterr().out.splitlines()
    assert "params.w: stored as float32 [50000], the manifest says float32 [100000]" in lines[0]
    assert "params.w: checksum" in lines[1]


def test_nothing_is_deleted_before_its_successor_reads_back(tmp_path):
    """A save that goes bad on its way to the disk: found before the last good one is deleted."""
    with (
        pytest.raises(SaveFailed, match=r"step 3 doesn't read back: .*checksum") as caught,
        Checkpoints(str(tmp_path), CheckpointConfig(keep_last=1)) as checkpoints,
    ):
        checkpoints.save(large(1))
        checkpoints.wait()
        checkpoints.save(large(2))
        checkpoints.wait()
        go_on = threading.Event()  # until then the one thread that verifies is busy
        checkpoints._worker.submit(go_on.wait)
        checkpoints.save(large(3))
        deadline = time.monotonic() + 30
        while not step_folder(tmp_path, 3).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        checkpoints.poll()
        assert checkpoints.steps() == [2, 3]
        damage(tmp_path, 3)
        go_on.set()
        poll_until_failed(checkpoints)
    assert caught.value.code == Exit.SAVE_FAILED == 43
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert [path.name for path in (tmp_path / "bad_checkpoints").iterdir()] == ["3"]


def test_leftovers_of_killed_processes_are_deleted_at_the_start(three):
    (step_folder(three, 4).with_name("4" + step_files.TEMPORARY) / "params").mkdir(parents=True)
    (step_folder(three, 1) / step_files.DELETING).touch()
    with Checkpoints(str(three), CheckpointConfig()) as checkpoints:
        assert checkpoints.steps() == [2, 3]
    assert sorted(path.name for path in (three / "checkpoints").iterdir()) == ["2", "3"]


@pytest.mark.parametrize("half", [False, True], ids=["whole", "half deleted by older code"])
def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_half_of_it(three, monkeypatch, half):
    """Whatever number of files and folders is gone by then."""
    directory = epath.Path(three / "checkpoints")
    if half:
        (directory / "1" / step_files.DELETING).touch()
        shutil.rmtree(directory / "1" / "opt_state")
    shutil.copytree(directory / "1", three / "copy")
    allowed, done = 0, False
    while not done:
        left = [allowed]

        def kill_later(call, left=left):
            def wrapped(*args, **kwargs):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return call(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for name in ("unlink", "remove", "rmdir"):
                patch.setattr(os, name, kill_later(getattr(os, name)))
            try:
                step_files.delete_leftovers(directory) if half else step_files.delete(
                    directory / "1"
                )
                done = True
            except KeyboardInterrupt:
                allowed += 1
        for step in step_files.steps(directory):
            folder = directory / str(step)
            verification.verify(folder, step_files.read_manifest(folder))
        step_files.delete_leftovers(directory)
        assert set(step_files.steps(directory)) >= {2, 3}
        shutil.rmtree(directory / "1", ignore_errors=True)
        shutil.copytree(three / "copy", directory / "1")
    assert allowed > 10


def test_a_restored_checkpoint_counts_as_verified(three):
    """That of a process killed between its save and the verification."""
    mark = step_folder(three, 3) / "verified-0-of-1"
    mark.unlink()
    assert not step_files.is_verified(epath.Path(mark.parent))
    with Checkpoints(str(three), CheckpointConfig()) as checkpoints:
        checkpoints.restore(abstract(large(0)))
    assert step_files.is_verified(epath.Path(mark.parent))


def test_polling_costs_microseconds(tmp_path):
    with Checkpoints(str(tmp_path), CheckpointConfig()) as checkpoints:
        checkpoints.save(large(1))
        checkpoints.wait()
        start = time.perf_counter()
        for _ in range(1000):
            checkpoints.poll()
        assert time.perf_counter() - start < 0.05  # 50 µs each


# ---- disks ----


def poll_until_failed(checkpoints):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        checkpoints.poll()
        time.sleep(0.01)


def test_a_full_disk_fails_the_save_and_the_last_good_checkpoint_restores(tmp_path):
    with faults.small_disk(tmp_path / "disk", megabytes=2) as disk:
        with (
            pytest.raises(SaveFailed, match=r"step 2 .*No space left.* the last one is of step 1"),
            Checkpoints(str(disk), CheckpointConfig()) as checkpoints,
        ):
            checkpoints.save(large(1, 150_000))
            checkpoints.wait()
            checkpoints.save(large(2, 150_000))
            poll_until_failed(checkpoints)
        with Checkpoints(str(disk), CheckpointConfig()) as checkpoints:
            assert_bitwise(checkpoints.restore(abstract(large(0, 150_000)))[0], large(1, 150_000))
            assert checkpoints.steps() == [1]


def test_a_failed_save_has_the_code_of_what_failed(three):
    def fail(x):
        raise OSError("the link to the chip is down")

    with pytest.raises(jax.errors.JaxRuntimeError) as device:
        jax.block_until_ready(jax.jit(lambda x: jax.pure_callback(fail, x, x))(jnp.ones(4)))
    with Checkpoints(str(three), CheckpointConfig()) as checkpoints:
        failed = checkpoints._failed(4, device.value)
        assert failed.code == Exit.DEVICE_ERROR and "INTERNAL" in str(failed)
        assert checkpoints._failed(4, OSError("no space")).code == Exit.SAVE_FAILED


def test_a_read_only_folder_fails_the_save(three):
    with (
        Checkpoints(str(three), CheckpointConfig()) as checkpoints,
        faults.read_only(three),
        pytest.raises(SaveFailed, match=r"step 4 .*Read-only file system"),
    ):
        checkpoints.save(large(4))
        poll_until_failed(checkpoints)


# ---- damage at random ----


@pytest.fixture(scope="module")
def victim(make_experiment, tmp_path_factory):
    """(folder, abstract state, its bytes): one checkpoint of a tiny model from two devices."""
    experiment = make_experiment(CHANGES, fsdp=2)
    folder = tmp_path_factory.mktemp("victim")
    state = noise(experiment.abstract_state, 7)
    with Checkpoints(str(folder), CheckpointConfig()) as checkpoints:
        checkpoints.save(state)
    return folder, experiment.abstract_state, jax.device_get(state)


def verdict(victim, tmp_path, harm):
    """The report of a restore on a copy of the checkpoint after `harm(folder)`."""
    folder, wanted, state = victim
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    harm(step_folder(tmp_path, 7))
    try:
        with Checkpoints(str(tmp_path), CheckpointConfig(), read_only=True) as checkpoints:
            restored, _ = checkpoints.restore(wanted)
    except CorruptCheckpoint:
        return "found"
    finally:
        shutil.rmtree(tmp_path)
    assert_bitwise(jax.device_get(restored), state)
    return "harmless"


def random_flips(victim, tmp_path, count, seed):
    """The verdicts on single bits: half of them anywhere, half in files drawn alike."""
    paths = [p for p in faults.files(step_folder(victim[0], 7)) if p.stat().st_size]
    sizes = np.array([path.stat().st_size for path in paths])
    rng = np.random.default_rng(seed)
    verdicts = []
    for i in range(count):
        path = paths[rng.choice(len(paths), p=sizes / sizes.sum() if i % 2 else None)]
        bit = int(rng.integers(8 * path.stat().st_size))
        name = path.relative_to(step_folder(victim[0], 7))
        harm = lambda folder, name=name, bit=bit: faults.flip_bit(folder / name, bit)  # noqa: E731
        verdicts.append(verdict(victim, tmp_path / str(i), harm))
    return verdicts


def test_a_flipped_bit_is_found_or_harmless(victim, tmp_path):
    verdicts = random_flips(victim, tmp_path, 20, seed=0)
    assert verdicts.count("found") >= 5


@pytest.mark.slow
def test_two_hundred_flipped_bits_are_found_or_harmless(victim, tmp_path):
    verdicts = random_flips(victim, tmp_path, 200, seed=1)
    print({name: verdicts.count(name) for name in ("found", "harmless")})
    assert verdicts.count("found") >= 50


@pytest.mark.slow
def test_every_file_truncated_or_deleted_is_found_or_harmless(victim, tmp_path):
    verdicts = []
    for path in faults.files(step_folder(victim[0], 7)):
        name, size = path.relative_to(step_folder(victim[0], 7)), path.stat().st_size
        harms = [lambda folder, name=name: (folder / name).unlink()]
        harms += [
            lambda folder, name=name, rest=rest: faults.truncate(folder / name, rest)
            for rest in {0, size // 2, max(size - 1, 0)}
        ]
        for harm in harms:
            verdicts.append(verdict(victim, tmp_path / str(len(verdicts)), harm))
    print({name: verdicts.count(name) for name in ("found", "harmless")})
    assert verdicts.count("found") >= 10


def test_a_missing_shard_is_found(victim, tmp_path):
    def harm(folder):
        data = [p for p in faults.files(folder / "params") if p.parent.name == "d"]
        max(data, key=lambda path: path.stat().st_size).unlink()

    assert verdict(victim, tmp_path / "run", harm) == "found"


# ---- several processes ----

PROCESS = """
import json, pathlib, sys, threading, time
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
port, index, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
from lm.checkpoint.manager import Checkpoints, SaveFailed
from lm.config.schema import CheckpointConfig
from lm.planning import save_cost
from lm.types import TrainState
from jax.experimental import multihost_utils

mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))

def state(step):
    rng = np.random.default_rng(step)
    def put(spec, shape):
        value = rng.normal(size=shape).astype(np.float32)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(shape, sharding, lambda i: value[i])
    params = {"w": put(("fsdp",), (64, 32)), "b": put((), (8,))}
    sharding = NamedSharding(mesh, PartitionSpec())
    count = jax.make_array_from_callback((), sharding, lambda i: np.int32(step))
    return TrainState(count, params, {"m": put((None, "fsdp"), (64, 64))})

abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
)
from lm.checkpoint.arrays import StoredArray
read, read_bytes = StoredArray.read, []
def counted(self, index=None):
    found = read(self, index)
    read_bytes.append(found.nbytes)
    return found
StoredArray.read = counted
with Checkpoints(workdir, CheckpointConfig(keep_last=3)) as checkpoints:
    checkpoints.save(state(1))
    checkpoints.wait()
    share = sum(read_bytes)
    stored = [p for p in pathlib.Path(checkpoints.directory).rglob(f"ocdbt.process_{index}/d/*")]
    written = [save_cost.bytes_by_host(x)[index] for x in jax.tree.leaves(abstract)]
    written = [sum(written), sum(path.stat().st_size for path in stored)]
    for step in (2, 3, 4):
        assert checkpoints.save(state(step))
        assert not checkpoints.save(state(step))
    checkpoints.wait()
multihost_utils.sync_global_devices("damage")
marks = sorted(path.name for path in (checkpoints.directory / "4").iterdir())
if index == 0:
    text = checkpoints.directory / "4" / "manifest" / "manifest.json"
    text.write_text(text.read_text().replace("float32", "float33", 1))
if index == 1:  # what only one of them reads: rows that the other doesn't hold
    here = checkpoints.directory / "3" / "params"
    for path in pathlib.Path(here).glob("ocdbt.process_1/d/*"):
        path.unlink()
multihost_utils.sync_global_devices("damaged")
with Checkpoints(workdir, CheckpointConfig(keep_last=3)) as checkpoints:
    restored, manifest = checkpoints.restore(abstract)
    multihost_utils.sync_global_devices("restored")
    same = jax.tree.map(
        lambda x, y: all(
            np.array_equal(a.data, b.data)
            for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
        ),
        restored, state(2),
    )
    assert checkpoints.steps() == [2], checkpoints.steps()
    step, params = checkpoints.restore_params(abstract.params)

# the lead waits for what the other process has still to verify, and hears of what is bad there
with Checkpoints(workdir + "/slow", CheckpointConfig(keep_last=1)) as checkpoints:
    checkpoints.save(state(1))
    checkpoints.wait()
    found = []
    for step_saved in (2, 3):
        multihost_utils.sync_global_devices(f"save {step_saved}")
        folder, go_on = checkpoints.directory / str(step_saved), threading.Event()
        if index == 1:
            checkpoints._worker.submit(go_on.wait)
        checkpoints.save(state(step_saved))
        while not folder.exists():
            time.sleep(0.01)
        time.sleep(0.5)
        found.append(checkpoints.steps())
        multihost_utils.sync_global_devices(f"seen {step_saved}")
        if index == 1 and step_saved == 3:  # it verifies the last leaf, w
            for path in pathlib.Path(folder / "params").glob("ocdbt.process_1/d/*"):
                path.unlink()
        go_on.set()
        try:
            checkpoints.wait()
        except SaveFailed as error:
            found.append(str(error))
        multihost_utils.sync_global_devices(f"done {step_saved}")
        found.append(checkpoints.steps())

# a listing that a network file system has kept: the lead's counts in both
from lm.checkpoint import step_files
from lm.checkpoint.parent import ParentCheckpoint
if index == 1:
    step_files.steps = lambda directory: []
with Checkpoints(workdir, CheckpointConfig(), read_only=True) as checkpoints:
    parent = ParentCheckpoint(workdir)
    stale = [checkpoints.steps(), checkpoints.restore(abstract)[1].step, parent.step]
same = all(jax.tree.leaves(same))
print("RESULT", json.dumps([manifest.step, step, same, marks, found, stale, share, written]))
"""


def run_processes(code, workdir):
    """The results of two processes with two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **fake_devices(2),
        "PYTHONPATH": str(pathlib.Path(__file__).parent.parent),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(port), str(index), str(workdir)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in outputs]


def test_two_processes_verify_together_and_agree_on_what_is_bad(tmp_path):
    outputs = run_processes(PROCESS, tmp_path)
    results = [json.loads(out.split("RESULT", 1)[1]) for out in outputs]
    assert sum(result[6] for result in results) == 32 + 8192 + 16384
    for result in results:
        assert result[:3] == [2, 2, True]
        assert "verified-0-of-1" in result[3]
        waiting, verified, again, failed, after = result[4]
        assert result[5] == [[2], 2, 2]
        # half of the bytes of b, w and m, and a chunk (of m) at most; both together read all
        assert result[6] <= (32 + 8192 + 16384) / 2 + 4096
        planned, stored = result[7]  # of the step's number, too
        assert 12304 <= planned <= 12304 + 4
        assert 0.85 * planned < stored < 1.25 * planned  # compressed, with an index
        assert (waiting, verified, again, after) == ([1, 2], [2], [2, 3], [2])
        assert "the checkpoint of step 3 doesn't read back" in failed
    assert sorted(p.name for p in (tmp_path / "bad_checkpoints").iterdir()) == ["3", "4"]
    assert "step 4 is bad and was moved to" in outputs[0]
    assert "step 3 is bad and was moved to" in outputs[0]
    # and one process reads what two wrote
    rng = np.random.default_rng(2)
    w, b = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 32), (8,)))
    wanted = abstract(TrainState(jnp.int32(0), {"w": jnp.asarray(w), "b": jnp.asarray(b)}, {}))
    with Checkpoints(str(tmp_path), CheckpointConfig(), read_only=True) as checkpoints:
        step, params = checkpoints.restore_params(wanted.params)
    assert step == 2
    assert_bitwise(params, {"b": b, "w": w})
