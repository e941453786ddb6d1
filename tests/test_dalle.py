"""DALL-E: rows of captions and codes, losses of halves of the vocabulary, sharding and resuming.

Measured differences of three steps of SGD on other meshes and in micro-batches, of the largest
entry of each array: below 1e-6 in float32; the bound is 5e-6. In bfloat16, by norms: below 2^-8.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resuming import assert_same_bits

from lm.config.conversion import default, resolve, task
from lm.data.rows import Rows
from lm.layers.cross_entropy import lm_loss
from lm.objectives import ModelInterface, dalle, multitask
from lm.planning import mesh_equivalence
from lm.tokenizers.tokenizer import ByteTokenizer
from lm.training.evaluation import evaluate
from lm.training.experiment import Experiment

TOLERANCE = 5e-6
TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
SIZES = (
    "num_layers",
    "embed_dim",
    "num_heads",
    "num_kv_heads",
    "mlp_dim",
    "init_std",
    "max_length",
)
SMALL = {"grid_size": 2, "num_codes": 5}
FIRST = 264 - 5  # of the codes
ROWS = Rows(  # "ab" -> 3 1 4 0, an empty row, "abcd" -> 2 2 2 2
    ids=np.array([[1, 2, EOS, 0, 0, 3, 1, 4, 0], [0] * 9, [1, 2, 3, 4, EOS, 2, 2, 2, 2]], np.int32),
    segments=np.array([[1, 1, 1, 0, 0, 1, 1, 1, 1], [0] * 9, [1] * 9], np.int32),
    positions=np.zeros((3, 9), np.int32),
    previous=np.full((3, 9), -1, np.int32),
    fields=np.zeros((3, 9), np.int32),
)


def objective_of(interface, **config):
    return dalle.build(dalle.Config(**SMALL, **config), TOKENIZER, interface)


def same(number):
    return lambda i: np.random.default_rng([number, i])


# ---- rows ----


def test_a_decoder_by_hand():
    made = objective_of(ModelInterface(9, vocab_size=264))
    batch = made(ROWS, same(0))
    codes = np.array([3, 1, 4, 0]) + FIRST
    targets = [0, 0, 1, 2, EOS, *codes]
    np.testing.assert_array_equal(batch.targets[:2], [targets, [0] * 9])
    np.testing.assert_array_equal(batch.inputs.ids[0], [0, 0, BOS, 1, 2, EOS, *codes[:-1]])
    np.testing.assert_array_equal(batch.inputs.segments[:2], [[0, 0] + [1] * 7, [0] * 9])
    np.testing.assert_array_equal(
        batch.inputs.positions, [[0, 0, 0, 1, 2, 5, 6, 7, 8], [0] * 9, range(9)]
    )
    weights = [0, 0, *[1 / 24] * 3, *[7 / 32] * 4]
    np.testing.assert_allclose(batch.weights, [weights, [0] * 9, [1 / 40] * 5 + [7 / 32] * 4])
    assert made.parts == (("text", (0, 5), (0, FIRST)), ("codes", (5, 9), (FIRST, 264)))
    assert made.layout.lengths == (5, 4) and made.layout.fields == ("text", "codes")


def test_an_encoder_reads_the_caption():
    made = objective_of(ModelInterface(4, encoder_length=5, vocab_size=264))
    batch = made(ROWS, same(0))
    np.testing.assert_array_equal(batch.encoder.ids[0], [1, 2, EOS, 0, 0])
    np.testing.assert_array_equal(batch.encoder.segments[:2], [[1, 1, 1, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch.encoder.positions[0], [0, 1, 2, 0, 0])
    codes = np.array([3, 1, 4, 0]) + FIRST
    np.testing.assert_array_equal(batch.targets[:2], [codes, [0] * 4])
    np.testing.assert_array_equal(batch.inputs.ids[:2], [[BOS, *codes[:-1]], [0] * 4])
    np.testing.assert_array_equal(batch.inputs.positions[0], range(4))
    np.testing.assert_array_equal(batch.weights, [[0.25] * 4, [0] * 4, [0.25] * 4])
    assert made.parts == (("codes", (0, 4), (FIRST, 264)),)


@pytest.mark.parametrize("encoder_length", [None, 5])
def test_captions_are_dropped_in_training_alone_and_by_row(encoder_length):
    interface = ModelInterface(4 if encoder_length else 9, encoder_length, vocab_size=264)
    made = objective_of(interface, caption_dropout=0.5)
    whole = objective_of(interface)(ROWS, same(0))
    jax.tree.map(np.testing.assert_array_equal, made.for_evaluation()(ROWS, same(0)), whole)
    dropped = []
    for number in range(20):
        batch = made(ROWS, same(number))
        jax.tree.map(np.testing.assert_array_equal, batch, made(ROWS, same(number)))
        for row, expected in zip((0, 2), (6 if encoder_length else 7, 9), strict=True):
            of = batch.encoder if encoder_length else batch.inputs
            held = of.ids[row][of.segments[row] != 0]
            if encoder_length:
                is_dropped = held.tolist() == [EOS]
            else:
                is_dropped = held[:2].tolist() == [BOS, EOS]
                # the empty caption is given, not predicted
                assert (batch.weights[row, :5].sum() == 0) == is_dropped
                assert batch.inputs.positions[row, 4] == (0 if is_dropped else len(held) - 5)
                assert len(held) == (5 if is_dropped else expected)
            dropped.append(is_dropped)
            np.testing.assert_array_equal(batch.targets[row, -4:], whole.targets[row, -4:])
        assert not batch.inputs.segments[1].any() and not batch.weights[1].any()
    assert 8 < sum(dropped) < 32


@pytest.mark.parametrize(
    ("interface", "config", "message"),
    [
        (
            ModelInterface(4, vocab_size=264),
            {},
            "config.data.length (4) must be more than config.objective.grid",
        ),
        (
            ModelInterface(9, 5, vocab_size=264),
            {},
            "config.data.length (9) must be config.objective.grid_size (2)",
        ),
        (ModelInterface(9, vocab_size=263), {}, "must be at least the tokenizer's (259) + config"),
        (ModelInterface(9, is_causal=False), {}, "config.objective.name=dalle needs a decoder"),
    ],
)
def test_sizes_that_do_not_fit_are_named(interface, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        objective_of(interface, **config)


def test_codes_of_another_vqvae_are_refused():
    made = objective_of(ModelInterface(9, vocab_size=264))
    with pytest.raises(ValueError, match=re.escape("code 5: config.objective.num_codes (5)")):
        made(dataclasses.replace(ROWS, ids=np.where(ROWS.ids == 4, 5, ROWS.ids)), same(0))
    segments = ROWS.segments.copy()
    segments[0, -1] = 0
    with pytest.raises(ValueError, match=r"has not the 4 codes of config\.objective\.grid"):
        made(dataclasses.replace(ROWS, segments=segments), same(0))


# ---- training ----


@pytest.fixture(scope="module")
def make(make_config, devices):
    """(changes, **axes) -> an Experiment on synthetic codes."""

    def one(changes=(), **axes):
        changes = dict(changes)
        config = make_config({"data.train": ("synthetic:codes:64",), "data.batch_size": 8})
        config.data.validation = ("synthetic:codes:20:1",)
        if changes.pop("encoder", False):
            model = default(model="encoder_decoder").model
            model.update({name: config.model[name] for name in SIZES})
            config.model, config.data.encoder_length = model, 12
        config.objective = default(objective="dalle").objective
        config.objective.update({"grid_size": 4, "num_codes": 4, "caption_dropout": 0.25})
        config.data.length = 16 if config.data.encoder_length else 28
        config.model.vocab_size, config.model.positions = 264, "learned"
        config.optimizer.schedule.kind = "constant"
        config.mesh.update({"data": 1, **axes})
        config.update_from_flattened_dict(changes)
        size = int(np.prod(list(axes.values()), dtype=int))
        return Experiment(config, devices[:size])

    return one


def full_loss(model, params, batch, parts):
    """The sum of nll by log-softmaxes of whole logits in which the other half is minus infinity."""
    output = model.apply({"params": params}, batch.inputs, encoder=batch.encoder)
    logits = model.apply({"params": params}, output.hidden, method="logits")
    total = 0.0
    for _, columns, (first, stop) in parts:
        ids = jnp.arange(logits.shape[-1])
        half = jnp.where((ids >= first) & (ids < stop), logits[:, slice(*columns)], -jnp.inf)
        targets, weights = (x[:, slice(*columns)] for x in (batch.targets, batch.weights))
        targets = jnp.clip(targets, first, stop - 1)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(half), targets[..., None], -1)[..., 0]
        total -= jnp.sum(weights * log_p)
    return total


@pytest.mark.parametrize(
    "changes",
    [{}, {"model.tie_embeddings": False, "model.lora.rank": 2}, {"encoder": True}],
    ids=["tied", "untied_lora", "encoder"],
)
def test_each_half_has_a_softmax_over_its_own_ids(make, changes):
    experiment = make(changes)
    batch = jax.tree.map(jnp.asarray, experiment.train_data.batch_at(0))
    params = experiment.init_state().params
    parts = experiment.objective.parts
    options = {"train": False, "config": experiment.config.loss, "parts": parts}

    def ours(params):
        return lm_loss(experiment.model, params, batch, jax.random.key(0), **options)

    (value, sums), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    other = functools.partial(full_loss, experiment.model, batch=batch, parts=parts)
    expected, reference = jax.jit(jax.value_and_grad(other))(params)
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert_close(reference, gradient, 1e-5)
    names = [part.name for part in parts]
    for kind in ("loss", "tokens"):
        assert sum(float(sums[f"{kind}/{n}"]) for n in names) == pytest.approx(float(sums[kind]))
    # no product has columns of the whole vocabulary
    found = str(jax.make_jaxpr(lambda p: ours(p)[0])(params))
    assert re.search(r"f32\[1,\d+,4\]", found) and not re.search(r"f32\[[\d,]+,264\] = dot", found)


def assert_close(one, other, tolerance):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        name = jax.tree_util.keystr(path)
        scale = max(np.abs(x).max(), 1e-30)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=name)


SPLITS = {
    "fsdp8": {"fsdp": 8},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "micro_batches": {"num_microbatches": 4},
}


@pytest.fixture(scope="module")
def trained(make):
    """(encoder, dtype, num_microbatches, **axes) -> [(sums, params), ...] of three steps of SGD."""

    @functools.cache
    def run(encoder=False, dtype="float32", num_microbatches=1, **axes):
        changes = {
            "encoder": encoder,
            "optimizer.name": "sgd",
            "optimizer.learning_rate": 0.5,
            "optimizer.clip_norm": 1.0,
            "model.dtype": dtype,
            "train.num_microbatches": num_microbatches,
        }
        experiment = make(changes.items(), **axes)
        state, found = experiment.init_state(), []
        for _, batch in experiment.batches(0, 3):
            state, sums, _ = experiment.train_step(state, batch)
            found.append(jax.device_get((dict(sums), state.params)))
        return found

    return run


@pytest.mark.parametrize("encoder", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPLITS)
def test_shards_and_micro_batches_train_as_one(trained, name, encoder):
    one, other = trained(encoder), trained(encoder, **SPLITS[name])
    assert_close(one, other, TOLERANCE)
    assert one[0][0]["loss"] > 1.01 * one[-1][0]["loss"]


@pytest.mark.parametrize("name", [pytest.param("fsdp8", marks=pytest.mark.slow), "micro_batches"])
def test_in_bfloat16_too(trained, name):
    one, other = (trained(dtype="bfloat16", **more)[-1] for more in ({}, SPLITS[name]))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        off = np.linalg.norm(np.subtract(x, y)) / max(np.linalg.norm(x), 1e-30)
        assert off < 2**-8, (jax.tree_util.keystr(path), off)


def test_a_resumed_run_has_the_same_bits(make, tmp_path):
    assert_same_bits(make, tmp_path)


def test_an_evaluation_has_the_loss_of_each_half(make):
    experiment = make({"objective.caption_dropout": 0.9}.items())
    [values] = evaluate(experiment, experiment.init_state().params).values()
    assert values["tokens"] == pytest.approx(20)  # pictures, whose captions are all there
    expected = values["loss/text"] / 8 + values["loss/codes"] * 7 / 8
    assert values["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [False, True])
def test_verify_sharding_covers_the_objective(make, devices, encoder):
    config = make({"encoder": encoder}.items()).config_dict
    config = mesh_equivalence.prepare(config)
    assert resolve(config).objective.num_codes == 4
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh_equivalence.verify(config, mesh, devices).ok


def test_a_task_of_several_cannot_have_halves():
    tree = default(objective="multitask")
    tree.objective.tasks = {"draw": task("dalle", ("data/a",), **SMALL)}
    interface = ModelInterface(9, vocab_size=264)
    with pytest.raises(ValueError, match="brings a loss of its own"):
        multitask.build(resolve(tree).objective, TOKENIZER, interface)
