import dataclasses
import functools
import math
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.extend
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config.components import COMPONENTS, component
from lm.config.schema import MeshConfig
from lm.layers.attention_scores import mean_keys
from lm.layers.lora import LoraConfig
from lm.layers.moe.moe import MoeConfig
from lm.models import decoder, flops
from lm.optim import param_tree
from lm.parallel.sharding import make_rules
from lm.types import Tokens

ROOT = Path(__file__).parent.parent
BASE = decoder.Config(
    vocab_size=96,
    max_length=16,
    num_layers=3,
    embed_dim=32,
    num_heads=4,
    init_std=0.2,
)
VARIANTS = {
    "plain": {},
    "biases": {
        "norm": "layer",
        "norm_bias": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "positions": "learned",
    },
    "gated biases": {"activation": "swiglu", "mlp_dim": 40, "mlp_bias": True},
    "grouped": {"num_kv_heads": 2, "head_dim": 6, "qk_norm": True},
    "untied": {"tie_embeddings": False},
    "post": {"norm_placement": "post"},
    "both": {"norm_placement": "both"},
    "parallel": {"parallel_block": True},
    "parallel, both": {"parallel_block": True, "norm_placement": "both"},
    "parallel, post": {"parallel_block": True, "norm_placement": "post"},
    "relative": {"positions": "relative"},
    "windows": {"layer_pattern": ("local", "global"), "window": 5},
    "adapters": {"lora": LoraConfig(rank=4, targets=("query", "out", "up", "down"))},
    "adapted head": {"tie_embeddings": False, "lora": LoraConfig(rank=4, targets=("head",))},
    # with as many places as assignments, the products are those of the formula
    "experts": {
        "activation": "swiglu",
        "moe": MoeConfig(
            num_experts=8,
            num_experts_per_token=2,
            mlp_dim=24,
            shared_mlp_dim=40,
            dispatch="capacity",
            capacity_factor=1.0,
            selection_bias=True,
        ),
    },
}


def variant(name):
    return dataclasses.replace(BASE, **VARIANTS[name])


@functools.cache
def build(config):
    return decoder.build(config, make_rules(MeshConfig(), jax.devices()[:1]))


def tokens(rows, length):
    ids = np.arange(rows * length, dtype=np.int32).reshape(rows, length) % BASE.vocab_size
    places = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    return Tokens(ids=ids, segments=np.ones_like(ids), positions=places)


def forward(model, inputs, params):
    return model.apply({"params": params}, inputs, method=lambda m, x: m.logits(m(x).hidden))


def boxed_params(model, length=8):
    init = functools.partial(model.init, method=lambda m, x: m.logits(m(x).hidden))
    return jax.eval_shape(init, jax.random.key(0), tokens(1, length))["params"]


def product_flops(jaxpr):
    """2 for each multiplication of every dot product of a jaxpr, loops multiplied out."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
        elif name == "cond":  # one of the branches runs
            total += max(product_flops(branch.jaxpr) for branch in params["branches"])
        else:
            assert name != "while", "a loop of unknown length cannot be counted"
            for inner in jax.extend.core.jaxprs_in_params(params):
                total += product_flops(inner) * params.get("length", 1)
    return total


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_that_init_makes(name):
    params = nn.meta.unbox(boxed_params(build(variant(name))))
    count = flops.parameters(variant(name))
    assert count.total == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count.embedding + count.non_embedding == count.total


def test_groups_are_the_parts_of_the_parameter_tree():
    params = nn.meta.unbox(boxed_params(build(variant("untied"))))
    size = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params.items()}
    groups = flops.parameters(variant("untied")).groups
    assert groups["embedding"] == size["embedding"] and groups["head"] == size["head"]
    assert groups["attention"] + groups["mlp"] + groups["norm"] == size["layers"] + size["norm"]


def test_experts_are_a_group_of_their_own():
    layers = nn.meta.unbox(boxed_params(build(variant("experts"))))["layers"]
    size = {name: sum(x.size for x in jax.tree.leaves(v)) for name, v in layers["moe"].items()}
    groups = flops.parameters(variant("experts")).groups
    assert groups["experts"] == size["up"] + size["gate"] + size["down"]
    assert groups["mlp"] == size["shared"] and groups["router"] == size["router"]
    assert groups["router_bias"] == size["selection_bias"]
    count = flops.parameters(variant("experts"))
    assert count.total - count.active == groups["experts"] * (8 - 2) / 8


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_are_the_dot_products_of_the_traced_model(name):
    # XLA attention forms all T * T scores, so the full square is what the program holds.
    config, (rows, length) = variant(name), (2, 16)
    model, inputs = build(config), tokens(2, 16)
    params = nn.meta.unbox(boxed_params(model))
    traced = jax.make_jaxpr(functools.partial(forward, model, inputs))(params)
    expected = flops.flops_per_token(config, length, training=False, full_square=True)
    assert product_flops(traced.jaxpr) == rows * length * expected


@pytest.mark.parametrize("name", ["plain", "grouped", "gated biases", "experts"])
def test_backward_pass_has_twice_the_dot_products(name):
    config, (rows, length) = variant(name), (2, 16)
    model, inputs = build(config), tokens(2, 16)
    params = nn.meta.unbox(boxed_params(model))

    def loss(params):
        return jax.numpy.sum(jax.nn.logsumexp(forward(model, inputs, params), axis=-1))

    traced = jax.make_jaxpr(jax.grad(loss))(params)
    expected = flops.flops_per_token(config, length, full_square=True)
    assert product_flops(traced.jaxpr) == rows * length * expected


ADAPTED = {
    "everything": ({}, lambda name: False),
    "adapters": ({"lora": LoraConfig(rank=4)}, lambda name: "lora" not in name),
    "adapters of all maps": (
        {
            "activation": "swiglu",
            "lora": LoraConfig(
                rank=2, targets=("query", "key", "value", "out", "up", "gate", "down")
            ),
        },
        lambda name: "lora" not in name,
    ),
    "tables frozen": ({"tie_embeddings": False}, lambda name: name == "embedding.weight"),
    "the head alone": ({"tie_embeddings": False}, lambda name: name != "head.weight"),
    "mlps frozen": ({}, lambda name: ".mlp." in name),
    "experts frozen": (VARIANTS["experts"], lambda name: ".moe." in name),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_frozen_parameters_are_spared_the_products_of_their_gradients(name):
    """Products of the traced gradient of the trained parameters alone."""
    changes, is_frozen = ADAPTED[name]
    config, (rows, length) = dataclasses.replace(BASE, **changes), (2, 16)
    model, inputs = build(config), tokens(2, 16)
    params = nn.meta.unbox(boxed_params(model))
    frozen = frozenset(n for n in param_tree.flatten(params) if is_frozen(n))
    assert bool(frozen) == (name != "everything")
    rest, trained = param_tree.split(params, frozen)

    def loss(trained, rest):
        out = forward(model, inputs, param_tree.join(trained, rest))
        return jax.numpy.sum(jax.nn.logsumexp(out, axis=-1))

    traced = jax.make_jaxpr(jax.grad(loss))(trained, rest)
    found = flops.flops_per_token(config, length, full_square=True, frozen=frozen)
    assert product_flops(traced.jaxpr) == rows * length * found


@pytest.mark.parametrize("experts", [0, 4])
def test_flops_agree_with_the_compiler_where_products_dominate(experts):
    # The compiler counts element-wise work too, and what GELU costs depends on how it is expanded:
    # with ReLU everything but the products is below 1%. It counts loops once: none here.
    config = dataclasses.replace(
        BASE, vocab_size=512, num_layers=2, embed_dim=256, activation="relu", scan_unroll=-1
    )
    places = {"dispatch": "capacity", "capacity_factor": 1.0}  # as many as assignments
    config = dataclasses.replace(config, moe=MoeConfig(num_experts=experts, mlp_dim=512, **places))
    model, inputs = build(config), tokens(2, 16)
    params = nn.meta.unbox(boxed_params(model))
    compiled = jax.jit(functools.partial(forward, model, inputs)).lower(params).compile()
    expected = 2 * 16 * flops.flops_per_token(config, 16, training=False, full_square=True)
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.02)


@settings(deadline=None)
@given(
    length=st.integers(1, 60),
    window=st.none() | st.integers(1, 70),
    causal=st.booleans(),
)
def test_mean_keys_is_the_mean_over_the_mask(length, window, causal):
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    seen = distance >= 0 if causal else np.ones_like(distance, bool)
    if window is not None:
        seen = seen & (np.abs(distance) < window)
    mean = mean_keys(length, window=window, causal=causal)
    assert mean == pytest.approx(seen.sum() / length)


def test_causal_scores_are_half_of_the_full_square():
    causal, full = (
        sum(s.flops_per_token({"inputs": 16}, square) for s in BASE.attention_scores)
        for square in (False, True)
    )
    assert causal / full == (16 + 1) / (2 * 16)
    both = (flops.flops_per_token(BASE, 16, training=False, full_square=b) for b in (True, False))
    assert next(both) - next(both) == full - causal


def test_only_local_layers_are_spared_by_a_window():
    config = dataclasses.replace(
        variant("windows"), layer_pattern=("local", "local", "global"), window=4
    )
    none = dataclasses.replace(config, layer_pattern=("global",), window=None)
    spared = flops.flops_per_token(none, 16, training=False)
    spared -= flops.flops_per_token(config, 16, training=False)
    fewer_keys = (16 + 1) / 2 - mean_keys(16, window=4)
    assert spared == pytest.approx(2 * 4 * config.embed_dim * fewer_keys)


def test_ratios_in_the_docstring_are_right():
    gpt2 = decoder.Config(vocab_size=50257, positions="learned")
    llama = decoder.Config(
        vocab_size=128256,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14336,
        activation="swiglu",
        tie_embeddings=False,
    )
    for config, length, ratio in ((gpt2, 1024, "0.93"), (llama, 8192, "0.89")):
        full = flops.flops_per_token(config, length, full_square=True)
        assert f"{flops.flops_per_token(config, length) / full:.2f}" == ratio
        assert ratio in flops.flops_per_token.__doc__


def test_a_model_without_a_head_makes_no_products_with_its_table():
    none = dataclasses.replace(BASE, has_head=False)
    spared = flops.flops_per_token(BASE, 16) - flops.flops_per_token(none, 16)
    assert spared == 3 * 2 * BASE.vocab_size * BASE.embed_dim


def test_how_a_model_runs_changes_no_count():
    other = dataclasses.replace(
        BASE, remat="full", scan_unroll=-1, attention_kernel="cudnn", dtype="bfloat16"
    )
    assert flops.parameters(other) == flops.parameters(BASE)
    assert flops.flops_per_token(other, 16) == flops.flops_per_token(BASE, 16)


def test_experts_without_the_number_that_a_token_is_sent_to_are_refused():
    class Experts:
        pass

    weight = flops.Parameter("up", 800, ("expert", "embed", "mlp"))
    with pytest.raises(ValueError, match="Config no `moe` with num_experts"):
        flops.flops_per_token(Experts(), 4, parameters=[weight])


def test_counting_needs_no_device():
    """A config file that counts is read before the processes of a run have met."""
    program = (
        "import jax; from configs import ladder; ladder.get_config('isoflop:1e12:2');"
        "assert not jax._src.xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# Moments of each parameter: (of a matrix inside a layer, of any other).
MOMENTS = {"adamw": (2, 2), "lion": (1, 1), "sgd": (1, 1), "muon": (1, 2)}


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("ema_decay", [0.0, 0.99])
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["biases", "experts"])
def test_optimizer_bytes_are_those_of_its_moments_and_averages(kind, moment_dtype, name, ema_decay):
    config = variant(kind)
    make = component(COMPONENTS["optimizer"], name).Config
    optimizer = make(name=name, ema_decay=ema_decay, moment_dtype=moment_dtype, b2=0.95)
    groups = flops.parameters(config).groups
    matrices = sum(
        p.size for p in flops.abstract_parameters(config) if p.role in ("hidden", "router")
    )
    others = sum(groups.values()) - matrices - groups.get("router_bias", 0)  # without a state
    of_matrix, of_other = MOMENTS[name]
    size = (of_matrix * matrices + of_other * others) * (2 if moment_dtype == "bfloat16" else 4)
    size += 4 * sum(groups.values()) * bool(ema_decay)
    counters = flops.optimizer_bytes(config, optimizer) - size
    assert 0 < counters < 64


def test_peak_is_found_by_the_longest_name_that_fits():
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak_flops("NVIDIA L40S") == 362e12
    assert flops.peak_flops("TPU v5") == 459e12
    assert flops.peak_flops("TPU v5 lite") == 197e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L400", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""])
def test_peak_of_an_unknown_device_is_none(kind):
    assert flops.peak_flops(kind) is None


def test_peak_is_known_for_bfloat16_alone():
    assert flops.peak_flops("TPU v4", "float32") is None
