"""Encoder and encoder-decoder in training: on a mesh, after a restart, and in evaluation."""

import functools

import jax
import numpy as np
import pytest

from configs import t5
from lm.checkpoint.manager import Checkpoints
from lm.config import conversion
from lm.planning import mesh_equivalence
from lm.telemetry import metrics
from lm.telemetry.deferred import StepResult
from lm.telemetry.trackers.local import JsonLines
from lm.telemetry.trackers.opening import Trackers
from lm.telemetry.writers import MetricsWriter
from lm.training import train_step
from lm.training.evaluation import evaluate
from lm.training.experiment import Experiment

MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
KINDS = {
    "bert": {
        "model.name": "encoder",
        "objective.name": "mlm",
        "model.positions": "learned",
        "model.norm": "layer",
        "model.norm_placement": "post",
        "model.qkv_bias": True,
        "model.pooler_dim": 16,
    },
    "t5": {
        "model.name": "encoder_decoder",
        "objective.name": "span_corruption",
        "model.positions": "relative",
        "model.num_encoder_layers": 3,
        "model.logit_scale": 0.25,
        "data.encoder_length": 32,
        "data.length": 8,
    },
}
TINY = {
    "model.vocab_size": 264,
    "model.max_length": 32,
    "model.num_layers": 2,
    "model.embed_dim": 16,
    "model.num_heads": 4,
    "model.mlp_dim": 32,
    "model.init_std": 0.2,
    "model.dropout": 0.1,
    "data.train": ("synthetic:markov",),
    "data.validation": ("synthetic:markov",),
    "data.length": 32,
    "data.batch_size": 16,
    "loader.kind": "thread",
    "loss.chunk_size": 128,
    "train.num_steps": 4,
}


def make_config(kind, **changes):
    values = {**TINY, **KINDS[kind], **changes}
    names = {part: values.pop(f"{part}.name") for part in ("model", "objective")}
    config = conversion.default(**names)
    config.update_from_flattened_dict(values)
    return config


@pytest.fixture(scope="module")
def compared(devices):
    """kind -> (the experiment on a mesh, the steps of one device)."""

    @functools.cache
    def make(kind):
        config = make_config(kind)
        return mesh_equivalence.on_mesh(config, MIXED, devices), mesh_equivalence.on_one_device(
            config, devices
        )

    return make


@pytest.mark.parametrize("kind", ["t5", pytest.param("bert", marks=pytest.mark.slow)])
def test_training_on_a_mesh_is_training_on_one_device(kind, compared):
    report = mesh_equivalence.compare(*compared(kind))
    assert report.ok, mesh_equivalence.describe(report)


def test_speed_of_a_masked_run_counts_all_its_tokens_and_not_the_scored_ones(tmp_path, devices):
    experiment = Experiment(make_config("bert"), devices[:1])
    batch = experiment.train_data.batch_at(0)
    info = {"bad": False, "grad_norm": 1.0, **jax.device_get(train_step.fingerprint(batch))}
    sums = {"loss": 1.0, "tokens": float(np.sum(batch.weights != 0))}
    flops = experiment.flops_per_token
    trackers = Trackers([JsonLines(str(tmp_path), 0)])
    options = {"num_steps": 1, "every": 1, "peak_flops": 1e12}
    writer = MetricsWriter(trackers, flops_per_token=flops, **options)
    writer.train(StepResult(0, sums, info, None, 0.5))
    [record] = metrics.read(str(tmp_path))
    filled = np.sum(batch.inputs.segments != 0)
    assert record["tokens"] < 0.3 * filled
    assert record["tokens_per_second"] == pytest.approx(2 * filled)
    assert record["mfu"] == pytest.approx(2 * filled * flops / 1e12)


def test_segments_of_an_encoder_that_are_not_cut_alike_are_found(compared, monkeypatch):
    """Each device gets those of the first rows."""
    put = mesh_equivalence.Experiment.make_global_batch

    def unsharded(self, batch):
        share = self.rules.size("batch")
        segments = np.tile(batch.encoder.segments[: self.batch_size // share], (share, 1))
        return put(self, batch.replace(encoder=batch.encoder.replace(segments=segments)))

    many, steps = compared("t5")
    monkeypatch.setattr(mesh_equivalence.Experiment, "make_global_batch", unsharded)
    report = mesh_equivalence.compare(many, steps)
    assert "gradients" in {d.what for d in report.differences if not d.ok}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "v1.1-small"])
def test_t5_on_a_sharded_length_is_t5_on_one_device(name, devices):
    config = mesh_equivalence.shrink(t5.get_config(name))
    report = mesh_equivalence.verify(config, {"data": 2, "sequence": 2, "tensor": 2}, devices)
    print(mesh_equivalence.describe(report))
    assert report.ok, mesh_equivalence.describe(report)


@pytest.mark.slow  # tests/test_cells.py resumes every objective
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bytes_and_lowers_the_loss(kind, devices, tmp_path):
    """Four steps at once, and two before and two after a checkpoint, with dropout."""
    changes = {"optimizer.learning_rate": 1e-2}
    whole = Experiment(make_config(kind, **changes), devices[:1])
    state, losses, states = whole.init_state(), [], {}
    for step, batch in whole.batches(0, 4):
        state, sums, _ = whole.train_step(state, batch)
        losses.append(float(sums["loss"] / sums["tokens"]))
        states[step + 1] = jax.device_get(state)
        if step + 1 == 2:
            with Checkpoints(str(tmp_path), whole.config.checkpoint) as checkpoints:
                checkpoints.save(state)
    before = evaluate(whole, whole.init_state().params, max_batches=1)
    after = evaluate(whole, state.params, max_batches=1)
    [(old, new)] = [(before[name]["loss"], after[name]["loss"]) for name in before]
    assert new < old and np.isfinite(losses).all()

    resumed = Experiment(make_config(kind, **changes), devices[:1])
    with Checkpoints(str(tmp_path), resumed.config.checkpoint) as checkpoints:
        state, _ = checkpoints.restore(resumed.abstract_state)
    assert int(state.step) == 2
    for _, batch in resumed.batches(2, 4):
        state, _, _ = resumed.train_step(state, batch)
    for a, b in zip(jax.tree.leaves(states[4]), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("t5", {"data.encoder_length": 64}, r"max_length \(32\) .*data.encoder_length \(64\)"),
        ("t5", {"data.encoder_length": None}, r"data.encoder_length \(None\) must be given"),
        ("bert", {"data.encoder_length": 8}, r"data.encoder_length \(8\) must be unset"),
    ],
)
def test_lengths_that_do_not_fit_the_model_are_refused(kind, changes, message, devices):
    with pytest.raises(ValueError, match=message):
        Experiment(make_config(kind, **changes), devices[:1])
