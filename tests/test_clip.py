"""The two towers of CLIP and SigLIP: shapes, padding, poolings, sharding, the clipped scale, FLOPs.

Measured differences of embeddings and gradients on other meshes, of the largest entry of each
array: below 5e-6 in float32, the bound.
"""

import dataclasses
import functools
import itertools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config.schema import MeshConfig
from lm.layers.mlp import ACTIVATIONS
from lm.layers.vision import VisionConfig
from lm.models import clip, flops, init_params
from lm.parallel.sharding import make_rules
from lm.types import Tokens

TOLERANCE = 5e-6
LENGTH, ROWS, VOCAB = 8, 8, 64
SIZES = {"num_layers": 2, "embed_dim": 16, "num_heads": 4, "mlp_dim": 24}
CLIP = {"activation": "quick_gelu", "norm_eps": 1e-5}
SIGLIP = {"activation": "gelu_tanh"}
VARIANTS = {
    "clip": {
        "vision": VisionConfig(**SIZES, **CLIP, patch_size=4, patch_bias=False, pre_norm=True),
        "text": clip.TextConfig(**SIZES, **CLIP),
    },
    "siglip": {
        "vision": VisionConfig(**SIZES, **SIGLIP, patch_size=4, pooling="attention"),
        "text": clip.TextConfig(**SIZES, **SIGLIP, is_causal=False),
        "embedding_dim": 16,
        "project_images": False,
        "text_projection_bias": True,
        "has_logit_bias": True,
        "max_logit_scale": None,
    },
    "siglip_filled": {
        "vision": VisionConfig(**SIZES, **SIGLIP, patch_size=4, pooling="attention"),
        "text": clip.TextConfig(**SIZES, **SIGLIP, is_causal=False, pad_id=1),
    },
    "mean": {
        "vision": VisionConfig(**SIZES, patch_size=4, pooling="mean", positions="sinusoidal"),
        "text": clip.TextConfig(**SIZES, positions="sinusoidal"),
    },
}
SHAPE = {"image_size": 12, "vocab_size": VOCAB, "max_length": 10, "embedding_dim": 24}


@functools.cache
def random_params(config):
    """Random numbers, the same for every compute type; scales of norms are near 1."""
    model = clip.build(config, make_rules(MeshConfig(), jax.devices()[:1]))
    boxed = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    rng = np.random.default_rng(0)

    def one(path, x):
        mean = float(jax.tree_util.keystr(path).endswith("['scale']"))
        return np.float32(rng.normal(mean, 0.2, x.shape))

    return jax.tree_util.tree_map_with_path(one, nn.meta.unbox(boxed))


def make(name, rules, **changes):
    """(model, params) of a variant."""
    config = clip.Config(**{**SHAPE, **VARIANTS[name], **changes})
    config.check(LENGTH)
    return clip.build(config, rules), random_params(dataclasses.replace(config, dtype="float32"))


def pairs(lengths=(8, 3, 1, 5, 8, 2, 7, 4)):
    rng = np.random.default_rng(0)
    segments = (np.arange(LENGTH) < np.array(lengths)[:, None]).astype(np.int32)
    ids = rng.integers(2, VOCAB, segments.shape).astype(np.int32) * segments
    images = rng.integers(0, 256, (len(ids), 12, 12, 3), np.uint8)
    return Tokens(ids, segments, np.arange(LENGTH, dtype=np.int32) * segments), images


@functools.cache
def compiled(model):
    return jax.jit(lambda params, x, images: model.apply({"params": params}, x, images=images))


def embed(model, params, inputs, images):
    return np.asarray(compiled(model)(params, inputs, images).hidden)


@pytest.mark.parametrize("name", VARIANTS)
def test_embeddings_of_a_row_are_of_length_one_and_of_its_picture_and_text(rules_on, name):
    model, params = make(name, rules_on())
    inputs, images = pairs()
    hidden = embed(model, params, inputs, images)
    assert hidden.shape == (ROWS, 2, model.config.embedding_dim) and hidden.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(hidden, axis=-1), 1, atol=1e-6)
    other = embed(model, params, inputs, images[::-1])
    np.testing.assert_array_equal(other[:, 1], hidden[:, 1])
    np.testing.assert_allclose(other[:, 0], hidden[::-1, 0], atol=1e-6)
    assert np.abs(hidden[:, None, :] - hidden[None]).max(-1)[~np.eye(ROWS, dtype=bool)].min() > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_of_a_text_changes_nothing(rules_on, name):
    model, params = make(name, rules_on())
    inputs, images = pairs()
    other = dataclasses.replace(inputs, ids=np.where(inputs.segments, inputs.ids, 9))
    before, after = (embed(model, params, x, images) for x in (inputs, other))
    np.testing.assert_array_equal(before, after)
    cut = jax.tree.map(lambda x: x[1:2, :3], inputs)  # a text of three tokens, without padding
    np.testing.assert_allclose(embed(model, params, cut, images[1:2]), before[1:2], atol=2e-6)


def test_the_text_is_pooled_at_its_last_token(rules_on):
    model, params = make("clip", rules_on())
    inputs, images = pairs()
    before = embed(model, params, inputs, images)
    ids = np.array(inputs.ids)
    ids[1, 2] ^= 1
    after = embed(model, params, dataclasses.replace(inputs, ids=ids), images)
    changed = np.abs(after - before).max(-1) > 1e-4
    assert changed[1, 1] and changed.sum() == 1


def test_a_text_filled_up_is_that_with_its_filling_as_tokens(rules_on):
    model, params = make("siglip_filled", rules_on())
    inputs, images = pairs()
    ids = np.pad(np.where(inputs.segments, inputs.ids, 1), ((0, 0), (0, 2)), constant_values=1)
    places = np.broadcast_to(np.arange(10, dtype=np.int32), ids.shape)
    text = dataclasses.replace(model.config.text, pad_id=None)
    plain = clip.build(dataclasses.replace(model.config, text=text), rules_on())
    expected = embed(plain, params, Tokens(ids, np.ones_like(ids), places), images)
    np.testing.assert_allclose(embed(model, params, inputs, images), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "mean"])
def test_patches_have_places(rules_on, name):
    """Two patches that change places change the picture's embedding."""
    model, params = make(name, rules_on())
    inputs, images = pairs()
    swapped = images.copy()
    swapped[:, :4, :4], swapped[:, 4:8, 8:] = images[:, 4:8, 8:], images[:, :4, :4]
    before, after = (embed(model, params, inputs, x)[:, 0] for x in (images, swapped))
    assert np.abs(before - after).max(-1).min() > 1e-3


def test_patches_are_multiplied_row_by_row(rules_on):
    model, params = make("mean", rules_on())
    [_, images] = pairs()
    found = model.apply(
        {"params": params}, images, method=lambda m, x: m.vision.patch(jnp.float32(x))
    )
    weight, bias = (params["vision"]["patch"][n] for n in ("weight", "bias"))
    for i, (y, x) in enumerate(np.ndindex(3, 3)):
        patch = images[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].astype(np.float32)
        expected = np.einsum("byxc,xycd->bd", patch, weight) + bias
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-4, atol=1e-3)


MESHES = {
    "clip": {"data": 2, "fsdp": 2, "tensor": 2},
    "siglip": {"fsdp": 4, "tensor": 2},
    "siglip_filled": {"data": 4, "tensor": 2},
    "mean": {"fsdp": 8},
}
BRIEF = (("clip", "float32"), ("siglip", "bfloat16"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*case, marks=() if case in BRIEF else pytest.mark.slow)
        for case in itertools.product(MESHES, ("float32", "bfloat16"))
    ],
)
def test_eight_devices_give_the_embeddings_and_gradients_of_one(rules_on, name, dtype):
    inputs, images = pairs()
    found = []
    for on in ({}, MESHES[name]):
        rules = rules_on(**on)
        model, params = make(name, rules, dtype=dtype)
        boxed = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
        params = jax.device_put(params, rules.shardings(boxed))
        rows = rules.sharding("batch")

        def loss(params, inputs, images, model=model):
            hidden = model.apply({"params": params}, inputs, images=images, train=True).hidden
            logits = model.apply({"params": params}, hidden, method="logits")
            return -jnp.mean(jnp.diag(jax.nn.log_softmax(logits))), hidden

        inputs_, images_ = jax.device_put((inputs, images), rows)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        found.append(jax.device_get(step(params, inputs_, images_)))
    leaves = jax.tree_util.tree_leaves_with_path(found[0])
    largest = max(np.linalg.norm(x) for _, x in leaves)
    for (path, x), y in zip(leaves, jax.tree.leaves(found[1]), strict=True):
        # the gradient of a key's bias is zero, but for rounding
        off = np.linalg.norm(np.subtract(x, y)) / max(np.linalg.norm(x), 0.05 * largest)
        name = jax.tree_util.keystr(path)
        assert off < (TOLERANCE if dtype == "float32" else 0.02), (name, off)


def test_in_bfloat16_embeddings_are_near_those_in_float32(rules_on):
    inputs, images = pairs()
    for name in ("clip", "siglip"):
        one, other = (
            embed(*make(name, rules_on(), dtype=dtype), inputs, images)
            for dtype in ("float32", "bfloat16")
        )
        assert one.dtype == other.dtype == np.float32
        assert 1e-5 < np.abs(one - other).max() < 0.05


def test_rematerialization_changes_no_gradient(rules_on):
    inputs, images = pairs()

    def grads(remat):
        model, params = make("clip", rules_on(), remat=remat)

        def loss(params):
            hidden = model.apply({"params": params}, inputs, images=images).hidden
            return jnp.sum(hidden[:, 0, :3] * hidden[:, 1, :3])

        return jax.jit(jax.grad(loss))(params)

    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(close, grads("none"), grads("projections"))


def test_logits_are_scaled_cosines_and_the_scale_is_clipped(rules_on):
    model, params = make("siglip", rules_on(), max_logit_scale=20.0)
    hidden = embed(model, params, *pairs())

    def scale(x):
        own = {**params, "logit_scale": x, "logit_bias": jnp.float32(-3)}
        return model.apply({"params": own}, method="scale_and_bias")[0]

    value, gradient = jax.value_and_grad(scale)(jnp.float32(1.5))
    np.testing.assert_allclose([value, gradient], math.exp(1.5), rtol=1e-6)
    value, pull = jax.vjp(scale, jnp.float32(5))
    np.testing.assert_allclose(value, 20, rtol=1e-6)
    raises, lowers = (float(pull(jnp.float32(d))[0]) for d in (-1, 1))
    assert raises == 0 and lowers == pytest.approx(20, rel=1e-6)  # a step is against the gradient
    own = {**params, "logit_scale": jnp.float32(5), "logit_bias": jnp.float32(-3)}
    logits = model.apply({"params": own}, hidden, method="logits")
    np.testing.assert_allclose(logits, 20 * hidden[:, 0] @ hidden[:, 1].T - 3, rtol=1e-5, atol=1e-5)
    assert model.head_params == ("logit_scale", "logit_bias")
    assert make("clip", rules_on())[0].head_params == ("logit_scale",)


def test_quick_gelu_is_x_times_a_sigmoid():
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    act, _ = ACTIVATIONS["quick_gelu"]
    np.testing.assert_allclose(act(jnp.asarray(x)), x / (1 + np.exp(-1.702 * x)), atol=1e-6)


# ---- sizes ----


def test_flops_count_both_towers_at_their_lengths():
    config = clip.Config(**{**SHAPE, **VARIANTS["clip"]})
    d, f, layers, n, t = 16, 24, 2, 10, 8  # 9 patches and a class token; 8 tokens of text
    block = 4 * d * d + 2 * d * f
    pictures = 9 * 48 * d + layers * (n * block + 2 * n * n * d) + d * 24
    texts = layers * (t * block + 2 * t * (t + 1) / 2 * d) + d * 24
    found = flops.flops_per_token(config, t, training=False) * t
    assert found == pytest.approx(2 * (pictures + texts), rel=1e-12)
    assert flops.flops_per_token(config, t) == pytest.approx(3 * found / t, rel=1e-12)


def test_parameters_of_vit_b_32_are_those_of_the_published_checkpoint():
    vision = VisionConfig(**CLIP, patch_size=32, patch_bias=False, pre_norm=True)
    config = clip.Config(vision=vision, text=clip.TextConfig(**CLIP))
    found = flops.parameters(config)
    assert found.total == 151_277_313
    assert set(found.groups) == {
        *("attention", "class_token", "embedding", "head", "image_projection", "mlp", "norm"),
        *("patch", "positions", "text_projection"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 3}, "image_size (3) must be at least vision.patch_size (4)"),
        ({"image_std": (0.5, 0.5)}, "image_std (0.5, 0.5) must be three numbers"),
        ({"image_std": (0.5, 0.5, 0.0)}, "config.model.image_std[2] (0.0) must be above 0"),
        ({"max_length": 7}, "max_length (7) must be at least config.data.length (8)"),
        ({"project_images": False}, "embedding_dim (24) must be vision.embed_dim (16)"),
        (
            {"text": clip.TextConfig(embed_dim=20, num_heads=3)},
            "config.model.text.embed_dim (20) must be divisible by text.num_heads (3)",
        ),
        ({"text": clip.TextConfig(pad_id=64)}, "text.pad_id (64) must be below vocab_size (64)"),
    ],
)
def test_bad_values_are_named(changes, message):
    config = clip.Config(**{**SHAPE, **VARIANTS["clip"], **changes})
    with pytest.raises(ValueError, match=re.escape(message)):
        config.check(LENGTH)


def test_a_mesh_that_shards_the_length_is_refused(rules_on):
    with pytest.raises(ValueError, match=r"config.mesh.sequence \(2\) must be 1 for .*=clip"):
        make("clip", rules_on(sequence=2))


def test_adapters_are_in_both_towers(rules_on):
    config = clip.Config(**{**SHAPE, **VARIANTS["clip"]})
    lora = dataclasses.replace(config.lora, rank=2)
    names = [p.name for p in flops.abstract_parameters(dataclasses.replace(config, lora=lora))]
    owners = {name.split(".")[0] for name in names if name.endswith("lora_a")}
    assert owners == {"vision", "text"}
