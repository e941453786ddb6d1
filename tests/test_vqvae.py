"""VQ-VAE: convolutions, the codebook's averages and gradients, dead codes, sharding and resuming.

Measured differences of three steps on other meshes and micro-batches, of the largest entry of each
array: below 1.5e-6 in float32; the bound is 5e-6.
"""

import dataclasses
import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from resuming import assert_same_bits

from lm.config import conversion
from lm.data.pipeline import Pipeline, evaluation_batches
from lm.data.rows import Rows
from lm.layers.codebook import Codebook
from lm.layers.convolution2d import Convolution2d, depth_to_space
from lm.models import flops, vqvae
from lm.objectives import vqvae as objective
from lm.optim import optimizer_state
from lm.training.evaluation import evaluate
from lm.training.experiment import Experiment

TOLERANCE = 5e-6
SIZE, ROWS, DECAY = 16, 8, 0.9
TINY = {
    "image_size": SIZE,
    "embed_dim": 16,
    "mlp_dim": 8,
    "num_layers": 1,
    "num_codes": 12,
    "code_dim": 8,
    "codebook_decay": DECAY,
}
SPLITS = {
    "fsdp8": {"fsdp": 8},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "micro_batches": {"num_microbatches": 4},
    "micro_batches_data2": {"num_microbatches": 2, "data": 2},
}


class Pictures:
    """Coloured boxes on noise, with captions of three tokens."""

    bytes_per_token, truncation_summary = None, ""

    def __len__(self):
        return 20

    def read(self, rows):
        images = np.zeros((len(rows), SIZE, SIZE, 3), np.uint8)
        for image, row in zip(images, rows, strict=True):
            rng = np.random.default_rng(int(row))
            y, x = rng.integers(0, SIZE // 2, 2)
            image[:] = rng.integers(0, 40, image.shape)
            image[y : y + 7, x : x + 7] = rng.integers(100, 256, 3)
        ids = np.tile(np.int32([5, 6, 7, 0]), (len(rows), 1))
        segments = (ids > 0).astype(np.int32)
        return Rows(ids, segments, np.arange(4) * segments, np.full_like(ids, -1), images=images)


@pytest.fixture(scope="module")
def make(make_config, devices):
    """(changes, **axes) -> an Experiment on boxes."""

    def one(changes=(), **axes):
        config = make_config({"data.length": 4, "data.batch_size": ROWS})
        config.model = conversion.default(model="vqvae").model
        config.model.update(TINY)
        config.objective = conversion.default(objective="vqvae").objective
        config.optimizer.schedule.kind = "constant"
        config.mesh.update({"data": 1, **axes})
        config.update_from_flattened_dict(dict(changes))
        size = int(np.prod(list(axes.values()), dtype=int))
        experiment = Experiment(config, devices[:size])
        sources = {"boxes": Pictures()}
        experiment.train_data = Pipeline(
            sources, experiment.objective, batch_size=experiment.batch_size, seed=0
        )
        experiment.validation = sources
        return experiment

    return one


@pytest.fixture(scope="module")
def trained(make):
    """(changes, num_microbatches, **axes) -> [(sums, state), ...] of three steps of SGD."""

    @functools.cache
    def run(changes=(), num_microbatches=1, **axes):
        own = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.1, "optimizer.clip_norm": 1.0}
        own |= {"train.num_microbatches": num_microbatches, "model.revive_below": 0.9}
        experiment = make((*own.items(), *changes), **axes)
        state, found = experiment.init_state(), []
        for _, batch in experiment.batches(0, 3):
            state, sums, _ = experiment.train_step(state, batch)
            found.append(jax.device_get((dict(sums), state.params)))
        return found

    return run


def assert_close(one, other, tolerance):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=name)


BRIEF = (("fsdp8", "average"), ("micro_batches", "gradient"))


@pytest.mark.parametrize(
    ("name", "codebook"),
    [
        pytest.param(*case, marks=() if case in BRIEF else pytest.mark.slow)
        for case in itertools.product(SPLITS, ("average", "gradient"))
    ],
)
def test_shards_and_micro_batches_train_as_one(trained, name, codebook):
    changes = (("model.codebook", codebook),)
    one, other = trained(changes), trained(changes, **SPLITS[name])
    assert_close(one, other, TOLERANCE)
    before, after = (np.asarray(x["codebook"]["running_count"]) for _, x in (one[0], one[-1]))
    assert np.abs(after - before).max() > 0.01  # codes were revived and used


@pytest.mark.parametrize("name", [pytest.param("fsdp8", marks=pytest.mark.slow), "micro_batches"])
def test_in_bfloat16_too(trained, name):
    """A latent between two codes may be given to either: a bound for the mean, not for each."""
    changes = (("model.dtype", "bfloat16"),)
    one, other = trained(changes)[0], trained(changes, **SPLITS[name])[0]
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        off = np.linalg.norm(np.subtract(x, y)) / max(np.linalg.norm(x), 1e-30)
        assert off < 2**-8, (jax.tree_util.keystr(path), off)


@pytest.mark.parametrize("codebook", ["average", pytest.param("gradient", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_bits(make, tmp_path, codebook):
    changes = (("model.codebook", codebook),)
    assert_same_bits(lambda: make(changes), tmp_path)


def apply(experiment, params, *arguments, method, **options):
    variables = {"params": params}
    return experiment.model.apply(variables, *arguments, method=method, **options)


def test_a_step_moves_the_averages_to_those_of_the_batch(make):
    """decay * average + (1 - decay) * mean over pictures of each code's share and sum."""
    experiment = make({"model.revive_below": 0.0}.items())
    state = jax.device_get(experiment.init_state())
    batch = experiment.train_data.batch_at(0)
    latents = np.asarray(
        apply(experiment, state.params, batch.images, method=lambda m, x: m._latents(x))
    )
    ids = np.asarray(apply(experiment, state.params, batch.images, method="encode"))
    book = state.params["codebook"]
    codes = book["running_sum"] / book["running_count"][:, None]
    distances = np.square(latents[:, :, None] - codes).sum(-1)
    np.testing.assert_array_equal(ids, distances.argmin(-1))
    counts, sums = np.zeros(12), np.zeros((12, 8))
    np.add.at(counts, ids, 1 / ids.size)
    np.add.at(sums, ids, latents / ids.size)
    state, _, _ = experiment.train_step(
        jax.device_put(state, jax.tree.map(lambda x: x.sharding, experiment.abstract_state)),
        experiment.make_global_batch(batch),
    )
    after = state.params["codebook"]
    for name, mean in (("running_count", counts), ("running_sum", sums)):
        expected = DECAY * book[name] + (1 - DECAY) * mean
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-7)


def test_norms_of_the_gradient_leave_out_running_averages(make):
    """The one that is logged, the one that spikes are judged by, and those of the noise scale."""
    changes = {"train.num_microbatches": 2, "log.noise_scale": True, "model.revive_below": 0.9}
    experiment = make(changes.items())
    state, batch = experiment.init_state(), experiment.train_data.batch_at(0)

    def squared_norms(batch):
        grads, sums = experiment.gradients(state.params, batch, 0)
        grads = jax.tree.map(lambda x: x / sums["tokens"], grads)
        averages = optax.tree.norm(grads.pop("codebook"), squared=True)
        return float(optax.tree.norm(grads, squared=True)), float(averages)

    whole, averages = squared_norms(batch)
    assert averages > 1e-3 * whole  # far beyond the tolerance below
    halves = [
        squared_norms(jax.tree.map(lambda x: np.repeat(x[i::2], 2, axis=0), batch))[0]  # noqa: B023
        for i in range(2)
    ]
    state, _, info = experiment.train_step(state, experiment.make_global_batch(batch))
    assert float(info["grad_norm"]) ** 2 == pytest.approx(whole, rel=1e-5)
    log_mean = optimizer_state.norm_state(state.opt_state).log_mean
    assert np.exp(float(log_mean)) == pytest.approx(float(info["grad_norm"]), rel=1e-5)
    noise = (np.mean(halves) - whole) / (2 / ROWS - 1 / ROWS)
    assert float(info["noise"]) == pytest.approx(noise, rel=1e-3)


def quantized(average, latents, weights, records=None, *, params=None, revive_below=0.5):
    book = Codebook(6, 2, average, DECAY, revive_below)
    method = functools.partial(Codebook.quantize, batch_size=len(latents))
    if params is None:
        shape = jnp.zeros((1, 1, 2))
        params = book.init(jax.random.key(0), shape, method=Codebook.nearest)
        params = nn.meta.unbox(params["params"])

    def loss(params, latents):
        found = book.apply({"params": params}, latents, weights, records, method=method)
        return found.bookkeeping, found

    grads, found = jax.grad(loss, has_aux=True)(params, latents)
    return params, grads, found


@pytest.mark.parametrize("average", [True, False])
def test_dead_codes_become_latents_of_the_batch(average):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(40, 5, 2)).astype(np.float32)
    records = rng.integers(0, 2**32, 40, dtype=np.uint32)
    params, moved = None, 0
    for step in range(12):
        params, grads, _ = quantized(
            average, latents, np.ones(40, np.float32), records + np.uint32(step), params=params
        )
        old = params
        params = jax.tree.map(lambda p, g: p - g / 40, params, grads)
        codes = [codes_of(p, average) for p in (old, params)]
        dead = np.asarray(old["running_count"]) < 0.5 / 6
        jumped = np.abs(codes[1] - codes[0]).max(1) > 1e-6
        if not average:  # only the dead ones move here, exactly to latents if one was offered
            assert not (jumped & ~dead).any()
        for code in codes[1][jumped & dead]:
            nearest = np.abs(latents - code).max(-1).min()
            moved += nearest < (0.3 if average else 1e-5)
    assert (np.asarray(params["running_count"]) > 0.5 / 6).all()
    assert moved >= 4


def codes_of(params, average):
    if average:
        return np.asarray(params["running_sum"] / params["running_count"][:, None])
    return np.asarray(params["weight"] + params["running_shift"])


def test_reviving_depends_on_the_records_of_the_step_alone():
    latents = np.random.default_rng(0).normal(size=(8, 5, 2)).astype(np.float32)
    weights = np.ones(8, np.float32)
    gradients = [
        quantized(True, latents, weights, np.full(8, number, np.uint32))[1]["running_sum"]
        for number in (1, 1, 2)
    ]
    np.testing.assert_array_equal(gradients[0], gradients[1])
    assert np.abs(gradients[0] - gradients[2]).max() > 1e-3
    none = quantized(True, latents, weights, None)[1]["running_sum"]
    assert np.abs(gradients[0] - none).max() > 1e-3


def test_the_encoder_has_the_gradient_of_the_decoder_and_of_commitment(make):
    """Straight through: d loss / d latents is d reconstruction / d codes, plus the commitment."""
    experiment = make()
    params = jax.device_get(experiment.init_state()).params
    batch = experiment.train_data.batch_at(0)
    latents = apply(experiment, params, batch.images, method=lambda m, x: m._latents(x))

    def losses(commitment):
        """d losses / d the bias of the encoder's last projection: the sum over latents."""
        options = {"train": True, "commitment": commitment, "variance": 0.06, "batch_size": ROWS}
        loss = lambda p: apply(experiment, p, batch, method="losses", **options)[0]  # noqa: E731
        return jax.grad(loss)(params)["image_encoder"]["project"]["bias"]

    ids = apply(experiment, params, batch.images, method="encode")
    codes = apply(experiment, params, ids, method=lambda m, i: m.codebook.lookup(i, jnp.float32))

    def reconstruction(codes):
        pixels = apply(experiment, params, codes, method="logits")
        return jnp.sum(jnp.mean(jnp.square(pixels - batch.images / 255.0), (1, 2, 3))) / 0.06

    through = jax.grad(reconstruction)(codes).sum((0, 1))
    np.testing.assert_allclose(losses(0.0), through, rtol=1e-4, atol=1e-5)
    pull = (2 * (latents - codes) / codes[0].size).sum((0, 1))
    np.testing.assert_allclose(losses(0.25), through + 0.25 * pull, rtol=1e-4, atol=1e-5)
    assert np.abs(through).max() > 1e-3 and np.abs(pull).max() > 1e-3


def test_a_trained_codebook_reconstructs_and_uses_its_codes(make):
    experiment = make({"optimizer.learning_rate": 3e-3, "train.num_steps": 60}.items())
    state = experiment.init_state()
    losses = []
    for _, batch in experiment.batches(0, 60):
        state, sums, _ = experiment.train_step(state, batch)
        losses.append(sums["loss"] / ROWS)
    [values] = evaluate(experiment, state.params).values()
    assert values["loss"] < 0.3 * losses[0]
    assert values["codes_used"] >= 10 and values["code_perplexity"] > 4
    assert values["tokens"] == 20  # pictures, in three batches of 8


def test_perplexity_is_that_of_all_codes_of_an_evaluation(make):
    """Not a mean over batches, each of which may use other codes."""
    experiment = make()
    params = experiment.init_state().params
    [values] = evaluate(experiment, params).values()
    images = Pictures().read(np.arange(20)).images
    ids = np.asarray(apply(experiment, params, images, method="encode"))
    share = np.bincount(ids.ravel()) / ids.size
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    assert values["code_perplexity"] == pytest.approx(np.exp(entropy), rel=1e-6)
    assert values["codes_used"] == len(np.unique(ids))
    pixels = apply(
        experiment, params, ids, method=lambda m, i: m.logits(m.codebook.lookup(i, jnp.float32))
    )
    error = np.mean(np.square(pixels - images / 255))
    assert values["psnr"] == pytest.approx(-10 * np.log10(error), rel=1e-5)
    assert values["loss"] == pytest.approx(error / 0.06, rel=1e-5)


def test_padding_of_the_last_batch_counts_for_nothing(make):
    experiment = make()
    *_, last = evaluation_batches(Pictures(), experiment.objective, batch_size=ROWS)
    assert last.weights[:, 0].tolist() == [1] * 4 + [0] * 4
    params = experiment.init_state().params
    sums = experiment.eval_step(params, last)
    assert sums["tokens"] == 4 and np.sum(sums["code_uses"]) == 4 * 16


def test_decoding_of_codes_gives_bytes(make):
    experiment = make()
    params = experiment.init_state().params
    images = Pictures().read(np.arange(3)).images
    ids = apply(experiment, params, images, method="encode")
    assert ids.shape == (3, 16) and ids.dtype == jnp.int32
    decoded = apply(experiment, params, ids, method="decode")
    assert decoded.shape == images.shape and decoded.dtype == jnp.uint8


# ---- convolutions ----


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_a_product_with_each_window(rules_on, stride):
    rng = np.random.default_rng(0)
    size = 4 if stride == 2 else 3
    module = Convolution2d(("embed", 5), ("mlp", 6), size, rules_on(), stride)
    x = rng.normal(size=(2, 8, 8, 5)).astype(np.float32)
    params = {
        "weight": rng.normal(size=(5, size, size, 6)).astype(np.float32),
        "bias": rng.normal(size=6).astype(np.float32),
    }
    y = module.apply({"params": params}, x)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for i, j in np.ndindex(8 // stride, 8 // stride):
        window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
        expected = np.einsum("bhwi,ihwo->bo", window, params["weight"]) + params["bias"]
        np.testing.assert_allclose(y[:, i, j], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_convolution_are_those_that_jax_derives(rules_on, dtype, exact):
    rules = dataclasses.replace(rules_on(), float32_gradients=exact)
    rng = np.random.default_rng(0)
    module = Convolution2d(("embed", 5), ("mlp", 6), 4, rules, 2, jnp.dtype(dtype))
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 5)), dtype)
    weight = rng.normal(size=(5, 4, 4, 6)).astype(np.float32)
    dy = rng.normal(size=(2, 4, 4, 6)).astype(np.float32)

    def own(x, weight):
        params = {"weight": weight, "bias": np.zeros(6, np.float32)}
        return jnp.sum(module.apply({"params": params}, x).astype(jnp.float32) * dy)

    def plain(x, weight):
        numbers = ("NHWC", "IHWO", "NHWC")
        y = jax.lax.conv_general_dilated(x, weight, (2, 2), "SAME", dimension_numbers=numbers)
        return jnp.sum(y * dy)

    low = jnp.asarray(weight, dtype).astype(jnp.float32)
    expected = jax.grad(plain, argnums=(0, 1))(x.astype(jnp.float32), low)
    bound = 1e-5 if dtype == "float32" else 2e-2
    for a, b in zip(jax.grad(own, argnums=(0, 1))(x, weight), expected, strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=0, atol=bound * np.abs(b).max())


def test_depth_becomes_the_pixels_of_a_block():
    x = np.arange(2 * 3 * 3 * 8).reshape(2, 3, 3, 8)
    y = depth_to_space(x, 2)
    assert y.shape == (2, 6, 6, 2)
    np.testing.assert_array_equal(y[1, 3, 4], x[1, 1, 2, 4:6])


# ---- configs ----


def test_flops_count_every_position_of_a_picture():
    config = vqvae.Config(**TINY)
    length, c = 4, 16
    per_place = {
        "encoder": (64 * 3 * 16 * c // 2) + 16 * (c // 2 * 16 * c),
        "first": 16 * 9 * (c * c + 8 * c),
        "blocks": 2 * 16 * (9 * c * 8 + 8 * c),
        "project": 16 * c * 8,
        "decoder": 16 * 9 * c * 4 * (c // 2) + 64 * 9 * (c // 2) * 12,
    }
    found = flops.flops_per_token(config, length, training=False)
    assert found * length == 2 * sum(per_place.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.image_size": 18}, "image_size (18) must be divisible by 2 ** num_halvings (4)"),
        ({"model.codebook": "ema"}, "codebook"),
        ({"objective.name": "causal"}, "causal needs a model"),
    ],
)
def test_bad_values_are_named(make, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _ = make(changes.items()).objective


def test_the_objective_refuses_models_of_text(make_experiment):
    with pytest.raises(ValueError, match="needs a model of pictures"):
        _ = make_experiment({"objective.name": "vqvae"}).objective


def test_figures_of_no_pictures_are_finite():
    sums = {"code_uses": np.zeros(3), "tokens": 0.0, "loss": 0.0, "commitment": 0.0}
    assert all(np.isfinite(x) for x in objective.summarize(sums, 0.06).values())
