"""The encoder as published, and what the decoder's tests don't say of a model that sees both ways.

Measured, for logits up to 10: 3e-6 from transformers' BERT, 4e-6 from documents alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import load_torch, random_params, torch_linear, torch_norm

from lm.layers import attention
from lm.layers.attention_scores import Heads
from lm.models import encoder, flops
from lm.models.encoder import Config
from lm.types import Tokens

LENGTH, VOCAB = 12, 32
SIZES = {"vocab_size": VOCAB, "max_length": 16, "num_layers": 2, "embed_dim": 16, "num_heads": 4}
VARIANTS = {
    "bert": {
        "mlp_dim": 24,
        "norm": "layer",
        "norm_placement": "post",
        "norm_eps": 1e-12,
        "positions": "learned",
        "pooler_dim": 16,
        **{name: True for name in ("qkv_bias", "out_bias", "mlp_bias", "norm_bias")},
    },
    "modernbert": {
        "norm": "layer",
        "activation": "geglu",
        "layer_pattern": ("global", "local"),
        "window": 3,
        "num_types": 0,
    },
    "relative": {"positions": "relative", "relative_buckets": 8, "relative_max_distance": 10},
}


def both(model, tokens):
    hidden = model(tokens).hidden
    pooled = model.pooled(hidden, tokens) if model.config.pooler_dim else None
    return model.logits(hidden), pooled


class Subject:
    """A model with parameters, and its compiled function on [3, LENGTH]."""

    def __init__(self, config, rules):
        config.check(LENGTH)
        self.config, self.model = config, encoder.build(config, rules)
        self.params = random_params(boxed_params(self.model))
        self.run = jax.jit(lambda p, x: self.model.apply({"params": p}, x, method=both))

    def logits(self, params, tokens):
        return np.asarray(self.run(params, tokens)[0])

    @functools.cached_property
    def pull(self):
        """(params, tokens, d logits) -> d params."""
        return jax.jit(lambda p, x, d: jax.vjp(lambda p: self.run(p, x)[0], p)[1](d)[0])


def boxed_params(model):
    one = Tokens(*[jnp.zeros((1, 1), jnp.int32)] * 3)
    init = functools.partial(model.init, method=lambda m, x: m.logits(m(x).hidden))
    return jax.eval_shape(init, jax.random.key(0), one)["params"]


@pytest.fixture(scope="module")
def subject(rules_on):
    """(variant, **changes) -> its Subject, made once."""

    @functools.cache
    def make(name, changes=()):
        return Subject(Config(**{**SIZES, **VARIANTS[name], **dict(changes)}), rules_on())

    return lambda name, **changes: make(name, tuple(changes.items()))


@pytest.fixture
def rows(pack):
    """(rows of segment lengths, ...) -> Tokens [3, LENGTH]."""
    return lambda *segments: pack(segments, length=LENGTH, vocab_size=VOCAB)


# ---- as published ----


def test_logits_and_pooled_output_are_those_of_the_published_bert(subject, rows):
    """A pair of sentences, and rows with padding."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    s = subject("bert")
    c, p = s.config, s.params
    module = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.embed_dim,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            intermediate_size=c.mlp_size,
            max_position_embeddings=c.max_length,
            type_vocab_size=c.num_types,
            layer_norm_eps=c.norm_eps,
        )
    )
    at = "bert.embeddings"
    parts = {
        f"{at}.word_embeddings": p["embedding"],
        f"{at}.position_embeddings": p["position"],
        f"{at}.token_type_embeddings": p["type"],
        f"{at}.LayerNorm": torch_norm(p["embedding_norm"]),
        "bert.pooler.dense": torch_linear(p["pooler"]),
        "cls.predictions.transform.dense": torch_linear(p["transform"]),
        "cls.predictions.transform.LayerNorm": torch_norm(p["transform_norm"]),
        "cls.predictions": {"bias": p["logit_bias"]},
    }
    for i in range(c.num_layers):
        at, own = f"bert.encoder.layer.{i}", jax.tree.map(lambda x, i=i: x[i], p["layers"])
        parts |= {
            f"{at}.attention.self.{n}": torch_linear(own["attention"][n])
            for n in ("query", "key", "value")
        }
        parts |= {
            f"{at}.attention.output.dense": torch_linear(own["attention"]["out"], 2),
            f"{at}.attention.output.LayerNorm": torch_norm(own["attention_norm"]),
            f"{at}.intermediate.dense": torch_linear(own["mlp"]["up"]),
            f"{at}.output.dense": torch_linear(own["mlp"]["down"]),
            f"{at}.output.LayerNorm": torch_norm(own["mlp_norm"]),
        }
    tied = [f"cls.predictions.decoder.{name}" for name in ("weight", "bias")]
    rest = [*tied, "cls.seq_relationship.weight", "cls.seq_relationship.bias"]
    module = load_torch(module, parts, rest=rest)
    tokens = rows([12], [9], [4])
    types = (tokens.positions >= 5).astype(np.int32)
    with torch.no_grad():
        ids, seen, kinds = (torch.tensor(x) for x in (tokens.ids, tokens.segments, types))
        inner = module.bert(ids, attention_mask=seen, token_type_ids=kinds)
        expected = module.cls.predictions(inner.last_hidden_state).numpy()
    logits, pooled = s.run(p, dataclasses.replace(tokens, types=types))
    scored, size = tokens.segments != 0, 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(logits[scored], expected[scored], atol=size, rtol=0)
    np.testing.assert_allclose(pooled[:, 0], inner.pooler_output.numpy(), atol=2e-5, rtol=0)


# ---- who sees whom ----


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_sees_all_of_its_segment_and_nothing_else(subject, rows, name):
    s = subject(name)
    tokens = rows([5, 6], [12], [3, 3, 3])
    before = s.logits(s.params, tokens)
    for place in (0, 4, 7):
        ids = tokens.ids.copy()
        ids[0, place] ^= 1
        changed = np.any(s.logits(s.params, dataclasses.replace(tokens, ids=ids)) != before, -1)
        expected = np.zeros_like(changed)
        expected[0] = tokens.segments[0] == tokens.segments[0, place]
        np.testing.assert_array_equal(changed & (tokens.segments != 0), expected)


def test_windows_reach_as_far_after_a_token_as_before(subject, rows):
    s = subject("modernbert", layer_pattern=("local",))
    tokens = rows([12], [12], [12])
    ids = tokens.ids.copy()
    ids[0, 6] ^= 1
    before, after = (s.logits(s.params, t) for t in (tokens, dataclasses.replace(tokens, ids=ids)))
    changed = np.flatnonzero(np.any(before[0] != after[0], -1))
    np.testing.assert_array_equal(changed, np.arange(2, 11))  # two layers of two either way


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_are_the_documents_alone(subject, rows, name):
    s = subject(name)
    together, alone = rows([5, 7], [12], [12]), rows([5], [7], [12])
    alone.ids[0, :5], alone.ids[1, :7] = together.ids[0, :5], together.ids[0, 5:]
    (packed, pooled), (separate, pooled_alone) = (s.run(s.params, t) for t in (together, alone))
    size = 2e-6 * np.abs(packed).max()
    np.testing.assert_allclose(packed[0, :5], separate[0, :5], atol=size, rtol=0)
    np.testing.assert_allclose(packed[0, 5:], separate[1, :7], atol=size, rtol=0)
    if pooled is not None:
        np.testing.assert_allclose(pooled[0, :5], pooled_alone[0, :5], atol=1e-6)
        np.testing.assert_allclose(pooled[0, 5:], pooled_alone[1, :7], atol=1e-6)
        assert np.all(np.ptp(np.asarray(pooled)[0, :5], axis=0) == 0)


def test_without_types_all_tokens_are_of_the_first(subject, rows):
    s, tokens = subject("bert"), rows([12], [5, 7], [3])
    zeros = dataclasses.replace(tokens, types=np.zeros_like(tokens.ids))
    ones = dataclasses.replace(tokens, types=np.ones_like(tokens.ids))
    none, first, second = (s.logits(s.params, t) for t in (tokens, zeros, ones))
    np.testing.assert_array_equal(none, first)
    assert np.abs(none - second).max() > 1e-2
    untyped = subject("relative", num_types=0)
    with pytest.raises(ValueError, match=r"num_types \(0\) must count the types"):
        untyped.logits(untyped.params, ones)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_but_the_pooler_has_a_gradient(subject, rows, name):
    s, tokens = subject(name), rows([12], [5, 7], [3, 3, 6])
    typed = (
        dataclasses.replace(tokens, types=tokens.positions % 2) if s.config.num_types else tokens
    )
    d = np.random.default_rng(0).normal(size=(3, LENGTH, VOCAB)).astype(np.float32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(s.pull(s.params, typed, d)):
        name = jax.tree_util.keystr(path)
        layers = np.abs(leaf).reshape(leaf.shape[0] if "layers" in name else 1, -1)
        assert np.isfinite(layers).all()
        assert np.all((layers.max(-1) > 0) == ("pooler" not in name)), name


# ---- what is said of it elsewhere ----


@pytest.mark.parametrize("name", VARIANTS)
def test_formulas_count_what_the_model_has_and_does(subject, rows, name):
    s = subject(name)
    assert flops.parameters(s.config).total == sum(x.size for x in jax.tree.leaves(s.params))
    if s.config.window is None:  # one of two branches runs
        from test_flops import product_flops

        def logits(params, tokens):
            return s.model.apply(
                {"params": params}, tokens, method=lambda m, x: m.logits(m(x).hidden)
            )

        expected = flops.flops_per_token(s.config, LENGTH, training=False, full_square=True)
        run = jax.make_jaxpr(logits)(s.params, rows([12], [12], [12]))
        assert product_flops(run.jaxpr) == pytest.approx(3 * LENGTH * expected, rel=1e-12)
        # every token sees all others
        assert flops.flops_per_token(s.config, LENGTH, training=False) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_it_lists_what_its_layers_call_attention_with(subject, rows, monkeypatch, name):
    s, called = subject(name), []

    def attend(q, k, v, mask, *, rules, sequence_parallel, dropout, dropout_rng, bias, **options):
        options |= {"window": mask.window, "bias": bias is not None, "causal": mask.causal}
        called.append(Heads(q.shape[1], k.shape[1], q.shape[3], **options))
        return q

    monkeypatch.setattr(attention, "attend", attend)
    jax.eval_shape(lambda p: s.model.apply({"params": p}, rows([12], [12], [12])), s.params)
    assert set(called) == {scores.heads for scores in s.config.attention_scores}


def test_what_an_encoder_cannot_do_is_refused(subject, rows, rules_on):
    s, tokens = subject("bert"), rows([12], [12], [12])
    with pytest.raises(ValueError, match="encoder cannot generate"):
        s.model.init_cache(1, 8)
    with pytest.raises(ValueError, match="takes no encoder tokens"):
        s.model.apply({"params": s.params}, tokens, encoder=tokens)
    other = subject("relative")
    with pytest.raises(ValueError, match=r"pooler_dim \(0\) must be positive"):
        other.model.apply(
            {"params": other.params}, np.zeros((3, LENGTH, 16), np.float32), tokens, method="pooled"
        )
    with pytest.raises(ValueError, match=r"config.mesh.stage \(2\) must be 1"):
        encoder.build(Config(**SIZES), rules_on(stage=2))
    with pytest.raises(ValueError, match=r"config.model.num_types \(-1\) must be at least 0"):
        Config(**{**SIZES, "num_types": -1}).check(8)


@pytest.mark.parametrize("parallel", ["gather", "ring"])
def test_a_sharded_length_is_the_whole_one(subject, rows, rules_on, parallel):
    """Either way to reach the keys, without a future to hide."""
    s = subject("bert")
    config = dataclasses.replace(s.config, sequence_parallel=parallel)
    sharded = encoder.build(config, rules_on(sequence=4))
    tokens = rows([5, 6], [12], [3, 3, 3])
    found = jax.jit(lambda p, x: sharded.apply({"params": p}, x, method=both))(s.params, tokens)
    scored = tokens.segments != 0
    for a, b in zip(found, s.run(s.params, tokens), strict=True):
        a, b = np.asarray(a)[scored], np.asarray(b)[scored]
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max(), rtol=0)


def test_splash_is_the_equation_without_a_mask(rules_on, pack):
    """With two segments and padding, in rows that the kernel can cut into blocks."""
    config = Config(**{**SIZES, "max_length": 256, "num_layers": 1})
    tokens = pack([[100, 120], [256]], length=256, vocab_size=VOCAB)
    models = [
        encoder.build(dataclasses.replace(config, attention_kernel=kernel), rules_on())
        for kernel in ("xla", "splash")
    ]
    params = random_params(boxed_params(models[0]))
    a, b = (np.asarray(jax.jit(m.apply)({"params": params}, tokens).hidden) for m in models)
    scored = tokens.segments != 0
    np.testing.assert_allclose(a[scored], b[scored], atol=2e-5 * np.abs(a[scored]).max(), rtol=0)
