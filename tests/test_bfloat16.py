"""Sums over tokens in models that compute in bfloat16: they are float32, whatever is summed.

A batch of N copies of a row has N times the gradient of the row. In bfloat16, which has 8 bits, a
sum of equal terms stops growing at 256 of them, so that copies show in what type a sum is made:
where this was it, tables of vectors kept 12 to 58% of their gradient, biases 91 to 97%.

Budgets, as the norm of the difference over that of the gradient. What is summed term by term
(tables, biases, scales, routers): 1e-4, of float32 alone. Matrices: 2 ** -8. A product of matrices
is summed in float32 and then rounded once, by up to 2 ** -9 of each number, for every micro-batch
and every shard of the batch, or for every chunk of the loss.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import random_params

from lm.config.schema import LossConfig
from lm.layers.cross_entropy import lm_loss
from lm.layers.embedding import Embedding
from lm.layers.linear import Linear, Matrix
from lm.layers.lora import LoraConfig
from lm.layers.moe.dispatch import dropless, with_capacity
from lm.layers.moe.moe import MoeConfig
from lm.models import conv, decoder, encoder, encoder_decoder, lstm
from lm.types import Batch, Tokens

ROWS, COPIES, LENGTH, VOCAB = 512, 457, 8, 40  # a power of two of copies would not show rounding
FLOAT32, ROUNDED = 1e-4, 2.0**-8

SIZES = {"vocab_size": VOCAB, "num_layers": 2, "embed_dim": 16, "dtype": "bfloat16"}
HEADS = {"num_heads": 4, "mlp_dim": 32, "max_length": LENGTH}
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_bias": True, "norm": "layer"}
BUCKETS = {"relative_buckets": 6, "relative_max_distance": 8}
MOE = {"num_experts": 4, "selection_bias": True}
LORA = LoraConfig(rank=4, targets=("query", "value", "up", "head"))
MODELS = {
    "gpt2": (decoder, {**HEADS, **BIASES, "positions": "learned"}),
    "t5": (decoder, {**HEADS, **BUCKETS, "positions": "relative", "qk_norm": True}),
    "lora": (decoder, {**HEADS, "lora": LORA, "tie_embeddings": False}),
    "dropless": (decoder, {**HEADS, "moe": MoeConfig(**MOE), "activation": "swiglu"}),
    "capacity": (
        decoder,
        {**HEADS, "moe": MoeConfig(**MOE, dispatch="capacity", shared_mlp_dim=8)},
    ),
    "bert": (encoder, {**HEADS, **BIASES, "positions": "learned", "norm_placement": "post"}),
    "encoder_decoder": (encoder_decoder, {**HEADS, **BIASES, "positions": "learned"}),
    "conv": (conv, {"kernel_size": 3}),
    "lstm": (lstm, {"hidden_dim": 24, "tie_embeddings": False}),
}
# matrices, whose gradient is a product; experts are named by the leaf itself
PRODUCTS = ("weight", "lora_a", "lora_b", "recurrent", "up", "gate", "down")
TABLES = ("embedding", "position", "type", "relative", "encoder_position", "decoder_position")


def budget(path, exact):
    """exact: devices add up in float32. Beside the layers, the head's is rounded by chunks of the
    loss, and experts' once on each device.
    """
    *outer, owner, name = ["", *(part.key for part in path)]
    if name not in PRODUCTS or owner in TABLES:
        return FLOAT32
    unrounded = exact and "layers" in outer and owner != "moe"
    return FLOAT32 if unrounded else ROUNDED


def is_nothing(path, config):
    """The bias of keys moves all scores of a query alike, which is no gradient but rounding."""
    names = tuple(part.key for part in path)[-2:]
    return names == ("key", "bias") and config.positions != "rotary"


def some_params(model, tokens, source):
    def everything(model, tokens, encoder):
        return model.logits(model(tokens, encoder=encoder).hidden)

    init = functools.partial(model.init, method=everything)
    return random_params(jax.eval_shape(init, jax.random.key(0), tokens, source)["params"])


@pytest.mark.parametrize("exact", [False, True], ids=["compute", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_copies_of_a_row_have_as_many_times_its_gradient(rules_on, name, exact):
    module, changes = MODELS[name]
    config = module.Config(**{**SIZES, **changes})
    config.check(LENGTH)
    rules = rules_on(data=2, fsdp=4) if exact else rules_on()
    model = module.build(config, dataclasses.replace(rules, float32_gradients=exact))
    rng = np.random.default_rng(0)

    def copies(row):
        return np.tile(np.asarray(row, np.int32)[None], (ROWS, 1))

    ids, targets = rng.integers(0, VOCAB, (2, LENGTH))
    tokens = Tokens(copies(ids), copies(np.ones(LENGTH)), copies(np.arange(LENGTH)))
    if name == "bert":
        tokens = tokens.replace(types=copies(np.arange(LENGTH) % 2))
    source = tokens if config.takes_encoder else None
    weights = np.zeros((2, ROWS, LENGTH), np.float32)
    weights[0, :COPIES] = weights[1, 0] = 1
    batch, alone = Batch(tokens, copies(targets), weights[0], source), weights[1]

    params = some_params(model, tokens, source)

    @jax.jit
    def gradient(params, batch):
        loss = LossConfig(chunk_size=2 * ROWS)  # four chunks
        of = functools.partial(lm_loss, model, train=True, config=loss)
        return jax.grad(lambda p: of(p, batch, jax.random.key(0))[0])(params)

    one, all_of_them = gradient(params, batch.replace(weights=alone)), gradient(params, batch)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(all_of_them), strict=True
    ):
        if is_nothing(path, config) or path[-1].key == "selection_bias":  # of the load, not of x
            continue
        wanted, found = np.asarray(x, np.float64) * COPIES, np.asarray(y, np.float64)
        assert y.dtype == np.float32 and np.any(wanted)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < budget(path, exact), f"{jax.tree_util.keystr(path)}: {error:.1e}"


# ---- against float64, on cotangents of one sign ----


def cotangents(*shape, seed=0):
    """Positive numbers that bfloat16 holds exactly."""
    values = np.random.default_rng(seed).uniform(0.5, 1.5, shape)
    return jnp.asarray(values, jnp.bfloat16)


@pytest.mark.parametrize("occurrences", [4096, 65_536])
def test_the_gradient_of_a_table_is_the_sum_of_all_occurrences(rules_on, occurrences):
    table = Embedding(3, 4, rules_on(), dtype=jnp.bfloat16)
    ids = jnp.full((8, occurrences // 8), 1, jnp.int32).at[0, 0].set(2)
    params = {"params": {"weight": jnp.ones((3, 4))}}
    given = cotangents(*ids.shape, 4)
    out, pullback = jax.vjp(lambda p: table.apply(p, ids), params)
    assert out.dtype == jnp.bfloat16
    [found] = jax.tree.leaves(pullback(given))
    exact = np.zeros((3, 4))
    np.add.at(exact, np.asarray(ids), np.asarray(given, np.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_the_gradient_of_a_bias_is_the_sum_over_all_tokens(rules_on):
    layer = Linear({"embed": 2}, {"mlp": 4}, rules_on(), bias=True, dtype=jnp.bfloat16)
    given = cotangents(16, 512, 4)
    x = jnp.ones((16, 512, 2), jnp.bfloat16)
    params = {"params": {"weight": jnp.ones((2, 4)), "bias": jnp.ones(4)}}
    out, pullback = jax.vjp(lambda p: layer.apply(p, x), params)
    assert out.dtype == jnp.bfloat16
    found = pullback(given)[0]["params"]["bias"]
    exact = np.asarray(given, np.float64).sum((0, 1))
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.parametrize("way", ["dropless", "in_passes", "capacity"])
def test_the_gradient_of_a_routers_weight_is_the_sum_over_features(rules_on, way):
    """4,096 products of one sign are rounded one by one, their sum is not."""
    width, tokens = 4096, 8
    rules = rules_on(expert=2) if way == "in_passes" else rules_on()
    experts = {"up": jnp.full((2, width, 2), 2.0**-12), "down": cotangents(2, 2, width, seed=1)}
    experts = {name: Matrix(w.astype(jnp.bfloat16)) for name, w in experts.items()}
    x = jnp.ones((2, tokens // 2, width), jnp.bfloat16)
    chosen = jnp.asarray(np.arange(tokens).reshape(2, -1, 1) % 2, jnp.int32)

    def apply(weights):
        inputs = (x, chosen, weights, experts, "relu", rules)
        if way == "capacity":
            return with_capacity(*inputs, capacity=tokens)
        return dropless(*inputs)

    weights = jnp.ones((2, tokens // 2, 1))
    y, pullback = jax.vjp(jax.jit(apply), weights)
    given = cotangents(*y.shape)
    [found] = pullback(given)
    exact = np.sum(np.asarray(y, np.float64) * np.asarray(given, np.float64), -1, keepdims=True)
    assert found.dtype == np.float32 and exact.min() > 1000
    np.testing.assert_allclose(found, exact, rtol=1e-3)


# ---- every block of every architecture, against float64 ----

# Rounding errors of the same operations are as the unit roundoffs, 2 ** -9 and 2 ** -24, unless a
# sum is made in bfloat16. Other roundings add up to another error: the factors are for that, and
# for tokens that are sent to another expert.
ROUNDOFFS, LONG = 2.0**15, 128
SPREAD, OF_EXPERTS = 1.5, 2.5
MESHES = {"one": {}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}


@functools.cache
def evaluated(name, dtype, rules):
    """(hidden states, gradients by block) of two layers, in float64."""
    module, changes = MODELS[name]
    long = {"max_length": LONG} if "max_length" in changes else {}
    config = module.Config(**{**SIZES, "embed_dim": 64, **changes, **long, "dtype": dtype})
    ids, targets = np.random.default_rng(0).integers(0, VOCAB, (2, 4, LONG), np.int32)
    positions = np.tile(np.arange(LONG, dtype=np.int32), (4, 1))
    tokens = Tokens(ids, np.ones_like(ids), positions)
    if name == "bert":
        tokens = tokens.replace(types=positions % 2)
    source = tokens if config.takes_encoder else None
    batch = Batch(tokens, targets, np.ones(ids.shape, np.float32), source)
    model = module.build(config, rules)
    params = some_params(
        module.build(dataclasses.replace(config, dtype="float32"), rules), tokens, source
    )

    def loss(params):
        hidden = model.apply({"params": params}, tokens, encoder=source).hidden
        of = functools.partial(lm_loss, model, train=True, config=LossConfig())
        return of(params, batch, jax.random.key(0))[0], hidden

    with jax.enable_x64(dtype == "float64"):
        gradients, hidden = jax.jit(jax.grad(loss, has_aux=True))(params)
    blocks = collections.defaultdict(list)
    for path, x in jax.tree_util.tree_leaves_with_path(gradients):
        keys = [part.key for part in path]
        if keys[-1] == "selection_bias" or is_nothing(path, config):
            continue
        x = np.asarray(x, np.float64)
        if "layers" in keys:
            for layer, of_layer in enumerate(x):
                blocks[f"{keys[0]} {layer}"].append(of_layer.ravel())
        else:
            blocks[keys[0]].append(x.ravel())
    found = {block: np.concatenate(parts) for block, parts in blocks.items()}
    return {"hidden": np.asarray(hidden, np.float64).ravel(), **found}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_the_error_of_a_block_is_that_of_float32_times_the_roundoffs(rules_on, name, mesh):
    exact = evaluated(name, "float64", rules_on())
    float32 = evaluated(name, "float32", rules_on())
    for block, found in evaluated(name, "bfloat16", rules_on(**MESHES[mesh])).items():
        size = np.linalg.norm(exact[block])
        error = np.linalg.norm(found - exact[block]) / size
        spread = OF_EXPERTS if "moe" in MODELS[name][1] else SPREAD
        allowed = spread * ROUNDOFFS * np.linalg.norm(float32[block] - exact[block]) / size
        assert error < allowed, f"{block}: {error:.1e} is beyond {allowed:.1e}"
