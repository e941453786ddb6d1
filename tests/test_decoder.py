"""The decoder in a dozen variants that together take every value of its config.

Measured, for logits up to 5: 3e-6 from numpy, 2e-6 from documents alone, 5e-6 from cached decode;
scan and rematerialisation change no bit here, but another compiler may order sums differently.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import some
from numpy_decoder import reference
from parameters import random_params

from lm.layers.mlp import ACTIVATIONS
from lm.layers.norm import KINDS as NORMS
from lm.layers.norm import Norm
from lm.layers.positions import KINDS as POSITIONS
from lm.layers.positions import RotaryConfig
from lm.layers.stack import REMAT
from lm.models.decoder import Config
from lm.types import Tokens

LENGTH, VOCAB = 12, 32
MIXED = {"layer_pattern": ("local", "global"), "window": 3, "num_layers": 3}
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_bias": True}

# After the models that made each choice known; `_local`: with a pattern of local and global layers.
VARIANTS = {
    "gpt2": {"positions": "learned", "norm": "layer", "activation": "gelu_tanh", **BIASES},
    "llama": {
        "rotary": RotaryConfig(theta=500.0, scaling="llama3", factor=4.0, original_length=64),
        "activation": "swiglu",
        "num_kv_heads": 2,
        "tie_embeddings": False,
        "init_std": None,
    },
    "gemma": {
        **MIXED,
        "rotary": RotaryConfig(theta=1e4, local_theta=100.0, scaling="linear", factor=2.0),
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "activation": "geglu_tanh",
        "num_kv_heads": 1,
        "head_dim": 6,
        "qk_norm": True,
        "query_scale": 0.3,
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
        "embed_scale": 4.0,
    },
    "mistral": {
        "rotary": RotaryConfig(scaling="yarn", factor=4.0, original_length=32),
        "layer_pattern": ("local",),
        "window": 4,
        "num_kv_heads": 2,
        "activation": "swiglu",
    },
    "t5": {"positions": "relative", "activation": "relu", "relative_buckets": 6},
    "t5_local": {**MIXED, "positions": "relative", "activation": "reglu", "relative_buckets": 4},
    "bloom": {
        "positions": "alibi",
        "norm": "layer",
        "activation": "gelu",
        "num_heads": 6,
        "num_kv_heads": 6,
        "head_dim": 4,
        **BIASES,
    },
    "bloom_local": {**MIXED, "positions": "alibi", "activation": "geglu", "tie_embeddings": False},
    "original": {
        "positions": "sinusoidal",
        "norm": "layer",
        "norm_placement": "post",
        "activation": "relu",
        **BIASES,
    },
    "original_local": {
        **MIXED,
        "positions": "sinusoidal",
        "norm_placement": "both",
        "parallel_block": True,
        "activation": "silu",
    },
    "learned_local": {
        **MIXED,
        "positions": "learned",
        "norm_placement": "post",
        "parallel_block": True,
        "activation": "quick_gelu",
    },
    "nope_local": {**MIXED, "positions": "none", "parallel_block": True, "activation": "relu2"},
}
SIZES = {"vocab_size": VOCAB, "max_length": 16, "embed_dim": 16, "relative_max_distance": 8}


class Subject:
    """A model with parameters, and its compiled functions on [3, LENGTH] and shorter inputs."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        zeros = jnp.zeros((1, 1), jnp.int32)
        init = functools.partial(model.init, method=self._logits)
        boxed = jax.eval_shape(init, jax.random.key(0), Tokens(zeros, zeros, zeros))["params"]
        self.params = random_params(boxed)
        self.logits = jax.jit(self._apply)
        self.decode = jax.jit(self._decode)

    @staticmethod
    def _logits(model, tokens):
        return model.logits(model(tokens).hidden)

    def _apply(self, params, tokens):
        return self.model.apply({"params": params}, tokens, method=self._logits)

    def _decode(self, params, tokens, cache):
        def run(model):
            output = model(tokens, cache=cache)
            return model.logits(output.hidden), output.cache

        return nn.apply(run, self.model)({"params": params})

    @functools.cached_property
    def pull(self):
        """(params, tokens, d logits) -> d params."""
        return jax.jit(lambda p, tokens, d: jax.vjp(lambda p: self._apply(p, tokens), p)[1](d)[0])


@pytest.fixture(scope="session")
def subject(tiny_decoder):
    """(variant, **changes) -> its Subject, made once."""

    @functools.cache
    def make(name, changes=()):
        return Subject(tiny_decoder(**{**SIZES, **VARIANTS[name], **dict(changes)}))

    return lambda name, **changes: make(name, tuple(changes.items()))


def rows(*segments, seed=0):
    """Tokens [3, LENGTH] of rows of segments; a negative length is that much padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (3, LENGTH)).astype(np.int32)
    marks, positions = np.zeros_like(ids), np.zeros_like(ids)
    for row, lengths in enumerate(segments):
        start = 0
        for number, size in enumerate(lengths):
            marks[row, start : start + abs(size)] = 0 if size < 0 else number + 1
            positions[row, start : start + abs(size)] = 0 if size < 0 else np.arange(size)
            start += abs(size)
    return Tokens(ids, marks, positions)


# ---- against numpy ----


@pytest.mark.parametrize("name", VARIANTS)
def test_decoder_is_the_numpy_model_on_every_packed_document(subject, name):
    s = subject(name)
    tokens = rows([12], [5, 7], [-2, 3, 4])
    logits = np.asarray(s.logits(s.params, tokens))
    for row in range(3):
        for segment in set(tokens.segments[row].tolist()) - {0}:
            here = tokens.segments[row] == segment
            expected = reference(s.config, s.params, tokens.ids[row, here])
            np.testing.assert_allclose(logits[row, here], expected, atol=1e-5, rtol=0)


def relative_errors(found, exact):
    """Norm of the difference of each token's logits [..., V] over that of the exact ones."""
    exact = np.asarray(exact, np.float64)
    return np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


@pytest.mark.parametrize("name", some(VARIANTS, "gpt2", "gemma", "t5_local", "bloom"))
def test_in_bfloat16_logits_are_within_their_rounding_of_the_numpy_model(subject, name):
    """Some ten roundings of 2 ** -9 on the way. Measured: medians of 0.005 to 0.013, at most 0.07,
    where logits nearly cancel.
    """
    s = subject(name, dtype="bfloat16")
    tokens = rows([12], [5, 7], [-2, 3, 4])
    logits, errors = np.asarray(s.logits(s.params, tokens)), []
    for row in range(3):
        for segment in set(tokens.segments[row].tolist()) - {0}:
            here = tokens.segments[row] == segment
            expected = reference(s.config, s.params, tokens.ids[row, here])
            errors.append(relative_errors(logits[row, here], expected))
    errors = np.concatenate(errors)
    assert 2.0**-10 < np.median(errors) < 0.02 and errors.max() < 0.1


def test_the_variants_take_every_value():
    configs = [Config(**{**SIZES, **changes}) for changes in VARIANTS.values()]
    assert {c.positions for c in configs} == set(POSITIONS)
    assert {c.activation for c in configs} == set(ACTIVATIONS)
    assert {c.norm for c in configs} == set(NORMS)
    assert {c.rotary.scaling for c in configs} == {"none", "linear", "llama3", "yarn"}
    assert {c.norm_placement for c in configs} == {"pre", "post", "both"}
    elsewhere = {"dropout", "attention_dropout", "dtype", "remat", "scan_unroll", "norm_eps"}
    elsewhere |= {"attention_kernel", "sequence_parallel", "sequence_balance", "pipeline", "moe"}
    elsewhere |= {
        "has_head",
        "quantization",
        "lora",
        "parametrization",
        "base_embed_dim",
        "base_num_layers",
        "base_head_dim",
    }
    for field in dataclasses.fields(Config):
        if field.name not in elsewhere | set(SIZES) | {"num_layers", "mlp_dim"}:
            assert len({repr(getattr(c, field.name)) for c in configs}) > 1, field.name


# ---- who sees whom ----


@pytest.mark.parametrize("name", VARIANTS)
def test_a_packed_document_never_sees_its_neighbours(subject, name):
    s = subject(name)
    tokens = rows([5, 7], [4, 4, 4], [3, 9])
    before = np.asarray(s.logits(s.params, tokens))
    for segment in (1, 2, 3):
        changed = tokens.segments == segment
        other = dataclasses.replace(tokens, ids=np.where(changed, tokens.ids ^ 1, tokens.ids))
        after = np.asarray(s.logits(s.params, other))
        np.testing.assert_array_equal(before[~changed], after[~changed])
        assert np.all(np.any(before[changed] != after[changed], axis=-1))


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_are_the_documents_alone(subject, name):
    s = subject(name)
    together = rows([5, 7])
    alone = rows([5], [7])
    alone.ids[0, :5], alone.ids[1, :7] = together.ids[0, :5], together.ids[0, 5:]
    packed, separate = s.logits(s.params, together)[0], s.logits(s.params, alone)
    np.testing.assert_allclose(packed[:5], separate[0, :5], atol=1e-5)
    np.testing.assert_allclose(packed[5:], separate[1, :7], atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_stands_in_padding_changes_nothing(subject, name):
    s = subject(name)
    tokens = rows([7], [-3, 9], [2, -1, 5])
    padding = tokens.segments == 0
    other = dataclasses.replace(tokens, ids=np.where(padding, tokens.ids ^ 3, tokens.ids))
    before, after = (np.asarray(s.logits(s.params, t)) for t in (tokens, other))
    np.testing.assert_array_equal(before[~padding], after[~padding])


@pytest.mark.parametrize("name", some(VARIANTS, "gpt2", "gemma", "mistral", "t5_local", "bloom"))
def test_gradients_flow_from_exactly_the_visible_past(subject, name):
    """Non-zeros of d logits[t] / d embedding[s] over L layers: of the mask to the power L."""
    s = subject(name)
    tokens = rows([5, 6])
    tokens.ids[0] = np.arange(LENGTH)  # every place has its own row of the table
    segments = tokens.segments[0]
    same = (segments[:, None] == segments[None, :]) & (segments != 0)
    back = np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None, :]
    reachable = np.eye(LENGTH, dtype=bool)
    for kind in s.config.layer_kinds:
        window = s.config.window if kind == "local" else LENGTH
        reachable = ((same & (back >= 0) & (back < window)).astype(int) @ reachable) > 0
    flows = np.zeros((LENGTH, LENGTH), bool)
    for t in range(11):
        d_logits = np.zeros((3, LENGTH, VOCAB), np.float32)
        d_logits[0, t, LENGTH:] = 1 + np.arange(VOCAB - LENGTH)  # tied rows of no input
        table = s.pull(s.params, tokens, d_logits)["embedding"]["weight"]
        flows[t] = np.any(np.asarray(table)[:LENGTH] != 0, axis=-1)
    np.testing.assert_array_equal(flows[:11], reachable[:11])


# ---- training ----


@pytest.mark.parametrize("name", VARIANTS)
def test_one_step_lowers_the_loss_and_reaches_every_parameter(subject, name):
    s = subject(name)
    tokens = rows([12], [5, 7], [4, 8])
    targets = np.eye(VOCAB)[np.random.default_rng(3).integers(0, VOCAB, (3, LENGTH))]

    def loss(params):
        logits = np.asarray(s.logits(params, tokens), np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return -np.sum(targets * np.log(p)), (p - targets).astype(np.float32)

    before, d_logits = loss(s.params)
    gradient = s.pull(s.params, tokens, d_logits)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        layers = (
            np.asarray(leaf).reshape(s.config.num_layers, -1) if path[0].key == "layers" else leaf
        )
        assert np.all(np.abs(layers).max(-1 if path[0].key == "layers" else None) > 0), (
            jax.tree_util.keystr(path)
        )
    step = jax.tree.map(lambda p, g: p - 1e-3 * g, s.params, gradient)
    assert loss(step)[0] < before - 1e-3


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_scan_is_a_loop(subject, name):
    scan, loop = subject(name, scan_unroll=1), subject(name, scan_unroll=-1)
    tokens = rows([12], [5, 7], [4, 6])
    d_logits = np.random.default_rng(0).normal(size=(3, LENGTH, VOCAB)).astype(np.float32)
    assert "stablehlo.while" in scan.logits.lower(scan.params, tokens).as_text()
    assert "stablehlo.while" not in loop.logits.lower(scan.params, tokens).as_text()
    np.testing.assert_allclose(
        scan.logits(scan.params, tokens), loop.logits(scan.params, tokens), atol=1e-5
    )
    a, b = (flat(s.pull(scan.params, tokens, d_logits)) for s in (scan, loop))
    np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max())


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_in_bfloat16_a_loop_is_as_close_to_float32_as_the_scan(subject, name):
    """Gradients of all parameters, as one vector. Measured: 0.019 (gpt2) and 0.034 (gemma, of
    three layers with soft caps), the loop 1.03 times that and the same.
    """
    exact = subject(name)
    scan, loop = (subject(name, dtype="bfloat16", scan_unroll=n) for n in (1, -1))
    tokens = rows([12], [5, 7], [4, 6])
    d_logits = np.random.default_rng(0).normal(size=(3, LENGTH, VOCAB)).astype(np.float32)
    gradient, *low = (flat(s.pull(exact.params, tokens, d_logits)) for s in (exact, scan, loop))
    one, other = (float(relative_errors(g, gradient)) for g in low)
    assert 0 < one < 0.05 and other < 1.2 * one


USUAL = ("full", "projections", "offload")  # the other policies differ in what they name


@pytest.mark.parametrize("policy", some((n for n in REMAT if n != "none"), *USUAL))
def test_rematerialisation_changes_no_gradient(subject, policy):
    plain, remat = subject("gemma"), subject("gemma", remat=policy)
    tokens = rows([12], [5, 7], [4, 6])
    d_logits = np.random.default_rng(0).normal(size=(3, LENGTH, VOCAB)).astype(np.float32)
    a, b = (flat(s.pull(plain.params, tokens, d_logits)) for s in (plain, remat))
    np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(a).max())


def test_rematerialisation_policies_save_less_and_less(subject):
    def saved(policy):
        s = subject("gemma", remat=policy)
        vjp = jax.eval_shape(lambda p: jax.vjp(lambda p: s._apply(p, rows([12])), p)[1], s.params)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp))

    sizes = {policy: saved(policy) for policy in REMAT}
    assert sizes["none"] > sizes["dots"] > sizes["attended"] > sizes["full"]
    assert sizes["none"] > sizes["projections"] > sizes["attended"]


def test_parameters_and_logits_stay_float32_in_bfloat16(subject):
    low, full = subject("gemma", dtype="bfloat16"), subject("gemma")
    tokens = rows([12], [5, 7], [4, 6])
    hidden = jax.eval_shape(lambda p: low.model.apply({"params": p}, tokens).hidden, low.params)
    assert hidden.dtype == jnp.bfloat16
    zeros = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(low.model.init, jax.random.key(0), Tokens(zeros, zeros, zeros))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    a, b = (np.asarray(s.logits(full.params, tokens)) for s in (low, full))
    assert a.dtype == np.float32
    scored = tokens.segments != 0
    difference = np.abs(a - b)[scored]
    assert 0 < difference.mean() < 0.05 * np.abs(b[scored]).mean()


@pytest.mark.parametrize("kind", NORMS)
def test_norm_statistics_are_float32(kind):
    """bfloat16 could not tell the mean of 4,096 values near 100 to better than 0.5."""
    x = jnp.asarray(100 + np.random.default_rng(0).normal(size=(2, 4096)), jnp.bfloat16)
    variables = {"params": {"scale": jnp.full(4096, float(kind != "rms_plus_one"))}}
    low = Norm(kind, dtype=jnp.bfloat16).apply(variables, x)
    full = Norm(kind).apply(variables, x.astype(jnp.float32))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(low, np.float32), np.asarray(full.astype(jnp.bfloat16), np.float32)
    )
    exact = np.asarray(x, np.float64)
    exact = exact - exact.mean(-1, keepdims=True) if kind == "layer" else exact
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(full, exact, atol=1e-3)


@pytest.mark.parametrize("where", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_alone(subject, where):
    plain, dropped = subject("gpt2"), subject("gpt2", **{where: 0.4})
    tokens = rows([12], [5, 7], [4, 8])

    @jax.jit
    def hidden(rng):
        variables = {"params": plain.params}
        return dropped.model.apply(variables, tokens, train=True, rngs={"dropout": rng}).hidden

    np.testing.assert_array_equal(
        plain.logits(plain.params, tokens), dropped.logits(plain.params, tokens)
    )
    first, again, other = (hidden(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first) - np.asarray(other)).max() > 1e-2


# ---- decoding ----

CACHED = ("gpt2", "gemma", "mistral", "t5_local", "bloom_local")


@pytest.mark.parametrize(
    "name, pieces",
    [
        *(
            pytest.param(
                name,
                [5, 5, 1, 1],
                id=f"{name}-by_chunk",
                marks=() if name in CACHED else pytest.mark.slow,
            )
            for name in VARIANTS
        ),
        pytest.param("gemma", [1] * 12, id="gemma-by_token"),
    ],
)
def test_cached_decode_is_the_whole_forward_pass(subject, name, pieces):
    """One document, two, and padding on the left; rings of 3 slots hold less than a chunk."""
    s = subject(name)
    tokens = rows([12], [4, 8], [-3, 9])
    expected = np.asarray(s.logits(s.params, tokens))
    cache = s.model.init_cache(3, LENGTH)
    if s.config.window is not None:
        slots = {entry["key"].shape[3] for entry in cache["layers"]}
        assert min(slots) == s.config.window
    found, start = [], 0
    for size in pieces:
        piece = jax.tree.map(lambda x, a=start, b=start + size: x[:, a:b], tokens)
        logits, cache = s.decode(s.params, piece, cache)
        found.append(np.asarray(logits))
        start += size
    scored = tokens.segments != 0
    np.testing.assert_allclose(np.concatenate(found, axis=1)[scored], expected[scored], atol=1e-5)


@pytest.mark.parametrize("name", some(VARIANTS, "gpt2", "gemma", "mistral"))
def test_in_bfloat16_cached_decode_is_as_close_to_float32_as_the_whole_pass(subject, name):
    """Measured: medians of 0.006 to 0.017, with a cache and without the same to every digit."""
    s, exact = subject(name, dtype="bfloat16"), subject(name)
    tokens = rows([12], [4, 8], [-3, 9])
    scored = tokens.segments != 0
    expected = np.asarray(exact.logits(s.params, tokens))[scored]
    whole = np.asarray(s.logits(s.params, tokens))[scored]
    cache, found, start = s.model.init_cache(3, LENGTH), [], 0
    for size in (5, 5, 1, 1):
        piece = jax.tree.map(lambda x, a=start, b=start + size: x[:, a:b], tokens)
        logits, cache = s.decode(s.params, piece, cache)
        found.append(np.asarray(logits))
        start += size
    found = np.concatenate(found, axis=1)[scored]
    one, other = (np.median(relative_errors(x, expected)) for x in (whole, found))
    assert 0 < one < 0.02 and other < 1.2 * one


def test_decode_continues_a_cache_with_room_to_spare(subject):
    s = subject("gemma")
    tokens = rows([12], [4, 8], [-3, 9])
    logits, cache = s.decode(s.params, tokens, s.model.init_cache(3, 20))
    expected = np.asarray(s.logits(s.params, tokens))
    scored = tokens.segments != 0
    np.testing.assert_allclose(np.asarray(logits)[scored], expected[scored], atol=1e-5)
    assert int(cache["index"]) == LENGTH


# ---- configs that don't fit together ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embed_dim": 18}, r"embed_dim \(18\) .* num_heads \(4\)"),
        ({"num_kv_heads": 3}, r"num_heads \(4\) .* num_kv_heads \(3\)"),
        ({"num_kv_heads": 0}, r"num_kv_heads \(0\) must be at least 1"),
        ({"head_dim": 5}, r"head_dim \(5\) must be even"),
        (
            {"positions": "sinusoidal", "embed_dim": 7, "head_dim": 4},
            r"embed_dim \(7\) must be even",
        ),
        ({"layer_pattern": ("local",)}, r"window \(None\) and layer_pattern \('local',\)"),
        ({"window": 4}, r"window \(4\) and layer_pattern \('global',\)"),
        ({"layer_pattern": ("local",), "window": 0}, r"window \(0\) must be at least 1"),
        ({"layer_pattern": ("round",)}, r"layer_pattern\[0\] \('round'\) must be one of global"),
        ({"layer_pattern": ()}, r"layer_pattern must list .* \(\)"),
        ({"max_length": 16}, r"max_length \(16\) .* config.data.length \(32\)"),
        ({"scan_unroll": 3}, r"scan_unroll \(3\) must be at most num_layers \(2\)"),
        ({"scan_unroll": 0}, r"scan_unroll \(0\)"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be in \[0, 1\)"),
        ({"attention_dropout": -0.1}, r"attention_dropout \(-0.1\) must be in \[0, 1\)"),
        ({"num_layers": 0}, r"num_layers \(0\) must be at least 1"),
        ({"mlp_dim": 0}, r"mlp_dim \(0\) must be at least 1"),
        ({"attention_softcap": 0.0}, r"attention_softcap \(0.0\) must be above 0"),
        ({"norm_eps": -1.0}, r"norm_eps \(-1.0\) must be above 0"),
        (
            {"positions": "relative", "relative_buckets": 1},
            r"relative_buckets \(1\) must be at least 2",
        ),
        ({"activation": "gelo"}, r"activation \('gelo'\) must be one of .*swiglu"),
        ({"norm": "batch"}, r"norm \('batch'\) must be one of layer, rms, "),
        ({"norm_placement": "mid"}, r"norm_placement \('mid'\) must be one of pre, post, both"),
        ({"positions": "rope"}, r"positions \('rope'\) must be one of .*rotary"),
        (
            {"rotary": RotaryConfig(scaling="ntk")},
            r"rotary.scaling \('ntk'\) must be one of .*yarn",
        ),
        ({"dtype": "float16"}, r"dtype \('float16'\) must be one of float32, bfloat16"),
        ({"remat": "all"}, r"remat \('all'\) must be one of .*full"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_path_and_numbers(tiny_decoder, changes, message):
    with pytest.raises(ValueError, match=r"config\.model\." + message):
        dataclasses.replace(tiny_decoder().config, **changes).check(32)
