"""Classification of pictures by a vision transformer: labels, sharding, micro-batches, resuming.

Measured differences of three steps of SGD on other meshes and micro-batches, of the norm of each
array: below 5e-6 in float32, the bound.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resuming import assert_same_bits

from lm.config import conversion
from lm.data.rows import Rows
from lm.layers.positions import sinusoids
from lm.layers.vision import VisionConfig
from lm.models import clip, flops, init_params, vit
from lm.objectives import ModelInterface, image_classification
from lm.planning.plan import without_data
from lm.tokenizers import tokenizer as tokenizers
from lm.training.evaluation import evaluate
from lm.training.experiment import Experiment

TOLERANCE = 5e-6
SIZES = {"num_layers": 2, "embed_dim": 16, "num_heads": 4, "mlp_dim": 24, "patch_size": 4}
CONFIG = {
    "data.train": ("synthetic:shapes:64:0:seen",),
    "data.validation": ("synthetic:shapes:20:1:held_out",),
    "data.length": 48,
    "data.batch_size": 8,
    "model.image_size": 16,
    "model.num_classes": 8,
    "model.init_std": 0.2,
    "objective.labels": ("a red", "a green", "a blue", "a yellow", "a pink", "a cyan", "a white"),
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.1,
    "optimizer.clip_norm": 1.0,
    "optimizer.schedule.kind": "constant",
    **{f"model.vision.{name}": size for name, size in SIZES.items()},
}
SPLITS = {
    "fsdp4_tensor2": {"fsdp": 4, "tensor": 2},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "micro_batches": {"num_microbatches": 4},
}


@pytest.fixture(scope="module")
def config_of(make_config):
    """(changes) -> the config of a run that names the first object's colour."""

    def one(changes=()):
        config = make_config()
        config.model = conversion.default(model="vit").model
        config.objective = conversion.default(objective="image_classification").objective
        config.update_from_flattened_dict({**CONFIG, **dict(changes)})
        return config

    return one


@pytest.fixture(scope="module")
def make(config_of, devices):
    """(changes, **axes) -> an Experiment."""

    def one(changes=(), **axes):
        config = config_of(changes)
        config.mesh.update({"data": 1, **axes})
        return Experiment(config, devices[: int(np.prod(list(axes.values()), dtype=int))])

    return one


@pytest.fixture(scope="module")
def trained(make):
    """(changes, num_microbatches, **axes) -> (sums of the third step, parameters)."""

    @functools.cache
    def run(changes=(), num_microbatches=1, **axes):
        experiment = make((*changes, ("train.num_microbatches", num_microbatches)), **axes)
        state, sums = experiment.init_state(), {}
        for _, batch in experiment.batches(0, 3):
            state, sums, _ = experiment.train_step(state, batch)
        return jax.device_get((dict(sums), state.params))

    return run


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("data2_fsdp2_tensor2", "float32"),
        pytest.param("micro_batches", "float32", marks=pytest.mark.slow),
        ("micro_batches", "bfloat16"),
        pytest.param("fsdp4_tensor2", "float32", marks=pytest.mark.slow),
        pytest.param("fsdp4_tensor2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_shards_and_micro_batches_train_as_one(trained, name, dtype):
    changes = (("model.dtype", dtype),)
    one, other = trained(changes), trained(changes, **SPLITS[name])
    leaves = jax.tree_util.tree_leaves_with_path(one)
    for (path, x), y in zip(leaves, jax.tree.leaves(other), strict=True):
        off = np.linalg.norm(np.subtract(x, y)) / max(np.linalg.norm(x), 0.05)
        assert off < (TOLERANCE if dtype == "float32" else 0.01), (jax.tree_util.keystr(path), off)


def test_a_resumed_run_has_the_same_bits(make, tmp_path):
    changes = {"objective.flip": True, "objective.crop": 0.5, "model.dropout": 0.1}
    assert_same_bits(lambda: make(changes.items()), tmp_path)


def test_an_evaluation_counts_every_picture_once(make):
    experiment = make()
    state = experiment.init_state()
    [found] = evaluate(experiment, state.params).values()
    assert found["tokens"] == 20 and found["loss"] == pytest.approx(np.log(8), abs=1.5)
    batches = [experiment.train_data.batch_at(step) for step in range(2)]
    assert {b.targets.shape for b in batches} == {(8, 1)}
    assert batches[0].images.shape == (8, 16, 16, 3)


def test_training_changes_pictures_and_evaluation_does_not(make):
    plain, changed = make(), make({"objective.flip": True}.items())
    one, other = (e.train_data.batch_at(0) for e in (plain, changed))
    np.testing.assert_array_equal(one.targets, other.targets)
    is_mirrored = [not np.array_equal(a, b) for a, b in zip(one.images, other.images, strict=True)]
    assert 0 < sum(is_mirrored) < 8
    for mirrored, a, b in zip(is_mirrored, one.images, other.images, strict=True):
        np.testing.assert_array_equal(a[:, ::-1] if mirrored else a, b)
    assert changed.objective.for_evaluation().make is changed.objective.make_evaluation


# ---- labels ----

INTERFACE = ModelInterface(12, is_causal=False, image_size=4, num_classes=4)


def classify(labels, *captions):
    tokenizer = tokenizers.load("bytes")
    config = image_classification.Config(labels=labels)
    objective = image_classification.build(config, tokenizer, INTERFACE)
    ids = np.zeros((len(captions), 12), np.int32)
    segments = np.zeros_like(ids)
    for row, mark, caption in zip(ids, segments, captions, strict=True):
        encoded = [] if caption is None else [*tokenizer.encode(caption), tokenizer.eos_id]
        row[: len(encoded)], mark[: len(encoded)] = encoded, 1
    images = np.zeros((len(captions), 4, 4, 3), np.uint8)
    rows = Rows(ids, segments, segments, segments, images=images)
    return objective(rows, lambda i: np.random.default_rng(i))


def test_the_class_is_the_longest_label_that_a_caption_begins_with():
    batch = classify(("cat", "cat bell", "a"), "cat", "cat bell", "cat belly", "a dog", None)
    assert batch.targets[:, 0].tolist() == [0, 1, 0, 2, 0]
    assert batch.weights[:, 0].tolist() == [1, 1, 1, 1, 0]
    assert batch.inputs.ids.shape == (5, 1)


def test_an_empty_label_is_that_of_all_others():
    batch = classify(("a red", ""), "a red dot", "a blue dot", "")
    assert batch.targets[:, 0].tolist() == [0, 1, 1]


def test_rows_without_data_have_classes(config_of, devices):
    """Those of a plan, a benchmark and `lm verify-sharding`."""
    config = without_data(config_of())
    batch = Experiment(config, devices[:1]).train_data.batch_at(0)
    assert batch.images.shape == (8, 16, 16, 3) and np.all(batch.targets == 0)
    assert np.all(batch.weights == 1)


def test_a_caption_without_a_label_is_named():
    with pytest.raises(ValueError, match="the caption 'catfish' is none of"):
        classify(("cat", "dog"), "cat", "catfish")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((), "labels (0) must name two classes or more"),
        (("a", "a"), "each once"),
        (tuple("abcde"), "at most config.model.num_classes (4)"),
    ],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        classify(labels)


def test_the_objective_refuses_models_without_classes(make_experiment):
    with pytest.raises(ValueError, match="needs a model of pictures and classes"):
        _ = make_experiment({"objective.name": "image_classification"}).objective


# ---- the model ----


def abstract(config, module, rules):
    model = module.build(config, rules)
    init = functools.partial(init_params, model)
    return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))


@pytest.mark.parametrize("pooling", ["class_token", "attention"])
def test_the_tower_has_the_parameters_of_that_of_clip(rules_on, pooling):
    vision = VisionConfig(**SIZES, pooling=pooling)
    one = abstract(vit.Config(image_size=8, vision=vision), vit, rules_on())
    other = abstract(clip.Config(image_size=8, vision=vision), clip, rules_on())
    assert one["vision"] == other["vision"]
    assert set(one) == {"vision", "head"}


def test_without_a_head_there_is_a_pooled_output(rules_on):
    config = vit.Config(image_size=8, vision=VisionConfig(**SIZES), has_head=False, pooler_dim=5)
    config.check(1)
    assert set(abstract(config, vit, rules_on())) == {"vision", "pooler"}
    model = vit.build(config, rules_on())
    with pytest.raises(ValueError, match=r"config.model.has_head is False"):
        jax.eval_shape(
            lambda x: model.apply({"params": {}}, x, method="logits"), np.zeros((2, 1, 16))
        )


def test_the_mean_is_that_of_all_patches_in_any_order(rules_on):
    vision = VisionConfig(**SIZES, pooling="mean")
    config = vit.Config(image_size=8, vision=vision, num_classes=3, init_std=0.2)
    model = vit.build(config, rules_on())
    params = nn.meta.unbox(init_params(model, jax.random.key(0)))
    params["vision"]["position"] = jax.tree.map(jnp.zeros_like, params["vision"]["position"])
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    turned = np.concatenate([image[4:], image[:4]])  # the first patch is the third now
    other = image.copy()
    other[:4, :4] = 0
    images = np.stack([image, turned, other])
    pooled = model.apply({"params": params}, images, method=lambda m, x: m.vision(x))
    np.testing.assert_allclose(pooled[1], pooled[0], atol=1e-5)
    assert np.abs(pooled[2] - pooled[0]).max() > 1e-2


def test_sinusoids_are_of_the_column_then_of_the_row(rules_on):
    vision = VisionConfig(**SIZES, pooling="mean", positions="sinusoidal")
    model = vit.build(vit.Config(image_size=12, vision=vision), rules_on())
    table = model.apply({"params": {}}, method=lambda m: m.vision._sinusoids())
    table = np.asarray(table).reshape(3, 3, 2, 8)  # row, column, which half
    line = np.asarray(sinusoids(jnp.arange(3), 8))
    for place in range(3):
        np.testing.assert_array_equal(table[:, place, 0], np.tile(line[place], (3, 1)))
        np.testing.assert_array_equal(table[place, :, 1], np.tile(line[place], (3, 1)))


def test_flops_count_every_patch_once_and_the_head_for_a_picture():
    config = vit.Config(image_size=16, num_classes=7, vision=VisionConfig(**SIZES))
    d, n = 16, 17
    block = n * (4 * d * d + 2 * d * 24) + 2 * n * n * d
    products = 16 * 48 * d + 2 * block + 7 * d
    assert flops.flops_per_token(config, 48, training=False) * 48 == pytest.approx(2 * products)
