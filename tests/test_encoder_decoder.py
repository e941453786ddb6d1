"""The encoder-decoder as published, and what the decoder's tests don't say: what the encoder and
cross-attention let through.

Measured, for logits up to 20: 2e-5 from transformers' T5, 1e-5 from segments alone and from cached
decoding.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import some
from parameters import load_torch, random_params, torch_linear, torch_norm

from lm.layers import attention
from lm.layers.attention_scores import Heads
from lm.models import encoder_decoder, flops
from lm.models.encoder_decoder import Config
from lm.types import Tokens

LENGTH, SOURCE, VOCAB = 10, 12, 32
SIZES = {"vocab_size": VOCAB, "max_length": 16, "embed_dim": 16, "num_heads": 4, "mlp_dim": 24}
DEPTHS = {"num_layers": 2, "num_encoder_layers": 3}
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_bias": True}
T5 = {
    "positions": "relative",
    "relative_buckets": 8,
    "relative_max_distance": 10,
    "head_dim": 6,
    "query_scale": 1.0,
    "init_std": None,
    **DEPTHS,
}
VARIANTS = {
    "t5": {**T5, "activation": "relu", "logit_scale": 16**-0.5},
    "t5_v1_1": {**T5, "activation": "geglu_tanh", "tie_embeddings": False},
    "original": {
        "positions": "sinusoidal",
        "norm": "layer",
        "norm_placement": "post",
        "activation": "relu",
        "embed_scale": 4.0,
        "num_layers": 2,
        **BIASES,
    },
    "modern": {
        "num_kv_heads": 2,
        "qk_norm": True,
        "norm_placement": "both",
        "activation": "swiglu",
        "layer_pattern": ("local", "global"),
        "window": 3,
        **DEPTHS,
    },
    "learned": {"positions": "learned", "attention_softcap": 2.0, "num_layers": 2},
}


def forward(model, inputs, encoder):
    return model.logits(model(inputs, encoder=encoder).hidden)


class Subject:
    """A model with parameters and its compiled functions, of [2, LENGTH] and [2, SOURCE]."""

    def __init__(self, config, rules):
        config.check(LENGTH)
        self.config, self.model = config, encoder_decoder.build(config, rules)
        self.params = random_params(boxed_params(self.model))
        self.logits = jax.jit(
            lambda p, inputs, encoder: self.model.apply(
                {"params": p}, inputs, encoder, method=forward
            )
        )
        self.decode = jax.jit(self._decode)

    def _decode(self, params, inputs, encoder, cache):
        def run(model):
            output = model(inputs, encoder=encoder, cache=cache)
            return model.logits(output.hidden), output.cache

        return nn.apply(run, self.model)({"params": params})

    @functools.cached_property
    def pull(self):
        """(params, inputs, encoder, d logits) -> d params."""

        def run(p, inputs, encoder, d):
            return jax.vjp(lambda p: self.logits(p, inputs, encoder), p)[1](d)[0]

        return jax.jit(run)


def boxed_params(model):
    one = Tokens(*[jnp.zeros((1, 1), jnp.int32)] * 3)
    init = functools.partial(model.init, method=forward)
    return jax.eval_shape(init, jax.random.key(0), one, one)["params"]


@pytest.fixture(scope="module")
def subject(rules_on):
    """(variant, **changes) -> its Subject, made once."""

    @functools.cache
    def make(name, changes=()):
        return Subject(Config(**{**SIZES, **VARIANTS[name], **dict(changes)}), rules_on())

    return lambda name, **changes: make(name, tuple(changes.items()))


@pytest.fixture
def streams(pack):
    """(segments of the decoder's rows, of the encoder's) -> both."""

    def make(inputs, encoder):
        sizes = ({"length": LENGTH, "seed": 1}, {"length": SOURCE, "seed": 2})
        return tuple(
            pack(rows, vocab_size=VOCAB, **size)
            for rows, size in zip((inputs, encoder), sizes, strict=True)
        )

    return make


def padded_left(tokens):
    """The same rows with their padding first."""
    sizes = (tokens.segments != 0).sum(-1)
    order = [np.roll(np.arange(tokens.ids.shape[1]), -n) for n in sizes]
    return jax.tree.map(lambda x: np.take_along_axis(x, np.stack(order), 1), tokens)


# ---- as published ----


def t5_of_transformers(config, params):
    transformers = pytest.importorskip("transformers")
    c = config
    module = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=c.vocab_size,
            d_model=c.embed_dim,
            d_kv=c.head_size,
            d_ff=c.mlp_size,
            num_layers=c.encoder.num_layers,
            num_decoder_layers=c.num_layers,
            num_heads=c.num_heads,
            relative_attention_num_buckets=c.relative_buckets,
            relative_attention_max_distance=c.relative_max_distance,
            feed_forward_proj="relu" if c.activation == "relu" else "gated-gelu",
            tie_word_embeddings=c.tie_embeddings,
            decoder_start_token_id=0,
        )
    )
    if not c.tie_embeddings:  # transformers 5 makes every new T5 a tied one
        table = module.lm_head.weight
        module.lm_head.weight = type(table)(table.detach().clone())
    parts = {"shared": params["embedding"]}
    parts |= {} if c.tie_embeddings else {"lm_head": torch_linear(params["head"])}
    rest = [f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")] + ["lm_head.weight"]

    def heads(p):
        names = {"query": "q", "key": "k", "value": "v"}
        return {names[n]: torch_linear(p[n]) for n in names} | {"o": torch_linear(p["out"], 2)}

    for stack, depth in (("encoder", c.encoder.num_layers), ("decoder", c.num_layers)):
        own = params[stack]
        relative = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        parts |= {relative: own["relative"], f"{stack}.final_layer_norm": torch_norm(own["norm"])}
        for i in range(depth):
            p = jax.tree.map(lambda x, i=i: x[i], own["layers"])
            mlp = f"{stack}.block.{i}.layer.{1 if stack == 'encoder' else 2}"
            names = {"up": "wi", "down": "wo"}
            if "gate" in p["mlp"]:
                names = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
            parts |= {
                f"{mlp}.DenseReluDense.{name}": torch_linear(p["mlp"][n])
                for n, name in names.items()
            }
            parts[f"{mlp}.layer_norm"] = torch_norm(p["mlp_norm"])
            kinds = [("attention", "SelfAttention"), ("cross_attention", "EncDecAttention")]
            for place, (name, theirs) in enumerate(kinds if stack == "decoder" else kinds[:1]):
                at = f"{stack}.block.{i}.layer.{place}"
                parts |= {f"{at}.{theirs}.{n}": w for n, w in heads(p[name]).items()}
                parts[f"{at}.layer_norm"] = torch_norm(p[f"{name}_norm"])
    return load_torch(module, parts, rest=rest)


@pytest.mark.parametrize("name", ["t5", "t5_v1_1"])
def test_logits_are_those_of_the_published_t5(subject, streams, name):
    """Distances up to the last bucket, and a source with padding."""
    torch = pytest.importorskip("torch")
    s = subject(name)
    inputs, encoder = streams([[10], [10]], [[12], [7]])
    theirs = t5_of_transformers(s.config, s.params)
    ids, source, seen = (torch.tensor(x) for x in (inputs.ids, encoder.ids, encoder.segments))
    with torch.no_grad():
        expected = theirs(input_ids=source, attention_mask=seen, decoder_input_ids=ids).logits
    found = np.asarray(s.logits(s.params, inputs, encoder))
    expected = expected.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def test_the_transformer_of_2017_is_its_equations(subject, streams):
    """In numpy, from section 3 of the paper: one layer after the other, head by head."""
    s = subject("original")
    c, p = s.config, jax.tree.map(lambda x: x.astype(np.float64), s.params)
    inputs, encoder = streams([[10], [6]], [[12], [5]])

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * p["scale"] + p["bias"]

    def attend(x, y, p, hide):
        def heads(name, z):
            return np.einsum("td,dnh->nth", z, p[name]["weight"]) + p[name]["bias"][:, None]

        scores = heads("query", x) @ heads("key", y).swapaxes(1, 2) / np.sqrt(c.head_size)
        weights = np.exp(np.where(hide, -np.inf, scores))
        weights /= weights.sum(-1, keepdims=True)
        out = weights @ heads("value", y)
        return np.einsum("nth,nhd->td", out, p["out"]["weight"]) + p["out"]["bias"]

    def mlp(x, p):
        h = np.maximum(x @ p["up"]["weight"] + p["up"]["bias"], 0)
        return h @ p["down"]["weight"] + p["down"]["bias"]

    def embed(ids):
        rates = 1e4 ** -(np.arange(8) / 7)
        angles = np.arange(len(ids))[:, None] * rates
        table = p["embedding"]["weight"]
        return table[ids] * 4 + np.concatenate([np.sin(angles), np.cos(angles)], -1)

    def layers(name):
        return [jax.tree.map(lambda w, i=i: w[i], p[name]["layers"]) for i in range(c.num_layers)]

    for row, (length, source) in enumerate([(10, 12), (6, 5)]):
        y, x = embed(encoder.ids[row, :source]), embed(inputs.ids[row, :length])
        for own in layers("encoder"):
            y = norm(y + attend(y, y, own["attention"], False), own["attention_norm"])
            y = norm(y + mlp(y, own["mlp"]), own["mlp_norm"])
        future = np.triu(np.ones((length, length), bool), 1)
        for own in layers("decoder"):
            x = norm(x + attend(x, x, own["attention"], future), own["attention_norm"])
            a = attend(x, y, own["cross_attention"], False)
            x = norm(x + a, own["cross_attention_norm"])
            x = norm(x + mlp(x, own["mlp"]), own["mlp_norm"])
        expected = x @ p["embedding"]["weight"].T
        found = s.logits(s.params, inputs, encoder)[row, :length]
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


# ---- who sees whom ----


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_read_the_encoder_of_their_own_segment_alone(subject, streams, name):
    """The encoder reads all of its tokens, the decoder only those before."""
    s = subject(name)
    inputs, encoder = streams([[4, 5], [10]], [[5, 7], [12]])
    before = np.asarray(s.logits(s.params, inputs, encoder))
    # with windows, a token at the end sees another at the start through cross-attention alone
    for stream, tokens in (("encoder", encoder), ("inputs", inputs)):
        for place in (0, tokens.ids.shape[1] // 2 - 1):
            ids = tokens.ids.copy()
            ids[0, place] ^= 1
            both = {"inputs": inputs, "encoder": encoder}
            both[stream] = dataclasses.replace(tokens, ids=ids)
            after = np.asarray(s.logits(s.params, *both.values()))
            changed = np.any(before != after, axis=-1) & (inputs.segments != 0)
            may = inputs.segments == tokens.segments[0, place]
            may[1] = False
            if stream == "inputs":
                may &= np.arange(LENGTH) >= place
                assert changed[0, place]
                assert not np.any(changed & ~may)
            else:
                np.testing.assert_array_equal(changed, may)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_pairs_are_the_pairs_alone(subject, streams, name):
    s = subject(name)
    inputs, encoder = streams([[4, 5], [10]], [[5, 6], [12]])
    alone = streams([[4], [5]], [[5], [6]])
    for tokens, single, cut, sizes in (
        (inputs, alone[0], 4, (4, 5)),
        (encoder, alone[1], 5, (5, 6)),
    ):
        single.ids[0, : sizes[0]] = tokens.ids[0, :cut]
        single.ids[1, : sizes[1]] = tokens.ids[0, cut : sum(sizes)]
    packed, separate = s.logits(s.params, inputs, encoder)[0], s.logits(s.params, *alone)
    size = 2e-6 * np.abs(packed).max()
    np.testing.assert_allclose(packed[:4], separate[0, :4], atol=size, rtol=0)
    np.testing.assert_allclose(packed[4:9], separate[1, :5], atol=size, rtol=0)


def test_a_segment_without_a_source_reads_nothing_of_others(subject, streams):
    s = subject("t5")
    inputs, encoder = streams([[4, 5], [10]], [[12], [12]])
    other = dataclasses.replace(encoder, ids=encoder.ids ^ 1)
    a, b = (np.asarray(s.logits(s.params, inputs, e)) for e in (encoder, other))
    np.testing.assert_array_equal(a[0, 4:9], b[0, 4:9])
    assert np.all(np.any(a[0, :4] != b[0, :4], axis=-1))


def test_without_positions_the_order_of_the_source_changes_nothing(subject, streams):
    s = subject("learned", positions="none")
    inputs, encoder = streams([[10], [10]], [[12], [12]])
    shuffled = dataclasses.replace(encoder, ids=encoder.ids[:, ::-1].copy())
    a, b = (np.asarray(s.logits(s.params, inputs, e)) for e in (encoder, shuffled))
    np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(a).max(), rtol=0)
    ordered = subject("learned")
    a, b = (np.asarray(ordered.logits(ordered.params, inputs, e)) for e in (encoder, shuffled))
    assert np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize("name", some(VARIANTS, "t5", "modern"))
def test_every_parameter_has_a_gradient(subject, streams, name):
    s = subject(name)
    d = np.random.default_rng(0).normal(size=(2, LENGTH, VOCAB)).astype(np.float32)
    inputs, encoder = streams([[4, 6], [10]], [[5, 7], [12]])
    gradient = s.pull(s.params, inputs, encoder, d)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        layers = np.abs(leaf).reshape(leaf.shape[0] if "layers" in name else 1, -1)
        assert np.isfinite(layers).all() and np.all(layers.max(-1) > 0), name


# ---- decoding ----


@pytest.mark.parametrize("name", some(VARIANTS, "t5", "modern"))
def test_cached_decode_is_the_whole_forward_pass(subject, streams, name):
    """A piece, then tokens; rows whose prompts are padded on the left, and their sources too."""
    s = subject(name)
    inputs, encoder = (padded_left(x) for x in streams([[10], [8]], [[12], [7]]))
    expected = np.asarray(s.logits(s.params, inputs, encoder))
    cache, found, start = s.model.init_cache(2, LENGTH), [], 0
    for size in [4, *[1] * 6]:
        piece = jax.tree.map(lambda x, a=start, b=start + size: x[:, a:b], inputs)
        logits, cache = s.decode(s.params, piece, None if start else encoder, cache)
        found.append(np.asarray(logits))
        start += size
    scored = inputs.segments != 0
    found = np.concatenate(found, axis=1)[scored]
    np.testing.assert_allclose(found, expected[scored], atol=2e-6 * np.abs(expected).max(), rtol=0)
    kept = cache["memory"].encoded["key"]
    assert kept.shape == (s.config.num_layers, 2, s.config.kv_heads, SOURCE, s.config.head_size)


def test_a_cache_takes_one_encoder_in_its_first_call(subject, streams):
    s = subject("t5")
    inputs, encoder = streams([[10], [10]], [[12], [12]])
    empty = s.model.init_cache(2, 20)
    with pytest.raises(ValueError, match="needs encoder tokens, in the first call"):
        s.decode(s.params, inputs, None, empty)
    _, cache = s.decode(s.params, inputs, encoder, empty)
    with pytest.raises(ValueError, match="holds an encoder's tokens already"):
        s.decode(s.params, inputs, encoder, cache)
    with pytest.raises(ValueError, match="needs encoder tokens"):
        s.logits(s.params, inputs, None)


# ---- what is said of it elsewhere ----


def test_scores_of_untrained_t5_have_deviation_one_without_a_scale(rules_on, streams):
    """Its queries start smaller by the square root of the head's width."""
    sizes = {"embed_dim": 256, "head_dim": 64, "num_heads": 4, "norm_placement": "pre"}
    model = encoder_decoder.build(Config(**{**SIZES, **VARIANTS["t5"], **sizes}), rules_on())
    inputs, encoder = streams([[10], [10]], [[12], [12]])

    @jax.jit
    def sown():
        params = model.init(jax.random.key(0), inputs, encoder, method=forward)["params"]
        variables = {"params": nn.meta.unbox(params)}
        return model.apply(variables, inputs, encoder=encoder, mutable=["intermediates"])[1]

    kept = sown()["intermediates"]
    for stack, name in (("encoder", "attention"), ("decoder", "cross_attention")):
        [q], [k] = (kept[stack]["layers"][name][what] for what in ("queries", "keys"))
        assert np.std(q[0] @ np.swapaxes(k[0], -1, -2)) == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize("name", VARIANTS)
def test_formulas_count_what_the_model_has_and_does(subject, streams, name):
    s = subject(name)
    count = flops.parameters(s.config)
    assert count.total == sum(x.size for x in jax.tree.leaves(s.params))
    if s.config.window is None:  # one of two branches runs, and full squares are computed anyway
        from test_flops import product_flops

        inputs, encoder = streams([[10], [10]], [[12], [12]])
        run = jax.make_jaxpr(s.logits)(s.params, inputs, encoder)
        expected = flops.flops_per_token(s.config, LENGTH, SOURCE, training=False, full_square=True)
        assert product_flops(run.jaxpr) == pytest.approx(2 * LENGTH * expected, rel=1e-12)


@pytest.mark.parametrize("name", ["t5", "modern"])
def test_it_lists_what_its_layers_call_attention_with(subject, streams, monkeypatch, name):
    s, called = subject(name), []

    def attend(q, k, v, mask, *, rules, sequence_parallel, dropout, dropout_rng, bias, **options):
        options |= {"window": mask.window, "bias": bias is not None, "causal": mask.causal}
        called.append(Heads(q.shape[1], k.shape[1], q.shape[3], **options))
        return q

    monkeypatch.setattr(attention, "attend", attend)
    inputs, encoder = streams([[10], [10]], [[12], [12]])
    jax.eval_shape(lambda p: s.model.apply({"params": p}, inputs, encoder=encoder), s.params)
    assert set(called) == {scores.heads for scores in s.config.attention_scores}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_encoder_layers": 0}, r"num_encoder_layers \(0\) must be at least 1"),
        (
            {"scan_unroll": 2, "num_encoder_layers": 1},
            r"scan_unroll \(2\) .*num_encoder_layers \(1\)",
        ),
        ({"parallel_block": True}, r"parallel_block must be False"),
        ({"logit_scale": 0.0}, r"logit_scale \(0.0\) must be above 0"),
        ({"embed_init_std": -1.0}, r"embed_init_std \(-1.0\) must be above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_path_and_numbers(changes, message):
    with pytest.raises(ValueError, match=r"config\.model\." + message):
        Config(**{**SIZES, "num_layers": 2, **changes}).check(8)


def test_stages_are_refused(rules_on):
    with pytest.raises(ValueError, match=r"config.mesh.stage \(2\) must be 1"):
        encoder_decoder.build(Config(**SIZES), rules_on(stage=2))
