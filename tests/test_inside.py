"""Between the layers: the lens ends at the model's answer, and attributions add up."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.interpret import logit_lens
from lm.types import Tokens

LENGTH = 12


@pytest.fixture(scope="module")
def model(tiny_decoder):
    return tiny_decoder(num_layers=3)


@pytest.fixture(scope="module")
def tokens(model):
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, LENGTH), np.int32)
    return Tokens(ids, np.ones_like(ids), np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1)))


@pytest.fixture(scope="module")
def params(model, tokens):
    init = functools.partial(model.init, method=lambda m, t: m.logits(m(t).hidden))
    return nn.meta.unbox(jax.jit(init)(jax.random.key(0), tokens)["params"])


def test_the_lens_after_the_last_layer_is_the_models_answer(model, params, tokens):
    targets = np.roll(tokens.ids, -1, axis=1)
    lens = logit_lens.logit_lens(model, params, tokens, targets)
    hidden = model.apply({"params": params}, tokens).hidden
    log_p = jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))
    assert lens.guesses.shape == (3, 2, LENGTH)
    np.testing.assert_array_equal(lens.guesses[-1], jnp.argmax(log_p, axis=-1))
    expected = -np.take_along_axis(np.asarray(log_p), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(lens.nll[-1], expected, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(lens.nll[0], lens.nll[-1])


def test_updates_are_what_layers_add(model, params, tokens):
    hidden = np.asarray(logit_lens.residual_streams(model, params, tokens))
    norms = logit_lens.residual_norms(model, params, tokens)
    added = np.sqrt(np.mean((hidden[2] - hidden[1]) ** 2, axis=-1))
    np.testing.assert_allclose(norms.update[2], added, rtol=1e-5)
    np.testing.assert_allclose(norms.stream[0], np.sqrt(np.mean(hidden[0] ** 2, -1)), rtol=1e-5)


def test_attributions_sum_to_what_the_exchange_of_tokens_gains(model, params, tokens):
    target, baseline = np.array([3, 5], np.int32), np.full_like(tokens.ids, 7)
    baseline[:, :2] = tokens.ids[:, :2]  # tokens that are not exchanged

    def log_p(ids):
        hidden = model.apply({"params": params}, tokens.replace(ids=ids)).hidden[:, -1:]
        logits = model.apply({"params": params}, hidden, method="logits")[:, 0]
        return jax.nn.log_softmax(logits)[np.arange(2), target]

    found = logit_lens.attributions(model, params, tokens, target, baseline, num_steps=256)
    gained = log_p(tokens.ids) - log_p(baseline)
    np.testing.assert_allclose(found.sum(axis=1), gained, rtol=0.01, atol=0.01)
    assert not np.any(found[:, :2]) and np.all(found[:, 2:])
