"""A bad step: nothing of it reaches the parameters, and the verdict about it is right."""

import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoint.manager import Checkpoints
from lm.config import conversion
from lm.exit_codes import Exit, RunError
from lm.layers import base_config
from lm.reliability import data_ledger
from lm.telemetry import metrics
from lm.telemetry.profiler import operations, summarize
from lm.telemetry.progress import Progress
from lm.training import bad_step_report
from lm.training import loop as training
from lm.training import restore as restoring
from lm.training.experiment import Experiment
from lm.training.session import Diverged, ReplicasDisagree

pytestmark = pytest.mark.usefixtures("shared_steps")

STEPS = 12
BAD = 7  # between the checkpoints at 4 and 8
CHANGES = {
    "model.dtype": "bfloat16",
    "data.batch_size": 8,
    "train.num_steps": STEPS,
    "train.log_every": 1,
    "checkpoint.every": 4,
    "guard.self_check": False,  # tests/test_selfcheck.py
    "guard.agreement_every": 2,
}


class Injector(Experiment):
    """An experiment whose batches pass through `spoil(step, batch)`, and whose states, whenever a
    step is done, through `fault(state)`.
    """

    spoil = staticmethod(lambda step, batch: batch)
    fault = staticmethod(lambda state: state)

    def batches(self, start, stop):
        for step, batch in super().batches(start, stop):
            yield step, type(self).spoil(step, batch)

    @functools.cached_property
    def train_step(self):
        compiled = Experiment.train_step.func(self)

        def step(state, batch):
            return compiled(type(self).fault(state), batch)

        step.as_text = compiled.as_text  # a profile asks for it
        return step


@pytest.fixture
def run(make_config, devices, monkeypatch):
    """(folder, changes, fault=, spoil=, **mesh axes) -> the exit code of a run with that fault."""
    monkeypatch.setattr(training, "Experiment", Injector)

    def start(folder, changes=None, *, fault=Injector.fault, spoil=Injector.spoil, **axes):
        monkeypatch.setattr(Injector, "fault", staticmethod(fault))
        monkeypatch.setattr(Injector, "spoil", staticmethod(spoil))
        config = make_config({**CHANGES, **(changes or {})})
        config.mesh.update({"data": 1, **axes})
        size = int(np.prod(list(axes.values()), dtype=int))
        return training.train(config, str(folder), devices[:size])

    return start


def final_bits(folder, make_config, devices, changes=None):
    config = make_config({**CHANGES, **(changes or {})})
    experiment = Experiment(config, devices[:1])
    with Checkpoints(str(folder), experiment.config.checkpoint, read_only=True) as checkpoints:
        state, manifest = checkpoints.restore(experiment.abstract_state)
    assert manifest.step == STEPS
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def evidence(folder):
    return json.loads((folder / "evidence" / f"step-{BAD}.json").read_text())


def spoil_row(value, at=BAD):
    """One row of batch `at` gets a target weight that is no number of a real batch."""

    def spoil(step, batch):
        if step != at:
            return batch
        return batch.replace(weights=batch.weights.at[3, 5].set(value))

    return spoil


@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_policy_stop_ends_before_anything_is_lost(run, tmp_path, value):
    with pytest.raises(Diverged, match=f"step {BAD}: not finite") as error:
        run(tmp_path, spoil=spoil_row(value))
    assert error.value.code == Exit.DIVERGED
    assert "guard.policy=rewind" in str(error.value)
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == 4
    assert metrics.read(str(tmp_path))[-1]["skipped"] == 1


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_policy_skip_goes_on_without_the_step(run, tmp_path, microbatches):
    changes = {"guard.policy": "skip", "train.num_microbatches": microbatches}
    assert run(tmp_path, changes, spoil=spoil_row(np.nan)) == Exit.SUCCESS
    records = {r["step"]: r for r in metrics.read(str(tmp_path)) if r["kind"] == "train"}
    assert records[BAD + 1]["skipped"] == 1 and "skipped" not in records[BAD + 2]
    assert all(np.isfinite(r["loss"]) for step, r in records.items() if step != BAD + 1)
    assert len(data_ledger.read(str(tmp_path))) == STEPS  # what it consumed, it consumed


def test_policy_skip_stops_after_too_many_in_a_row(run, tmp_path):
    def spoil(step, batch):
        return batch.replace(weights=batch.weights * np.nan)

    changes = {"guard.policy": "skip", "guard.max_skips": 3}
    with pytest.raises(Diverged, match=r"(?s)step 3: .*at most 3 in a row"):
        run(tmp_path, changes, spoil=spoil)


def test_a_bad_batch_is_found_to_be_the_data_and_named(run, tmp_path):
    assert run(tmp_path, {"guard.policy": "rewind"}, spoil=spoil_row(np.nan)) == Exit.SUCCESS
    found = evidence(tmp_path)
    assert found["verdict"] == "data" and found["changed_bits"] == []
    assert len(data_ledger.read(str(tmp_path))) == STEPS


def test_rewinding_over_a_bad_batch_ends_as_skipping_it(run, tmp_path, make_config, devices):
    for policy in ("rewind", "skip"):
        run(tmp_path / policy, {"guard.policy": policy}, spoil=spoil_row(np.inf))
    ends = [final_bits(tmp_path / name, make_config, devices) for name in ("rewind", "skip")]
    assert ends[0] == ends[1]


IN_FLOAT32 = {"model.dtype": "float32"}  # where a bad step isn't done again in another type
VALIDATION = {"data.validation": ("synthetic:markov:16:7",), "train.eval_every": 4}


@pytest.mark.slow
def test_a_step_is_done_again_on_eight_devices(run, tmp_path):
    def spoil(step, batch):
        if step != BAD:
            return batch
        weights = np.array(jax.device_get(batch.weights))
        weights[3, 5] = np.nan
        return batch.replace(weights=jax.device_put(weights, batch.weights.sharding))

    changes = {"guard.policy": "rewind"}
    assert run(tmp_path, changes, spoil=spoil, data=2, fsdp=4) == Exit.SUCCESS
    assert evidence(tmp_path)["verdict"] == "data"


@pytest.mark.parametrize("at", [BAD, pytest.param(STEPS - 1, id="the last step")])
@pytest.mark.parametrize("due", ["every", pytest.param("at", marks=pytest.mark.slow)])
def test_what_is_due_at_a_step_that_was_done_again_is_done(run, tmp_path, at, due):
    changes = {**IN_FLOAT32, "guard.policy": "rewind", "checkpoint.keep_last": 9, **VALIDATION}
    if due == "at":
        changes |= {"checkpoint.every": 0, "checkpoint.at": (8,)}
    assert run(tmp_path, changes, spoil=spoil_row(np.nan, at)) == Exit.SUCCESS
    steps = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
    assert steps == ({4, 8, 12} if due == "every" else {8, 12})
    evaluated = [r["step"] for r in metrics.read(str(tmp_path)) if r["kind"] == "eval"]
    assert evaluated == [4, 8, 12]


def test_after_a_fault_of_the_hardware_all_since_the_checkpoint_is_done_again(run, tmp_path):
    """A bit flips at step 9, before the evaluation after step 10, and another one shows at once at
    the last step.
    """
    flips = flip_once(9, "norm.scale", 1, mask=1 << 20), flip_once(STEPS - 1, "norm.scale", 0)
    changes = {**VALIDATION, "guard.policy": "rewind", "train.eval_every": 2}
    flip = run(tmp_path / "flip", changes, fault=lambda state: flips[1](flips[0](state)))
    assert flip == run(tmp_path / "clean", changes) == Exit.SUCCESS
    found = [
        [(r["kind"], r["step"], r["loss"]) for r in metrics.read(str(tmp_path / name))]
        for name in ("flip", "clean")
    ]
    assert found[0] == found[1]


def test_no_old_state_is_in_memory_while_a_step_is_done_again(run, tmp_path, monkeypatch):
    held, real = [], restoring.restore

    def restore(experiment, checkpoints, step=None):
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        restored = real(experiment, checkpoints, step)
        if restored is not None:
            held.append(sum(x.nbytes for x in jax.tree.leaves(restored[0])))
        return restored

    monkeypatch.setattr(restoring, "restore", restore)
    before = sum(x.nbytes for x in jax.live_arrays())  # of other tests
    changes = {**IN_FLOAT32, "guard.policy": "rewind"}
    assert run(tmp_path, changes, spoil=spoil_row(np.nan)) == Exit.SUCCESS
    start, first, size, *_ = held
    assert start - before < 0.1 * size
    assert first - before < 0.5 * size  # batches that are prepared ahead


def test_where_bits_do_not_repeat_no_checkpoint_is_moved_and_no_hardware_blamed(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(bad_step_report, "is_repeatable", lambda experiment: False)
    flip = flip_once(9, "norm.scale", 0)
    changes = {**IN_FLOAT32, "guard.policy": "rewind"}
    assert run(tmp_path / "flip", changes, fault=flip) == Exit.SUCCESS
    [found] = (tmp_path / "flip" / "evidence").iterdir()
    assert json.loads(found.read_text())["verdict"] == "unclear"
    assert run(tmp_path / "data", changes, spoil=spoil_row(np.nan)) == 0
    assert evidence(tmp_path / "data")["verdict"] == "repeats"
    assert not any((tmp_path / name / "bad_checkpoints").exists() for name in ("flip", "data"))


def one_target_everywhere(step, batch):
    """A batch whose gradient is finite and many times as large as usual."""
    return batch.replace(targets=jnp.zeros_like(batch.targets)) if step == BAD else batch


@pytest.mark.parametrize("policy", ["stop", pytest.param("skip", marks=pytest.mark.slow), "rewind"])
def test_a_finite_spike_is_treated_like_a_gradient_that_is_not_finite(run, tmp_path, policy):
    changes = {"guard.policy": policy, "guard.spike_factor": 4.0, "guard.spike_warmup": 3}
    if policy == "stop":
        with pytest.raises(Diverged, match=f"step {BAD}: its gradient is a spike"):
            run(tmp_path, changes, spoil=one_target_everywhere)
        return
    assert run(tmp_path, changes, spoil=one_target_everywhere) == Exit.SUCCESS
    skipped = [r["step"] for r in metrics.read(str(tmp_path)) if "skipped" in r]
    assert skipped == [BAD + 1]
    if policy == "rewind":
        found = evidence(tmp_path)
        assert found["verdict"] == "data"
        assert found["first"]["grad_norm"] > 4 * found["usual_grad_norm"]


def flip_once(at, path, index, mask=1 << 30):
    """A bit of a number of a parameter flips in memory, once, before step `at`: the top one of its
    exponent.
    """
    left = [1]

    def fault(state):
        if int(state.step) != at or not left:
            return state
        left.clear()

        def flip(where, x):
            if jax.tree_util.keystr(where, simple=True, separator=".") != path:
                return x
            bits = np.array(x).view(np.uint32)
            bits.flat[index] ^= mask
            return jax.device_put(bits.view(np.float32), x.sharding)

        return state.replace(params=jax.tree_util.tree_map_with_path(flip, state.params))

    return fault


def test_a_flipped_bit_is_found_to_be_hardware_and_leaves_no_trace(
    run, tmp_path, make_config, devices
):
    flip = flip_once(9, "norm.scale", 0)  # from 1 to inf: bad at once
    assert run(tmp_path / "flip", {"guard.policy": "rewind"}, fault=flip) == Exit.SUCCESS
    assert not (tmp_path / "flip" / "bad_checkpoints").exists()
    assert_no_trace(run, tmp_path, make_config, devices)


@pytest.mark.slow
def test_a_checkpoint_that_held_the_flipped_bit_is_set_aside(run, tmp_path, make_config, devices):
    """The embedding of a token that comes up two steps and one checkpoint later."""
    changes = {
        "model.init_std": 1.0,
        "model.tie_embeddings": False,
        "data.train": ("synthetic:random",),
    }
    experiment = Experiment(make_config({**CHANGES, **changes}), devices[:1])
    seen = [set(experiment.train_data.batch_at(at).inputs.ids.flat) for at in (7, 8, 9)]
    table = np.asarray(experiment.init_state().params["embedding"]["weight"])
    place = min(seen[2] - seen[0] - seen[1]) * table.shape[1]
    huge = np.float32(3.4e38)  # finite, so that no update looks bad, and infinite in bfloat16
    mask = int(table.flat[place].view(np.uint32) ^ huge.view(np.uint32))
    flip = flip_once(7, "embedding.weight", place, mask)
    assert run(tmp_path / "flip", {"guard.policy": "rewind", **changes}, fault=flip) == Exit.SUCCESS
    assert (tmp_path / "flip" / "bad_checkpoints").exists()
    assert_no_trace(run, tmp_path, make_config, devices, changes)


def assert_no_trace(run, tmp_path, make_config, devices, changes=None):
    [found] = (tmp_path / "flip" / "evidence").iterdir()
    assert json.loads(found.read_text())["verdict"] == "hardware"
    assert run(tmp_path / "clean", changes) == Exit.SUCCESS
    ends = [
        final_bits(tmp_path / name, make_config, devices, changes) for name in ("flip", "clean")
    ]
    assert ends[0] == ends[1]
    assert data_ledger.read(str(tmp_path / "flip")) == data_ledger.read(str(tmp_path / "clean"))


@pytest.mark.slow
def test_an_overflow_of_the_compute_dtype_is_found_to_be_numerics(run, tmp_path, monkeypatch):
    # bfloat16 overflows where float32 does; float16, which configs refuse for it, at 65,504
    for module in (conversion, base_config):
        monkeypatch.setattr(module, "check_values", lambda config, path: None)

    def fault(state):
        if int(state.step) != BAD:
            return state
        params = jax.tree.map(lambda x: x, state.params)
        mlp = params["layers"]["mlp"]
        mlp["up"]["weight"] = mlp["up"]["weight"] * 3e4
        return state.replace(params=params)

    changes = {"guard.policy": "rewind", "model.dtype": "float16"}
    assert run(tmp_path, changes, fault=fault) == Exit.SUCCESS
    found = evidence(tmp_path)
    assert found["verdict"] == "numerics"
    assert found["again"]["bad"] and not found["float32"]["bad"]


def one_replica_differs(left):
    """The second of two replicas of one weight differs in its last bit, from step BAD on."""

    def fault(state):
        if int(state.step) != BAD or not left:
            return state
        left.clear()
        scale = state.params["norm"]["scale"]
        shards = [np.array(shard.data) for shard in scale.addressable_shards]
        shards[1].view(np.uint32)[0] ^= 1
        placed = [
            jax.device_put(x, s.device)
            for x, s in zip(shards, scale.addressable_shards, strict=True)
        ]
        wrong = jax.make_array_from_single_device_arrays(scale.shape, scale.sharding, placed)
        params = {**state.params, "norm": {"scale": wrong}}
        return state.replace(params=params)

    return fault


def test_replicas_that_differ_in_one_bit_end_the_run_before_it_saves(run, tmp_path):
    with pytest.raises(ReplicasDisagree, match=r"step 8: .*params\.norm\.scale") as error:
        run(tmp_path, fault=one_replica_differs([1]), data=2)
    assert error.value.code == Exit.CORRUPT
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == 4


def test_replicas_that_always_differ_end_the_run_at_last(run, tmp_path):
    def fault(state):
        return one_replica_differs([1])(state)

    changes = {"guard.policy": "rewind", "guard.max_skips": 2}
    with pytest.raises(ReplicasDisagree, match="3 times since the last checkpoint") as error:
        run(tmp_path, changes, fault=fault, data=2)
    assert error.value.code == Exit.CORRUPT and "max_skips=2" in str(error.value)


@pytest.mark.slow
def test_rewinding_mends_a_replica(run, tmp_path):
    changes = {"guard.policy": "rewind"}
    assert run(tmp_path / "mended", changes, fault=one_replica_differs([1]), data=2) == Exit.SUCCESS
    assert run(tmp_path / "clean", data=2) == Exit.SUCCESS
    for step in (8, 12):
        manifests = [
            json.loads((tmp_path / n / f"checkpoints/{step}/manifest/manifest.json").read_text())
            for n in ("mended", "clean")
        ]
        assert manifests[0]["leaves"] == manifests[1]["leaves"]


def test_more_epochs_than_allowed_are_refused_before_anything_is_compiled(run, tmp_path):
    changes = {"data.train": ("synthetic:markov:16",), "train.max_epochs": 2.0}
    with pytest.raises(RunError, match=r"is 12 steps of 8 rows; .*\(2.0\) .* are 4") as e:
        run(tmp_path, changes)
    assert e.value.code == Exit.OUT_OF_DATA
    assert not tmp_path.joinpath("config.json").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"data.train": ("nowhere/tokens",)},
        {"data.validation": ("nowhere/tokens",)},
        {"init.from_": "nowhere"},
        {"init.branch_from": "nowhere", "init.step": 4},
        {"init.word_vectors": "nowhere.txt"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_path_that_is_not_there_does_not_lock_the_folder(run, tmp_path, wrong):
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run(tmp_path, wrong)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("event", ["a signal", "a rewind"])
def test_a_trace_survives_what_happens_in_its_window(run, tmp_path, monkeypatch, event):
    shown = []
    monkeypatch.setattr(Progress, "note", lambda self, text: shown.append(text))

    def spoil(step, batch):
        if step == BAD and event == "a signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    if event == "a rewind":
        spoil = spoil_row(np.nan)
    changes = {**IN_FLOAT32, "guard.policy": "rewind"}
    changes |= {"log.profile_start": 6, "log.profile_steps": 4}
    code = run(tmp_path, changes, spoil=spoil)
    assert code == (Exit.TERMINATED if event == "a signal" else Exit.SUCCESS)
    traces = list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    for trace in traces:  # of steps that were computed to their end
        assert summarize(operations(trace.read_bytes())).longest
    summaries = [text for text in shown if text.startswith("profile of steps ")]
    assert len(summaries) == len(traces) > 0
    assert all(", idle " in text for text in summaries)


def strict(path):
    """The objects of a file of lines, as a reader takes them that knows JSON alone."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_last_evaluation_that_is_not_finite_ends_with_its_code_and_all_is_saved(run, tmp_path):
    changes = {
        "train.num_steps": 1,
        "optimizer.learning_rate": 2e18,
        "optimizer.schedule.kind": "constant",
        **VALIDATION,
    }
    for _ in range(2):  # the second time it is finished, and no better
        with pytest.raises(Diverged, match=r"last evaluation.*synthetic.*: loss (nan|inf)") as e:
            run(tmp_path, changes)
        assert e.value.code == Exit.DIVERGED
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    last = strict(tmp_path / "metrics.jsonl")[-1]
    assert last["kind"] == "eval" and last["loss"] in ("NaN", "Infinity")
    assert not np.isfinite(metrics.read(str(tmp_path))[-1]["loss"])


def test_an_evaluation_that_a_stop_had_no_time_for_is_made_by_the_next_process(run, tmp_path):
    def spoil(step, batch):
        if step == BAD and not (tmp_path / "checkpoints" / "8").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    assert run(tmp_path, VALIDATION, spoil=spoil) == Exit.TERMINATED
    assert (tmp_path / "checkpoints" / "8").exists()
    assert run(tmp_path, VALIDATION, spoil=spoil) == Exit.SUCCESS
    evaluated = [r["step"] for r in metrics.read(str(tmp_path)) if r["kind"] == "eval"]
    assert evaluated == [4, 8, 12]


def test_a_run_without_checkpoints_says_so_at_its_start(run, tmp_path, capsys):
    changes = {"train.num_steps": 1, "checkpoint.every": 0}
    run(tmp_path / "by time", changes)
    assert "no checkpoint before the end" not in capsys.readouterr().out
    run(tmp_path / "none", {**changes, "checkpoint.every_seconds": 0.0})
    assert "no checkpoint before the end" in capsys.readouterr().out


def test_an_unknown_policy_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"config.guard.policy \('hope'\)"):
        run(tmp_path, {"guard.policy": "hope"})
