"""Attention weights and token losses are those of the model; tokens and heads are named rightly."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from lm.interpret import attention_maps, markup, token_losses
from lm.tokenizers.tokenizer import ByteTokenizer
from lm.training.evaluation import evaluate
from lm.types import Tokens

VARIANTS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "local_global": {"num_layers": 3, "layer_pattern": ("local", "global", "local"), "window": 4},
    "alibi": {"positions": "alibi"},
    "relative": {"positions": "relative"},
    "scaled": {"attention_softcap": 2.0, "query_scale": 1.7, "qk_norm": True},
    "remat": {"remat": "full"},
}
ROWS = [(5, 9, 2), (16,)]  # segment lengths; the first row has padding at least


@pytest.fixture(scope="module")
def tokens(pack):
    return pack(ROWS, length=20, vocab_size=264)


def init(model, tokens):
    """Parameters with noise on them: zeros and ones, as biases and norms begin, hide mistakes."""
    init = functools.partial(model.init, method=lambda m, t: m.logits(m(t).hidden))
    params = jax.jit(init)(jax.random.key(0), tokens)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), nn.unbox(params["params"])
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("scaled", "remat", "alibi", "plain")
        else name
        for name in VARIANTS
    ],
)
def test_weights_times_values_are_what_the_layer_computes(name, tiny_decoder, tokens):
    model = tiny_decoder(**VARIANTS[name])
    params = init(model, tokens)
    maps = attention_maps.attention_maps(model, params, tokens)

    def of_interest(module, _):
        return module.name in ("value", "out")

    _, seen = model.apply(
        {"params": params}, tokens, capture_intermediates=of_interest, mutable=["intermediates"]
    )
    layers = seen["intermediates"]["layers"]["attention"]
    [v], [expected] = (
        layers[n]["__call__"] for n in ("value", "out")
    )  # [L, B, T, K, H], [L, B, T, D]
    v = np.repeat(v, maps.shape[2] // v.shape[3], axis=3)
    out = params["layers"]["attention"]["out"]["weight"]  # [L, N, H, D]
    found = np.einsum("lbnts,lbsnh,lnhd->lbtd", maps, v, out)
    real = tokens.segments != 0  # what padding computes is nobody's business
    np.testing.assert_allclose(found[:, real], expected[:, real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_sum_to_one_over_the_past_of_the_document(name, tiny_decoder, tokens):
    model = tiny_decoder(**VARIANTS[name])
    maps = np.asarray(attention_maps.attention_maps(model, init(model, tokens), tokens))
    c = model.config
    assert maps.shape == (c.num_layers, 2, c.num_heads, 20, 20) and maps.dtype == np.float32
    segments = tokens.segments
    sums = np.broadcast_to((segments != 0)[None, :, None], maps.shape[:-1])
    np.testing.assert_allclose(maps.sum(-1), sums, atol=1e-6)
    places = np.arange(20)
    past = places[:, None] >= places
    seen = past & (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, :, None]
    for layer, kind in enumerate(c.layer_kinds):
        near = np.abs(places[:, None] - places) < (c.window if kind == "local" else 99)
        assert ((maps[layer] > 0) == (seen & near)[:, None]).all()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_token_losses_add_up_to_the_evaluation(make_experiment, num_devices):
    changes = {"data.validation": ("synthetic:markov:21:7",)}  # the last batch has empty rows
    experiment = make_experiment(changes, data=num_devices)
    params = experiment.init_state().params
    batch, losses = token_losses.held_out(experiment, params, num_batches=100)
    assert batch.targets.shape == losses.nll.shape == (32, 32)
    [expected] = evaluate(experiment, params).values()
    tokens = batch.weights.sum()
    assert tokens == expected["tokens"] == 21 * 32
    assert (losses.nll * batch.weights).sum() / tokens == pytest.approx(expected["loss"], rel=1e-5)
    hits = ((losses.guesses == batch.targets) * batch.weights).sum() / tokens
    assert hits == pytest.approx(expected["accuracy"], rel=1e-6)


def test_confidence_is_the_probability_of_the_guess(make_experiment):
    experiment = make_experiment()
    params = experiment.init_state().params
    batch = experiment.train_data.batch_at(3)
    first = token_losses.token_losses(experiment.model, params, batch)
    second = token_losses.token_losses(
        experiment.model, params, batch.replace(targets=first.guesses)
    )
    np.testing.assert_allclose(np.exp(-second.nll), first.confidence, rtol=1e-5)
    assert (first.nll >= second.nll).all()


def test_held_out_needs_a_validation_source(make_experiment):
    with pytest.raises(ValueError, match=r"config\.data\.validation is empty"):
        token_losses.held_out(make_experiment(), {})


def test_cut_is_the_beginning_of_a_row(tokens):
    short = attention_maps.cut(tokens, row=1, length=7)
    assert isinstance(short, Tokens) and short.ids.tolist() == [tokens.ids[1, :7].tolist()]
    assert short.segments.shape == short.positions.shape == (1, 7)


def test_most_packed_finds_the_row_with_the_most_documents(make_experiment):
    data = make_experiment().train_data
    step, row = attention_maps.most_packed(data, num_steps=20)
    counts = [[len(r.documents) for r in data.explain_batch(s, ByteTokenizer())] for s in range(20)]
    assert counts[step][row] == np.max(counts) > 1


def test_heads_are_ordered_by_how_far_they_look():
    length = 6
    back = [np.eye(length, k=-distance) for distance in (0, 1, 4)]
    for distance, weights in enumerate(back):
        weights[: (0, 1, 4)[distance], 0] = 1  # those with nothing that far back look at the first
    maps = np.array([[back[2], back[0]], [back[1], back[1]]])  # [L, N, T, S]
    distances = attention_maps.mean_distances(maps)
    np.testing.assert_allclose(distances, [[(0 + 1 + 2 + 3 + 4 + 4) / 6, 0], [5 / 6, 5 / 6]])
    order = attention_maps.nearest_to_farthest(maps)
    assert order[0] == (0, 1) and order[-1] == (0, 0) and len(set(order)) == 4
    assert attention_maps.nearest_to_farthest(maps, 2) == [(0, 1), (0, 0)]


def test_token_texts_join_to_the_text_with_special_tokens_named():
    tokenizer = ByteTokenizer()
    ids = [tokenizer.bos_id, *tokenizer.encode("aé↵"), tokenizer.eos_id]
    texts = markup.token_texts(tokenizer, np.array(ids))
    assert texts == ["⟨bos⟩", "a", "", "é", "", "", "↵", "⟨eos⟩"]
    assert markup.token_text(tokenizer, ids[2]) == "\N{REPLACEMENT CHARACTER}"
