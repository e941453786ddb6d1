"""Every file in configs/ and every size in it: that it resolves, counts as published, and runs."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import models
from lm.config.components import component
from lm.config.conversion import resolve
from lm.config.schema import MeshConfig
from lm.models import flops
from lm.optim import chain, param_tree
from lm.parallel.sharding import make_rules
from lm.types import Tokens

CONFIGS = Path(__file__).parents[1] / "configs"

# Parameters of the published checkpoints. gpt2, llama2, llama3, mistral, mixtral, olmoe, qwen3,
# qwen3_moe: the tensors of the Hugging Face files; gemma3: KerasHub's text presets
# (keras_hub/src/models/gemma3/gemma3_presets.py).
PUBLISHED = {
    "gpt2": {
        "124m": 124_439_808,
        "350m": 354_823_168,
        "774m": 774_030_080,
        "1.5b": 1_557_611_200,
    },
    "llama2": {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192},
    "llama3": {
        "8b": 8_030_261_248,
        "70b": 70_553_706_496,
        "405b": 405_853_388_800,
        "3.1-8b": 8_030_261_248,
        "3.1-70b": 70_553_706_496,
        "3.1-405b": 405_853_388_800,
        "3.2-1b": 1_235_814_400,
        "3.2-3b": 3_212_749_824,
    },
    "mistral": {"7b": 7_241_732_096},
    "qwen3": {
        "0.6b": 596_049_920,
        "1.7b": 1_720_574_976,
        "4b": 4_022_468_096,
        "8b": 8_190_735_360,
        "14b": 14_768_307_200,
        "32b": 32_762_123_264,
    },
    "mixtral": {"8x7b": 46_702_792_704, "8x22b": 140_620_634_112},
    "qwen3_moe": {"30b-a3b": 30_532_122_624, "235b-a22b": 235_093_634_560},
    # 61,440 fewer than the checkpoint: norms of queries and keys are one head wide
    "olmoe": {"1b-7b": 6_919_161_856 - 61_440},
    "gemma3": {
        "270m": 268_098_176,
        "1b": 999_885_952,
        "4b": 3_880_099_328,
        "12b": 11_765_788_416,
        "27b": 27_009_002_240,
    },
    # Hugging Face's BertModel with its pooler, and the masked-LM head of ours beside it
    "bert": {"base": 109_482_240 + 622_650, "large": 335_141_888 + 1_082_170},
    "t5": {
        "small": 60_506_624,
        "base": 222_903_552,
        "large": 737_668_096,
        "3b": 2_851_598_336,
        "11b": 11_307_321_344,
        "v1.1-small": 76_961_152,
        "v1.1-base": 247_577_856,
        "v1.1-large": 783_150_080,
        "v1.1-xl": 2_849_757_184,
        "v1.1-xxl": 11_135_332_352,
    },
    # No checkpoints: table 3 of arXiv:1706.03762, in millions.
    "transformer": {"base": 65e6, "big": 213e6},
    # No checkpoints: table D.1 of arXiv:2005.14165, in millions, with the digits that it has.
    "gpt3": {
        "125m": 125e6,
        "350m": 356e6,
        "760m": 760e6,
        "1.3b": 1_320e6,
        "2.7b": 2_650e6,
        "6.7b": 6_660e6,
        "13b": 12_850e6,
        "175b": 174_600e6,
    },
    # The script that the benchmark is compared with prints these.
    "bench": {"small8k": 5_310_720, "gpt2_124m": 123_944_448},
    # Hugging Face's CLIPModel and SiglipModel; of shapes blocks, towers, projections and the scale
    "clip": {
        "shapes": 5 * (4 * 64 * 65 + 2 * 64 * 128 + 128 + 5 * 64)
        + 64 * (48 + 1 + 64 + 2 + 264 + 48 + 2 + 2 * 64)
        + 1,
        "emoji": 5 * (4 * 64 * 65 + 2 * 64 * 128 + 128 + 5 * 64)
        + 64 * (192 + 1 + 16 + 2 + 264 + 64 + 2 + 2 * 64)
        + 1,
        "b32": 151_277_313,
        "l14": 427_616_513,
        "siglip_b16": 203_155_970,
    },
    # timm's vit_base_patch32_224 and so on; s16 without its class token and its table of positions
    "vit": {
        "shapes": 48 * 64 + 64 * (1 + 1 + 65) + 4 * (12 * 64**2 + 13 * 64) + 2 * 64 + 65 * 28,
        "s16": 22_050_664 - (1 + 197) * 384,
        "b32": 88_224_232,
        "b16": 86_567_656,
        "l16": 304_326_632,
        "h14": 632_045_800,
    },
}
# Sizes without a published number of parameters.
OWN = {
    "conv": ("gcnn8", "gcnn14"),
    "dalle": ("shapes", "shapes-mini", "mini", "12b"),
    "lstm": ("small", "medium", "large"),
    "seqgan": ("tiny", "small", "published"),
    "shakespeare": ("student", "distilled"),
    "tasks": (
        "masked",
        "topics",
        "sentiment",
        "translation",
        "summarisation",
        "answering",
        "dialogue",
        "multitask",
    ),
    "vae": ("tatoeba", "ptb", "yahoo"),
    "vqvae": ("shapes", "emoji", "imagenet", "dalle"),
    "wikitext2": ("lstm", "decoder", "conv"),
}
ROUNDED = {"gpt3": 4e-3, "transformer": 3.1e-2}  # how far the papers' totals are off
SIZES = [(name, size) for name, sizes in PUBLISHED.items() for size in sizes]
SIZES_OF = PUBLISHED | OWN
FILES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")
ALL = [(name, size) for name in FILES for size in SIZES_OF.get(name, (None,))]


@functools.cache
def load(name):
    spec = importlib.util.spec_from_file_location(f"configs_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(model):
    rules = make_rules(MeshConfig(), jax.devices()[:1])
    return component("lm.models", type(model).__module__).build(model, rules)


def tokens(rows, length):
    ids = np.zeros((rows, length), np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    return Tokens(ids=ids, segments=ids + 1, positions=places)


def abstract_params(model):
    """Shapes and types of what `init` would make; nothing is allocated."""
    init = functools.partial(models.init_params, model)
    return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))


def forward(model, inputs, encoder=None):
    return model.logits(model(inputs, encoder=encoder).hidden)


@functools.cache
def sizes_of(model_config):
    """Elements of every parameter, by name."""
    params = param_tree.flatten(abstract_params(build(model_config)))
    return {name: leaf.size for name, leaf in params.items()}


def num_parameters(model_config):
    return sum(sizes_of(model_config).values())


@pytest.mark.parametrize("name, size", ALL)
def test_every_config_resolves_and_its_sizes_fit_together(name, size):
    config = resolve(load(name).get_config(size))
    config.model.check(config.data.length)
    chain.check(config.optimizer)
    lengths = (config.train.num_steps, config.train.num_tokens, config.train.num_epochs)
    assert sum(x is not None for x in lengths) == 1
    batches = (config.data.batch_size, config.data.batch_size_per_device)
    assert sum(x is not None for x in batches) == 1
    assert config.data.train and config.data.length <= config.model.max_length


@pytest.mark.parametrize("name, size", [s for s in SIZES if s[0] not in ROUNDED])
def test_parameters_of_the_model_are_those_of_the_published_checkpoint(name, size):
    config = resolve(load(name).get_config(size))
    assert num_parameters(config.model) == PUBLISHED[name][size]
    assert flops.parameters(config.model).total == PUBLISHED[name][size]


@pytest.mark.parametrize("name, size", [s for s in SIZES if s[0] in ROUNDED])
def test_parameters_of_models_without_a_checkpoint_round_to_the_paper(name, size):
    config = resolve(load(name).get_config(size))
    published = PUBLISHED[name][size]
    assert num_parameters(config.model) == pytest.approx(published, rel=ROUNDED[name])


@pytest.mark.parametrize("name, size", ALL)
def test_frozen_models_cost_the_forward_pass_alone(name, size):
    config = resolve(load(name).get_config(size))
    model, lengths = config.model, (config.data.length, config.data.encoder_length)
    names = [p.name for p in flops.abstract_parameters(model)]
    forward = flops.flops_per_token(model, *lengths, training=False)
    assert flops.flops_per_token(model, *lengths, frozen=names) == forward
    assert flops.flops_per_token(model, *lengths) == pytest.approx(3 * forward, rel=1e-12)


def test_every_size_of_every_file_is_in_the_tables_of_this_test():
    for name, known in SIZES_OF.items():
        module = load(name)
        sizes = next(
            getattr(module, n) for n in ("SIZES", "SHAPES", "MODELS", "TASKS") if hasattr(module, n)
        )
        assert set(sizes) == set(known), name


@pytest.mark.parametrize("name", SIZES_OF)
def test_an_unknown_size_is_refused_with_the_list_of_sizes(name):
    with pytest.raises(ValueError) as error:
        load(name).get_config("9000b")
    assert all(size in str(error.value) for size in (f"{name}.py:9000b", *SIZES_OF[name]))


@pytest.mark.parametrize("name", SIZES_OF)
def test_docstring_says_how_to_run_it(name):
    assert "    python scripts/" in load(name).__doc__
    assert f"--config=configs/{name}.py" in load(name).__doc__


def shrink(model):
    """The same architecture with one repetition of its pattern, few and narrow heads."""
    pattern = getattr(model, "layer_pattern", ())
    changes = {"vocab_size": 64, "max_length": 8, "num_layers": max(2, len(pattern))}
    changes |= {"embed_dim": 32, "head_dim": 8, "mlp_dim": 48, "window": 3, "bptt": 4}
    if hasattr(model, "num_heads"):
        heads = 4
        kv_heads = max(1, heads * model.kv_heads // model.num_heads)
        changes |= {"num_heads": heads, "num_kv_heads": kv_heads}
    if hasattr(model, "moe") and model.moe.num_experts:
        small = {"num_experts": 8, "num_experts_per_token": 2, "mlp_dim": 16}
        changes["moe"] = dataclasses.replace(model.moe, **small)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    optional = ("head_dim", "mlp_dim", "window", "bptt")
    kept = {k: v for k, v in changes.items() if k in fields}
    kept = {k: v for k, v in kept.items() if k not in optional or fields[k] is not None}
    return dataclasses.replace(model, **kept)


@pytest.mark.parametrize(
    "name, size",
    [(name, None) for name in FILES]
    + [("llama3", "3.1-8b"), ("llama3", "3.2-1b"), ("qwen3", "8b"), ("gemma3", "27b")],
)
def test_a_shrunk_model_of_the_config_runs_and_is_causal_if_it_says_so(name, size):
    config = resolve(load(name).get_config(size))
    if getattr(config.model, "takes_images", False):
        pytest.skip("a model of pictures, in its own tests")
    small = shrink(config.model)
    small.check(8)
    model = build(small)
    inputs = tokens(2, 8)
    ids = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 9, 8]], np.int32)

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), abstract_params(model)
    )

    @jax.jit
    def logits(params, x):
        encoder = inputs if small.takes_encoder else None
        return model.apply({"params": params}, x, encoder, method=forward)

    y = np.asarray(logits(params, inputs.replace(ids=ids)))
    assert y.shape == (2, 8, 64) and y.dtype == jnp.float32 and np.isfinite(y).all()
    assert np.array_equal(y[0, :6], y[1, :6]) == small.is_causal
    assert np.abs(y[0, 6:] - y[1, 6:]).max() > 1e-4


def test_shapes_of_the_benchmark_are_those_of_the_script_it_is_compared_with():
    config = resolve(load("bench").get_config("small8k"))
    m, o = config.model, config.optimizer
    assert (m.vocab_size, m.num_layers, m.embed_dim, m.num_heads) == (8192, 4, 256, 4)
    assert (config.data.length, config.data.batch_size) == (256, 16)
    assert not (m.norm_bias or m.qkv_bias or m.out_bias or m.mlp_bias) and m.activation == "gelu"
    assert (o.learning_rate, o.b1, o.b2, o.weight_decay, o.clip_norm) == (3e-4, 0.9, 0.95, 0.1, 1.0)


@pytest.mark.parametrize(
    "name, size, billions",
    [
        ("mixtral", "8x7b", 12.9),
        ("mixtral", "8x22b", 39.2),
        ("olmoe", "1b-7b", 1.3),
        ("qwen3_moe", "30b-a3b", 3.3),
        ("qwen3_moe", "235b-a22b", 22.2),
        ("qwen3", "8b", 8.2),  # dense: all of them
    ],
)
def test_active_parameters_are_those_of_the_model_cards(name, size, billions):
    model = resolve(load(name).get_config(size)).model
    # Qwen cuts 3.35 off after the digit
    assert flops.parameters(model).active / 1e9 == pytest.approx(billions, abs=0.06)


def test_the_largest_dalle_has_12_billion_parameters_in_its_layers():
    model = resolve(load("dalle").get_config("12b")).model
    assert flops.parameters(model).non_embedding / 1e9 == pytest.approx(12.1, abs=0.05)


def test_gemma_27b_scales_its_scores_by_the_width_of_an_undivided_head():
    model = resolve(load("gemma3").get_config("27b")).model
    assert model.query_scale == pytest.approx(168**-0.5)
    assert model.layer_kinds[:6] == ("local",) * 5 + ("global",) and len(model.layer_kinds) == 62


def test_qwen_non_embedding_parameters_are_those_of_the_model_cards():
    for size, billions in (("0.6b", 0.44), ("1.7b", 1.4), ("4b", 3.6), ("8b", 6.95), ("14b", 13.2)):
        model = resolve(load("qwen3").get_config(size)).model
        assert flops.parameters(model).non_embedding / 1e9 == pytest.approx(billions, rel=0.012)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_a_kill_loses_ten_minutes_at_most(name):
    assert 0 < load(name).get_config().checkpoint.every_seconds <= 600
