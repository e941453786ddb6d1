"""Distillation: its loss, chunks, shards and micro-batches, resuming, and the teacher's checks.

Three steps on other meshes and in micro-batches: bounds are those of tests/test_vae.py, 1e-5 of the
largest entry of each array in float32, and 2 ** -6 of its norm in bfloat16.
"""

import copy
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoint import restore as stored
from lm.compression import distillation
from lm.compression.quantized_weights import WeightFormat, dequantize_params, quantize_params
from lm.config import conversion
from lm.layers.cross_entropy import Predictions
from lm.models import flops
from lm.planning import plan, report
from lm.storage.epaths import StoragePath
from lm.training import loop
from lm.training.evaluation import evaluate
from lm.training.experiment import Experiment
from lm.training.restore import restore_params

TOLERANCE = 1e-5
QUIET = {"guard.self_check": False, "optimizer.schedule.kind": "constant"}
pytestmark = pytest.mark.usefixtures("shared_steps")
WIDE = {"model.embed_dim": 32, "model.mlp_dim": 48, "model.num_layers": 3}


@pytest.fixture(scope="module")
def teacher(make_config, devices, tmp_path_factory):
    """The folder of a short run of a wider model, with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("teacher")
    config = make_config({**QUIET, **WIDE, "train.num_steps": 2, "checkpoint.every": 1})
    loop.train(config, str(folder), devices[:1])
    return folder


@pytest.fixture(scope="module")
def student_config(make_config, teacher):
    """(changes) -> the config of a student."""

    def make(changes=()):
        config = make_config(QUIET)
        objective = conversion.default(objective="lm.compression.distillation").objective
        config.objective = objective
        config.objective.teacher = str(teacher)
        config.update_from_flattened_dict(dict(changes))
        return config

    return make


@pytest.fixture(scope="module")
def student(student_config, devices):
    """(changes, **axes) -> the Experiment of a student."""

    def make(changes=(), **axes):
        config = student_config(changes)
        config.mesh.update({"data": 1, **axes})
        return Experiment(config, devices[: int(np.prod(list(axes.values()), dtype=int))])

    return make


# ---- the loss ----


def by_hand(experiment, params, known, batch, t, alpha):
    """(objective, KL) from whole logits of both models, by NumPy in float64."""

    def log_softmax(model, params, scale):
        hidden = model.apply({"params": params}, batch.inputs).hidden
        logits = np.asarray(model.apply({"params": params}, hidden, method="logits"), np.float64)
        logits = logits / scale
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    p, q = log_softmax(experiment.teacher.model, known, t), log_softmax(experiment.model, params, t)
    hard = -np.take_along_axis(
        log_softmax(experiment.model, params, 1.0), np.asarray(batch.targets)[..., None], -1
    )[..., 0]
    kl, weights = (np.exp(p) * (p - q)).sum(-1), np.asarray(batch.weights, np.float64)
    return ((alpha * t**2 * kl + (1 - alpha) * hard) * weights).sum(), (kl * weights).sum()


@pytest.mark.parametrize("chunk_size", [0, 100])
def test_the_loss_is_that_of_whole_logits_in_any_chunks(student, packed_batch, chunk_size):
    own = {"objective.temperature": 3.0, "objective.alpha": 0.7, "loss.chunk_size": chunk_size}
    experiment = student(own)
    state, batch = experiment.init_state(), packed_batch(4, 32, 264)
    objective, sums = jax.jit(experiment.loss_at(0, state.teacher))(
        state.params, batch, jax.random.key(0)
    )
    wanted, kl = by_hand(experiment, state.params, state.teacher, batch, 3.0, 0.7)
    assert float(objective) == pytest.approx(wanted, rel=1e-5)
    assert float(sums["kl"]) == pytest.approx(kl, rel=1e-5) and kl > 1


def test_gradients_are_those_of_automatic_differentiation(student, packed_batch):
    experiment = student({"objective.hidden_weight": 0.0, "loss.chunk_size": 50})
    state, batch = experiment.init_state(), packed_batch(4, 32, 264)
    t, alpha = 2.0, 0.5

    def whole(params):
        output = experiment.model.apply({"params": params}, batch.inputs)
        hidden = experiment.teacher.model.apply({"params": state.teacher}, batch.inputs).hidden
        logits = experiment.model.apply({"params": params}, output.hidden, method="logits")
        wanted = experiment.teacher.model.apply({"params": state.teacher}, hidden, method="logits")
        x = Predictions(output.hidden, batch.targets, batch.weights)
        return distillation.token_sums(logits, wanted, x, temperature=t, alpha=alpha)["objective"]

    found, _ = jax.jit(experiment.gradients)(state.params, batch, 0, state.teacher)
    assert_close(jax.jit(jax.grad(whole))(state.params), found, 1e-5)


def test_a_student_that_equals_its_teacher_has_no_soft_loss_and_no_hidden_distance(
    student, packed_batch
):
    same = {**WIDE, "objective.hidden_weight": 1.0, "objective.alpha": 1.0}
    experiment = student(same)
    state, batch = experiment.init_state(), packed_batch(2, 32, 264)
    loss = jax.jit(experiment.loss_at(0, state.teacher))
    objective, sums = loss(state.teacher, batch, jax.random.key(0))
    assert abs(float(objective)) < 1e-3 < float(sums["loss"])
    gradient, _ = jax.jit(experiment.gradients)(state.teacher, batch, 0, state.teacher)
    assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradient)) < 1e-3
    _, others = loss(state.params, batch, jax.random.key(0))
    assert others["hidden"] > 0.01 and others["kl"] > 0.01


def test_an_evaluation_reports_the_negative_log_likelihood_alone(student, make_experiment):
    validation = {"data.validation": ("synthetic:markov",)}
    experiment, plain = student(validation), make_experiment({**QUIET, **validation})
    params = experiment.init_state().params
    options = {"params": params, "max_batches": 1}
    assert evaluate(experiment, **options) == evaluate(plain, **options)


# ---- shards, micro-batches, types ----


def assert_close(one, other, tolerance):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=name)


@pytest.fixture(scope="module")
def trained(student):
    """(dtype, num_microbatches, **axes) -> (sums, parameters) after three steps."""

    @functools.cache
    def run(dtype="float32", num_microbatches=1, **axes):
        changes = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.3, "model.dtype": dtype}
        changes |= {"train.num_microbatches": num_microbatches, "objective.alpha": 0.7}
        experiment = student(changes, **axes)
        state, sums = experiment.init_state(), {}
        before = jax.device_get(state.teacher)
        for _, batch in experiment.batches(0, 3):
            state, sums, _ = experiment.train_step(state, batch)
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.teacher))
        return jax.device_get((dict(sums), state.params))

    return run


SPLITS = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"num_microbatches": 4},
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 2, "sequence": 4}, marks=pytest.mark.slow),
    pytest.param({"num_microbatches": 2, "data": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("split", SPLITS)
def test_shards_and_micro_batches_train_as_one(trained, split):
    one, other = trained(), trained(**split)
    assert_close(one, other, TOLERANCE)
    assert one[0]["kl"] > 1


@pytest.mark.parametrize("split", [SPLITS[1], pytest.param(SPLITS[0], marks=pytest.mark.slow)])
def test_in_bfloat16_too(trained, split):
    one, other = (
        ({n: x for n, x in sums.items() if n != "accuracy"}, params)  # a count, of near ties too
        for sums, params in (trained("bfloat16"), trained("bfloat16", **split))
    )
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        off = np.linalg.norm(np.subtract(x, y)) / max(np.linalg.norm(x), 1e-30)
        assert off < 2**-6, (jax.tree_util.keystr(path), off)


def test_the_teacher_computes_in_the_students_type_and_is_sharded_like_it(student):
    experiment = student({"model.dtype": "bfloat16"}, fsdp=4, tensor=2)
    assert experiment.teacher.model.config.dtype == "bfloat16"
    up = experiment.abstract_state.teacher["layers"]["mlp"]["up"]["weight"]
    assert up.shape == (3, 32, 48) and up.sharding.shard_shape(up.shape) == (3, 8, 24)


# ---- resuming ----


def checksums(folder, step):
    manifest = stored.read_manifest(StoragePath(str(folder)) / "checkpoints" / str(step))
    return {name: leaf.checksum for name, leaf in manifest.leaves.items()}


@pytest.fixture(scope="module")
def finished(student_config, devices, tmp_path_factory, teacher):
    """(config, folder) of a student's run of four steps on two devices, saved at 2 and 4."""
    folder = tmp_path_factory.mktemp("student")
    config = student_config({"train.num_steps": 4, "checkpoint.every": 2})
    config.mesh.data, config.mesh.fsdp = 1, 2
    loop.train(config, str(folder), devices[:2])
    return config, folder


def back_at_step_2(folder, to):
    """A copy of the run as it was when killed after its first checkpoint."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / "checkpoints" / "4")
    return to


def test_a_resumed_run_has_the_same_bits(finished, devices, tmp_path):
    config, folder = finished
    again = back_at_step_2(folder, tmp_path / "again")
    loop.train(config, str(again), devices[:2])
    assert checksums(again, 4) == checksums(folder, 4) != checksums(folder, 2)


def test_checkpoints_leave_the_teacher_out_and_record_it(finished, teacher):
    manifest = stored.read_manifest(StoragePath(str(finished[1])) / "checkpoints" / "4")
    assert not [name for name in manifest.leaves if "teacher" in name]
    assert manifest.resolved["teacher"]["step"] == 2
    overview = json.loads((finished[1] / "overview.json").read_text())
    assert 0 < overview["teacher_flops_per_token"] < overview["flops_per_token"]


def test_a_changed_teacher_is_refused_before_anything_is_compiled(
    finished, devices, tmp_path, teacher, monkeypatch
):
    config, folder = finished
    again, other = back_at_step_2(folder, tmp_path / "again"), tmp_path / "other"
    another = conversion.from_json((teacher / "config.json").read_text())
    another.seed = 1
    loop.train(another, str(other), devices[:1])
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    changed = config.copy_and_resolve_references()
    changed.objective.teacher = str(other)
    with pytest.raises(ValueError, match=r"objective\.teacher: .* -> "):
        loop.train(changed, str(again), devices[:2])
    changed.checkpoint.allow_changed = ("objective.teacher",)
    with pytest.raises(ValueError, match="not those that this run has learned from"):
        loop.train(changed, str(again), devices[:2])


@pytest.mark.slow
def test_a_newer_checkpoint_of_the_teacher_replaces_neither_the_one_of_a_run_nor_of_its_fork(
    student_config, devices, tmp_path, teacher
):
    folder, own = tmp_path / "student", tmp_path / "teacher"
    shutil.copytree(teacher, own)
    later = tmp_path / "later"
    (own / "checkpoints" / "2").rename(later)
    config = student_config({"train.num_steps": 2, "checkpoint.every": 1})
    config.objective.teacher = str(own)
    loop.train(config, str(folder), devices[:1])
    wanted = checksums(folder, 2)
    shutil.rmtree(folder / "checkpoints" / "2")
    later.rename(own / "checkpoints" / "2")
    loop.train(config, str(folder), devices[:1])
    assert checksums(folder, 2) == wanted
    config.init.branch_from, config.init.step = str(folder), 1
    loop.train(config, str(tmp_path / "fork"), devices[:1])
    assert checksums(tmp_path / "fork", 2) == wanted


def test_a_student_is_read_without_its_teacher(finished, student_config, devices, tmp_path):
    config = finished[0].copy_and_resolve_references()
    config.objective.teacher = str(tmp_path / "nowhere")
    step, params = restore_params(Experiment(config, devices[:2]), str(finished[1]))
    assert step == 4 and params


# ---- mistakes ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.vocab_size": 272}, r"config.model.vocab_size \(272\) must be that of .* \(264\)"),
        ({"data.length": 64, "model.max_length": 64}, r"length \(64\) must be at most .* \(32\)"),
        ({"objective.teacher_step": 7}, "no checkpoint of step 7"),
        ({"objective.hidden_weight": 1.0}, r"embed_dim \(16\) to be the teacher's \(32\)"),
        ({"loss.z_loss": 1e-4}, "must be 0"),
        ({"objective.teacher": ""}, "objective.teacher must be given"),
        ({"objective.teacher": "/nowhere"}, "/nowhere holds no run"),
        ({"objective.temperature": 0.0}, "temperature"),
    ],
    ids=str,
)
def test_what_cannot_go_together_is_refused_before_anything_is_compiled(
    student_config, devices, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.train(student_config(changes), str(tmp_path / "run"), devices[:1])


def test_a_teacher_of_other_tokens_is_refused(student):
    experiment = student()
    other = copy.copy(experiment.tokenizer)
    other.fingerprint = "0" * 64
    with pytest.raises(ValueError, match=r"\(bytes, 259 tokens, fingerprint 000000000000\) must"):
        experiment.teacher.read(other)


# ---- costs ----


def test_a_plan_counts_the_teacher_beside_the_student(student_config, teacher):
    made = plan.make(student_config({"mesh.data": 1, "mesh.fsdp": 4}), "cpu:4")
    known = json.loads((teacher / "config.json").read_text())["model"]
    model = conversion.resolve(conversion.from_json((teacher / "config.json").read_text())).model
    assert known["embed_dim"] == model.embed_dim == 32
    forward = flops.flops_per_token(model, 32, training=False)
    assert made.teacher_flops == pytest.approx(forward * 16 * 32 / 4)
    student = flops.flops_per_token(conversion.resolve(student_config()).model, 32)
    assert made.model_flops == pytest.approx((forward + student) * 16 * 32 / 4)
    assert made.memory.groups["teacher"] >= 4 * flops.parameters(model).total / 4
    assert "the teacher's forward pass" in report.page(made)
    assert plan.from_json(made.to_json()) == made


# ---- a student of 8 or 4 bits ----


def quantized(experiment, params, name, group=32):
    weights = WeightFormat(name, group)
    return quantize_params(params, experiment.boxed_params, experiment.param_rules, weights)


@pytest.mark.parametrize("weights", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_a_student_of_few_bits_has_the_loss_and_the_gradients_of_its_rounded_matrices(
    student, packed_batch, weights
):
    few, plain = student({"objective.weights": weights}), student()
    state, batch = few.init_state(), packed_batch(4, 32, 264)
    rounded = dequantize_params(quantized(few, state.params, weights))
    found, _ = jax.jit(few.gradients)(state.params, batch, 0, state.teacher)
    wanted, _ = jax.jit(plain.gradients)(rounded, batch, 0, state.teacher)
    assert_close(wanted, found, 1e-6)
    unrounded, _ = jax.jit(plain.gradients)(state.params, batch, 0, state.teacher)
    with pytest.raises(AssertionError):
        assert_close(unrounded, found, 1e-3)


def test_an_evaluation_of_a_student_of_few_bits_rounds_once(student, make_experiment):
    validation = {"data.validation": ("synthetic:markov",)}
    few = student({**validation, "objective.weights": "int4", "objective.group": 64})
    plain = make_experiment({**QUIET, **validation})
    params = few.init_state().params
    small = quantized(few, params, "int4", 64)
    wanted = evaluate(plain, params=small, max_batches=1)
    assert evaluate(few, params=params, max_batches=1) == wanted
    assert evaluate(few, params=small, max_batches=1) == wanted
    assert evaluate(plain, params=params, max_batches=1) != wanted


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_eight_devices_round_a_student_as_one_does(student, dtype):
    changes = {"objective.weights": "int4", "model.dtype": dtype}
    one, eight = student(changes), student(changes, data=2, fsdp=2, tensor=2)
    found = []
    for experiment in (one, eight):
        state = experiment.init_state()
        [(_, batch)] = experiment.batches(0, 1)
        found.append(jax.jit(experiment.gradients)(state.params, batch, 0, state.teacher)[0])
    assert_close(*jax.device_get(found), TOLERANCE if dtype == "float32" else 2**-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("group", 48, r"config\.objective\.group \(48\) must be one of 32, 64, 128"),
        ("weights", "int3", r"config\.objective\.weights .*int3"),
    ],
)
def test_bits_that_are_none_are_refused(student_config, devices, name, value, message):
    with pytest.raises(ValueError, match=message):
        loop.train(student_config({f"objective.{name}": value}), "unused", devices[:1])
