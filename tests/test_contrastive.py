"""The loss over pairs of pictures and texts: equations, equivalences, resuming, rows, evaluation.

Measured differences of three steps on other meshes and micro-batches, of the largest entry of each
array: below 2e-6 in float32; the bound is 5e-6.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resuming import assert_same_bits

from lm.config import conversion
from lm.data.pipeline import Pipeline
from lm.data.rows import Rows
from lm.training import train_step
from lm.training.evaluation import evaluate
from lm.training.experiment import Experiment
from lm.types import CoupledLoss

TOLERANCE = 5e-6
SIZE, LENGTH, ROWS, COUNT = 8, 7, 16, 20
TOWER = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24}
MODEL = {
    "image_size": SIZE,
    "vocab_size": 264,
    "max_length": LENGTH + 1,
    "embedding_dim": 8,
    "init_std": 0.3,
}
KINDS = {
    "softmax": {},
    "sigmoid": {"model.has_logit_bias": True, "model.init_logit_bias": -1.0},
}
SPLITS = {
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "micro_batches": {"num_microbatches": 4},
    "micro_batches_data2": {"num_microbatches": 2, "data": 2},
}


class Pictures:
    """Random pictures with captions of letters; 13 captions and 17 pictures in 20 rows."""

    bytes_per_token, truncation_summary = None, ""

    def __len__(self):
        return COUNT

    def read(self, rows):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (COUNT, SIZE, SIZE, 3), np.uint8)[np.asarray(rows) % 17]
        ids = np.zeros((len(rows), LENGTH), np.int32)
        for row, number in zip(ids, np.asarray(rows) % 13, strict=True):
            text = [*b"abcdefghijklm"[number : number + 1 + number % 4], 258]
            row[: len(text)] = text
        segments = (ids > 0).astype(np.int32)
        return Rows(
            ids, segments, np.arange(LENGTH) * segments, np.full_like(ids, -1), images=images
        )


@pytest.fixture(scope="module")
def make(make_config, devices):
    """(changes, **axes) -> an Experiment on random pictures."""

    def one(changes=(), **axes):
        config = make_config({"data.length": LENGTH + 1, "data.batch_size": ROWS})
        config.model = conversion.default(model="clip").model
        config.model.update(MODEL)
        config.model.vision.update({**TOWER, "patch_size": 4})
        config.model.text.update(TOWER)
        config.objective = conversion.default(objective="contrastive").objective
        config.optimizer.schedule.kind = "constant"
        config.mesh.update({"data": 1, **axes})
        config.update_from_flattened_dict(dict(changes))
        size = int(np.prod(list(axes.values()), dtype=int))
        experiment = Experiment(config, devices[:size])
        sources = {"pictures": Pictures()}
        experiment.train_data = Pipeline(
            sources, experiment.objective, batch_size=experiment.batch_size, seed=0
        )
        experiment.validation = sources
        return experiment

    return one


def of_kind(kind, changes=()):
    return (("objective.loss", kind), *KINDS[kind].items(), *changes)


@pytest.fixture(scope="module")
def trained(make):
    """(changes, num_microbatches, **axes) -> [(sums, parameters), ...] of three steps of SGD."""

    @functools.cache
    def run(changes, num_microbatches=1, **axes):
        own = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.1, "optimizer.clip_norm": 1.0}
        own |= {"train.num_microbatches": num_microbatches}
        experiment = make((*own.items(), *changes), **axes)
        state, found, rng = experiment.init_state(), [], np.random.default_rng(0)
        far = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
        state = dataclasses.replace(state, params=jax.tree.map(far, state.params))
        for _, batch in experiment.batches(0, 3):
            state, sums, _ = experiment.train_step(state, batch)
            found.append(jax.device_get((dict(sums), state.params)))
        return found

    return run


def assert_close(one, other):
    """A bias of keys has no gradient but rounding, of the size of the query's."""
    leaves = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(one)}
    for (name, x), y in zip(leaves.items(), jax.tree.leaves(other), strict=True):
        like = leaves[name.replace("['key']['bias']", "['query']['bias']")]
        scale = max(np.abs(x).max(), np.abs(like).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE * scale, err_msg=name)


BRIEF = (("data2_fsdp2_tensor2", "softmax"), ("micro_batches_data2", "sigmoid"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(*case, marks=() if case in BRIEF else pytest.mark.slow)
        for case in itertools.product(SPLITS, KINDS)
    ],
)
def test_shards_and_micro_batches_train_as_one(trained, name, kind):
    one, other = trained(of_kind(kind)), trained(of_kind(kind), **SPLITS[name])
    assert_close(one, other)
    before, after = one[0][1], one[-1][1]
    moved = jax.tree.map(lambda x, y: np.any(x != y), before, after)
    assert np.mean(jax.tree.leaves(moved)) > 0.9


@pytest.mark.parametrize(
    ("name", "kind"),
    [("micro_batches", "softmax"), pytest.param("fsdp8", "sigmoid", marks=pytest.mark.slow)],
)
def test_in_bfloat16_too(trained, name, kind):
    changes = of_kind(kind, (("model.dtype", "bfloat16"),))
    one, other = trained(changes)[0], trained(changes, **SPLITS[name])[0]
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        off = np.linalg.norm(np.subtract(x, y)) / max(np.linalg.norm(x), 1e-30)
        assert off < 2**-8, (jax.tree_util.keystr(path), off)


def test_micro_batches_have_the_gradient_of_their_joint_loss_with_dropout(make):
    """The second pass over a micro-batch drops what the first one has dropped."""
    experiment = make(of_kind("softmax", (("model.dropout", 0.3),)))
    params, loss_fn = experiment.init_state().params, experiment.loss_at(0)
    assert isinstance(loss_fn, CoupledLoss)
    batch, rng, k = (
        experiment.make_global_batch(experiment.train_data.batch_at(0)),
        jax.random.key(3),
        4,
    )

    def joint(params):
        parts = [
            loss_fn.embed(
                params, jax.tree.map(lambda x, i=i: x[i::k], batch), jax.random.fold_in(rng, i)
            )
            for i in range(k)
        ]
        return loss_fn.loss(params, jnp.stack(parts, 1).reshape(ROWS, 2, -1), batch)

    expected, sums = jax.jit(jax.grad(joint, has_aux=True))(params)
    cached = jax.jit(lambda p: train_step.gradients(loss_fn, p, batch, rng, k))
    found, cached_sums = cached(params)
    for name, x in sums.items():
        np.testing.assert_allclose(cached_sums[name], x, rtol=1e-5, err_msg=name)
    assert_close(expected, found)
    plain, _ = jax.jit(jax.grad(loss_fn, has_aux=True))(params, batch, rng)
    off = [np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (plain, found)), strict=True)]
    assert max(off) > 1e-2  # other keys are another loss


def test_a_resumed_run_has_the_same_bits(make, tmp_path):
    changes = of_kind("sigmoid", (("train.num_microbatches", 2), ("model.dropout", 0.1)))
    assert_same_bits(lambda: make(changes), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_papers_without_pairs_that_share_a_caption_or_a_picture(make, kind):
    experiment = make(of_kind(kind))
    params = experiment.init_state().params
    rows = np.array(
        [0, 13, 17, 1, 2, 14, 3, 4]
    )  # 0 and 13, 1 and 14 share captions, 0 and 17 a picture
    batch = experiment.objective(Pictures().read(rows), None)
    weights = np.float32([1, 1, 1, 1, 1, 1, 1, 0])[:, None]
    batch = dataclasses.replace(batch, weights=weights)
    total, sums = experiment.loss_at(0)(params, batch, jax.random.key(0))
    hidden = experiment.model.apply({"params": params}, batch.inputs, images=batch.images).hidden
    hidden = np.asarray(hidden, np.float64)
    [scale, bias] = map(float, experiment.model.apply({"params": params}, method="scale_and_bias"))
    logits = scale * hidden[:, 0] @ hidden[:, 1].T + bias
    expected, correct, n = 0.0, 0, 7
    for i in range(n):
        same = [rows[i] % 13 == rows[j] % 13 or rows[i] % 17 == rows[j] % 17 for j in range(n)]
        rivals = [j for j in range(n) if j == i or not same[j]]
        correct += max(rivals, key=lambda j: logits[i, j]) == i
        if kind == "softmax":
            for values in (logits[i, rivals], logits[rivals, i]):
                expected += (np.log(np.exp(values).sum()) - logits[i, i]) / 2
        else:
            for j in range(n):
                expected += np.log1p(np.exp(-logits[i, j] if same[j] else logits[i, j]))
    assert total == pytest.approx(expected, rel=1e-5) == sums["loss"]
    assert (sums["tokens"], sums["accuracy"]) == (n, correct)
    assert sums["scale"] == pytest.approx(n * scale)


def test_no_device_holds_the_whole_matrix_of_pairs(make):
    """[B, B] is sharded over rows and `tensor`, gradients included."""
    changes = of_kind("softmax", (("data.batch_size", 80),))
    compiled = make(changes, data=2, fsdp=2, tensor=2).train_step.as_text()
    shapes = {tuple(map(int, s)) for s in re.findall(r"(?:f32|pred)\[(\d+),(\d+)\]", compiled)}
    assert (20, 40) in shapes
    assert not shapes & {(80, 80), (20, 80), (80, 40), (40, 80), (80, 20)}


def test_evaluation_does_not_depend_on_batches_or_the_mesh(make):
    prompts = (("objective.classes", ("a", "bc")), ("objective.templates", ("{}", "{}d")))
    results = {}
    for name, changes, axes in (
        ("one", (), {}),
        ("small", (("data.batch_size", 8),), {"data": 2, "tensor": 2}),
    ):
        experiment = make((*prompts, *changes), **axes)
        [results[name]] = evaluate(experiment, experiment.init_state().params).values()
    one, small = results["one"], results["small"]
    assert one.pop("loss") > small.pop("loss")  # within batches: fewer negatives
    del one["accuracy"], small["accuracy"]
    assert one == pytest.approx(small, rel=1e-5)
    assert one["tokens"] == COUNT and one["zero_shot_pictures"] == 4
    assert one.keys() == {
        *("tokens", "scale", "zero_shot_pictures", "zero_shot_accuracy"),
        *(
            f"{a}_to_{b}_recall_{k}"
            for k in (1, 5, 10)
            for a, b in (("picture", "text"), ("text", "picture"))
        ),
    }


# ---- rows ----


def test_a_row_has_its_hashes_its_class_and_its_weight(make):
    classes = ("a", "fgh")
    experiment = make((("objective.classes", classes), ("objective.templates", ("{}", "{}i"))))
    rows = Pictures().read(np.arange(COUNT))
    batch = experiment.objective(rows, None)
    caption, picture = (batch.targets[:, i : i + 2].tolist() for i in (0, 2))
    for i, j in itertools.combinations(range(COUNT), 2):
        assert (caption[i] == caption[j]) == (i % 13 == j % 13)
        assert (picture[i] == picture[j]) == (i % 17 == j % 17)
    # 0: a; 5: fg; 6: ghi; 7: hijk
    texts = [bytes(x[x > 0][:-1].astype(np.uint8)).decode() for x in rows.ids]
    numbers = {"a": 0, "ai": 0, "fgh": 1, "fghi": 1}
    assert batch.targets[:, 4].tolist() == [numbers.get(text, -1) for text in texts]
    assert batch.inputs.ids[3].tolist() == [257, *rows.ids[3]]
    assert (batch.weights == 1).all()
    empty = dataclasses.replace(rows, **{n: 0 * getattr(rows, n) for n in ("ids", "segments")})
    batch = experiment.objective(empty, None)
    assert (batch.weights == 0).all() and (batch.inputs.segments == 0).all()
    assert (batch.inputs.ids == 0).all()


def test_pictures_are_augmented_in_training_alone_and_keep_their_hash(make):
    experiment = make((("objective.flip", True), ("objective.crop", 0.5)))
    rows, objective = Pictures().read(np.arange(COUNT)), experiment.objective
    generators = lambda seed: lambda i: np.random.default_rng([seed, i])  # noqa: E731
    plain, one, other = (
        f(rows, generators(seed))
        for f, seed in ((objective.for_evaluation(), 0), (objective, 0), (objective, 1))
    )
    assert (plain.images == rows.images).all()
    assert (one.images != plain.images).any((1, 2, 3)).mean() > 0.9
    assert (one.images != other.images).any((1, 2, 3)).mean() > 0.9
    np.testing.assert_array_equal(one.targets, plain.targets)
    again = objective(rows, generators(0))
    np.testing.assert_array_equal(one.images, again.images)


def test_training_batches_of_a_config_are_augmented(make):
    changes = {
        "data.train": ("synthetic:shapes:64",),
        "data.validation": ("synthetic:shapes:64",),
        "data.length": 48,
        "model.max_length": 48,
        "model.image_size": 16,
        "objective.crop": 0.5,
    }
    experiment = make(changes.items())
    for name in ("train_data", "validation"):
        del vars(experiment)[name]
    train = experiment.train_data.batch_at(0)
    [source] = experiment.train_data.sources.values()
    stored = source.read(experiment.train_data.sampler.locate(np.arange(ROWS)).row)
    assert (train.images != stored.images).any((1, 2, 3)).mean() > 0.9
    plain = experiment.objective.for_evaluation()(stored, None)
    np.testing.assert_array_equal(train.targets, plain.targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log.noise_scale": True, "train.num_microbatches": 2}, "config.log.noise_scale compares"),
        ({"objective.loss": "sigmoid"}, "config.model.has_logit_bias (False) must be True"),
        ({"model.has_logit_bias": True}, "config.model.has_logit_bias (True) must be False"),
        ({"objective.loss": "hinge"}, "must be one of softmax, sigmoid"),
        ({"objective.templates": ("a photo",)}, "'a photo' has no {}"),
        ({"objective.classes": ("a",), "objective.templates": ()}, "templates is empty"),
        ({"objective.classes": ("abcdefg",)}, "'abcdefg' has 7 tokens"),
        ({"objective.classes": ("a", "a")}, "'a' and 'a' share the text 'a'"),
    ],
)
def test_bad_values_are_named(make, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _ = make(changes.items()).loss_at(0)


@pytest.mark.parametrize("model", ["decoder", "vqvae"])
def test_other_models_are_refused(make_config, devices, model):
    config = make_config({"data.train": ("synthetic:shapes",)})
    config.model = conversion.default(model=model).model
    config.objective = conversion.default(objective="contrastive").objective
    with pytest.raises(ValueError, match=r"config\.model\.name=clip"):
        _ = Experiment(config, devices[:1]).loss_at(0)
