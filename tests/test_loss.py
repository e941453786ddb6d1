"""The chunked loss against the textbook one, written out with automatic differentiation."""

import functools
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import models
from lm.config.schema import LossConfig
from lm.kernels.chunking import num_chunks
from lm.layers.cross_entropy import lm_loss, over_vocabulary
from lm.layers.embedding import Embedding
from lm.types import Batch, Output, Tokens

BATCH, LENGTH, VOCAB = 2, 12, 40
RNG = jax.random.key(0)


def plain_loss(model, params, batch, config):
    """(objective, sums) from all the logits at once."""
    output = model.apply({"params": params}, batch.inputs)
    logits = model.apply({"params": params}, output.hidden, method="logits")
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nll = -jnp.sum(jax.nn.one_hot(batch.targets, logits.shape[-1]) * log_p, axis=-1)
    smooth = config.label_smoothing
    loss = (1 - smooth) * nll - smooth * jnp.mean(log_p, axis=-1)
    loss += config.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    w = batch.weights
    hit = jnp.argmax(logits, axis=-1) == batch.targets
    sums = {"objective": loss, "loss": nll, "accuracy": hit}
    sums = {name: jnp.sum(jnp.where(w > 0, value * w, 0)) for name, value in sums.items()}
    return sums["objective"], sums | {"tokens": jnp.sum(w)}


def both(model, params, batch, config):
    """((sums, gradients) of `lm_loss`, those of `plain_loss`)."""

    def ours(params):
        return lm_loss(model, params, batch, RNG, train=False, config=config)

    results = []
    for fn in (ours, lambda p: plain_loss(model, p, batch, config)):
        (objective, sums), gradient = jax.jit(jax.value_and_grad(fn, has_aux=True))(params)
        np.testing.assert_array_equal(objective, sums["objective"])
        results.append((sums, gradient))
    return results


def assert_same(results, rtol):
    (sums, gradient), (plain_sums, plain_gradient) = results
    assert sums.keys() == plain_sums.keys()
    for name in sums:
        np.testing.assert_allclose(sums[name], plain_sums[name], rtol=rtol, err_msg=name)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(plain_gradient), strict=True
    ):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        scale = np.abs(b).max()
        assert scale > 0
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=rtol * scale, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def setup(tiny_decoder, packed_batch):
    """(**changes of the model) -> (model, params, batch)."""

    @functools.cache
    def make(**changes):
        model = tiny_decoder(vocab_size=VOCAB, num_layers=1, **changes)
        batch = packed_batch(BATCH, LENGTH, VOCAB)
        assert {0.0, 0.25, 1.0, 3.0} == set(batch.weights.ravel().tolist())
        init = jax.jit(lambda rng: model.init(rng, batch.inputs, method=_everything))
        return model, nn.meta.unbox(init(RNG))["params"], batch

    return make


def _everything(model, tokens):
    return model.logits(model(tokens).hidden)


FULL = {"z_loss": 0.01, "label_smoothing": 0.1}


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_chunks_that_are_not_equal_are_the_plain_loss(setup, packed_batch, tie_embeddings):
    """11 places in 4 pieces of 3: the last one is filled up with a place that counts nothing."""
    model, params, _ = setup(tie_embeddings=tie_embeddings)
    batch = packed_batch(BATCH, 11, VOCAB)
    assert num_chunks(3 * BATCH, BATCH, 11) == 4
    assert_same(both(model, params, batch, LossConfig(**FULL, chunk_size=3 * BATCH)), rtol=1e-5)


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize(
    "chunks", [3, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 6))]
)
def test_chunked_loss_is_the_plain_one(setup, chunks, tie_embeddings):
    chunk_size = 0 if chunks == 1 else BATCH * LENGTH // chunks
    assert num_chunks(chunk_size, BATCH, LENGTH) == chunks
    results = both(*setup(tie_embeddings=tie_embeddings), LossConfig(**FULL, chunk_size=chunk_size))
    assert_same(results, rtol=1e-5)


@pytest.mark.parametrize(
    "softcap, smooth, z_loss",
    [
        *((None, 0.0, 0.0), (2.0, 0.0, 0.0), (None, 0.2, 0.0), (None, 0.0, 0.05), (2.0, 0.2, 0.05)),
        *(
            pytest.param(*two, marks=pytest.mark.slow)
            for two in ((2.0, 0.2, 0.0), (2.0, 0.0, 0.05), (None, 0.2, 0.05))
        ),
    ],
)
def test_every_term_has_the_gradient_of_the_plain_loss(setup, softcap, smooth, z_loss):
    config = LossConfig(z_loss, smooth, chunk_size=8)
    assert_same(both(*setup(logit_softcap=softcap), config), rtol=1e-5)


def test_bfloat16_states_give_float32_sums_and_gradients(setup):
    results = both(*setup(dtype="bfloat16"), LossConfig(**FULL, chunk_size=8))
    assert_same(results, rtol=0.02)  # both round the states; bfloat16 keeps 8 bits
    sums, gradient = results[0]
    assert {x.dtype for x in jax.tree.leaves((sums, gradient))} == {jnp.dtype(jnp.float32)}


def test_loss_is_the_numpy_one(setup):
    model, params, batch = setup()
    sums = lm_loss(model, params, batch, RNG, train=False, config=LossConfig(chunk_size=8))[1]
    hidden = model.apply({"params": params}, batch.inputs).hidden
    logits = np.asarray(model.apply({"params": params}, hidden, method="logits"), np.float64)
    loss, hits = 0.0, 0.0
    for b, t in np.ndindex(BATCH, LENGTH):
        row, target, weight = logits[b, t], batch.targets[b, t], float(batch.weights[b, t])
        loss += weight * (np.log(np.exp(row - row.max()).sum()) + row.max() - row[target])
        hits += weight * (row.argmax() == target)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(sums["accuracy"], hits, rtol=1e-6)
    np.testing.assert_allclose(sums["tokens"], batch.weights.sum(), rtol=1e-6)


def sums_of(rules, hidden, table, targets):
    """Sums of bfloat16 states [B, T, D] before a tied table [V, D]."""
    model, params = Stated(rules), {"hidden": hidden, "table": {"weight": table}}
    tokens = Tokens(targets, np.ones_like(targets), np.zeros_like(targets))
    batch = Batch(tokens, targets, np.ones(targets.shape, np.float32))
    run = functools.partial(lm_loss, model, train=False, config=LossConfig(chunk_size=64))
    return jax.jit(lambda: run(params, batch, RNG)[1])()


class Stated(nn.Module):
    """A model by the contract whose hidden states are parameters."""

    rules: object
    config: object = None
    head_params = ("table",)

    def setup(self):
        self.table = Embedding(VOCAB_32K, 64, self.rules, dtype=jnp.bfloat16)

    def __call__(self, inputs, *, encoder=None, cache=None, train=False):
        return Output(hidden=self.get_variable("params", "hidden"))

    def logits(self, hidden):
        return self.table.attend(hidden)


VOCAB_32K = 32_768


@pytest.mark.parametrize("rank", [1, 2])
def test_only_the_best_of_close_logits_is_a_hit_in_bfloat16(rules_on, rank):
    """Logits rounded to bfloat16 take the second-best of 32,768 tokens for a hit in 4% of cases."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(4, 64, 64)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(VOCAB_32K, 64)), jnp.bfloat16)
    exact = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    targets = np.argpartition(exact, -rank)[..., -rank].astype(np.int32)
    sums = sums_of(rules_on(), hidden, table.astype(jnp.float32), targets)
    assert float(sums["accuracy"]) == (targets.size if rank == 1 else 0)


def test_a_tie_is_no_hit(rules_on):
    """Two tokens with the same vector are not told from each other."""
    table = np.zeros((VOCAB_32K, 64), np.float32)
    table[[7, 9, 11], [0, 0, 1]] = 1.0
    hidden = jnp.zeros((1, 3, 64), jnp.bfloat16).at[0, jnp.arange(3), [0, 0, 1]].set(1.0)
    sums = sums_of(rules_on(), hidden, table, np.asarray([[7, 9, 11]], np.int32))
    assert float(sums["accuracy"]) == 1.0


def test_targets_without_weight_change_nothing(setup):
    model, params, batch = setup()
    hidden = batch.weights == 0
    other = batch.replace(targets=np.where(hidden, (batch.targets + 7) % VOCAB, batch.targets))
    config = LossConfig(**FULL, chunk_size=8)

    @jax.jit
    def run(batch):
        return jax.grad(
            lambda p: lm_loss(model, p, batch, RNG, train=True, config=config), has_aux=True
        )(params)

    jax.tree.map(np.testing.assert_array_equal, run(batch), run(other))


def test_a_batch_without_scored_tokens_has_zero_gradients(setup):
    model, params, batch = setup()
    empty = batch.replace(weights=np.zeros_like(batch.weights))
    (sums, gradient), _ = both(model, params, empty, LossConfig(**FULL, chunk_size=8))
    assert {float(value) for value in sums.values()} == {0.0}
    assert not any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradient))


def largest(jaxpr):
    """The most elements that any value inside a jaxpr has, those of its inner jaxprs included."""
    sizes = [v.aval.size for e in jaxpr.eqns for v in (*e.invars, *e.outvars) if hasattr(v, "aval")]
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes, default=0)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_logits_of_the_whole_batch_never_exist_when_chunked(
    tiny_decoder, packed_batch, tie_embeddings
):
    batch, length, vocab = 4, 32, 4096
    model = tiny_decoder(vocab_size=vocab, tie_embeddings=tie_embeddings)
    data = packed_batch(batch, length, vocab)
    init = functools.partial(model.init, method=_everything)
    params = nn.meta.unbox(jax.eval_shape(init, RNG, data.inputs))["params"]

    def size(chunk_size):
        config = LossConfig(**FULL, chunk_size=chunk_size)
        fn = functools.partial(lm_loss, model, batch=data, rng=RNG, train=True, config=config)
        step = jax.value_and_grad(lambda p: fn(p), has_aux=True)
        return largest(jax.make_jaxpr(step)(params).jaxpr)

    logits = batch * length * vocab
    assert size(0) == logits
    assert size(32) == logits // 4
    assert size(8) == max(logits // 16, vocab * 16)  # then the table [V, D] is as large


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 96))
def test_chunks_are_the_fewest_that_are_small_enough_or_equal(chunk_size, rows, length):
    n = num_chunks(chunk_size, rows, length)
    fitting = [k for k in range(1, length + 1) if rows * -(-length // k) <= chunk_size]
    fewest = min(fitting, default=length)
    equal = [k for k in range(fewest, 2 * fewest) if length % k == 0]
    assert n == min(equal, default=fewest)
    assert (n - 1) * -(-length // n) < length  # the last one isn't padding alone
    assert num_chunks(0, rows, length) == 1


def test_a_prime_length_has_few_chunks():
    assert num_chunks(2048, 8, 1021) == 4
    assert num_chunks(2048, 8, 1024) == 4
    assert num_chunks(3000, 8, 1024) == 4  # three were enough, but are not equal


SMALL = {"vocab_size": VOCAB, "num_layers": 1, "embed_dim": 8}
HEADS = {
    "decoder": [{"num_heads": 2}, {"num_heads": 2, "tie_embeddings": False}],
    "encoder": [{"num_heads": 2}],
    "encoder_decoder": [{"num_heads": 2}, {"num_heads": 2, "tie_embeddings": False}],
    "lstm": [{}, {"tie_embeddings": False, "head_bias": False}],
    "conv": [{}, {"tie_embeddings": False}],
}


@pytest.mark.parametrize(
    ("name", "changes"), [(name, changes) for name, several in HEADS.items() for changes in several]
)
def test_a_model_names_the_parameters_that_its_logits_read(name, changes, rules_on):
    component = importlib.import_module(f"lm.models.{name}")
    model = component.build(component.Config(**SMALL, **changes), rules_on())
    params = nn.meta.unbox(models.init_params(model, RNG))
    hidden = jax.random.normal(RNG, (1, 2, 8))
    found = jax.grad(
        lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, hidden, method="logits")))
    )(params)
    read = {n for n, leaves in found.items() if any(map(jnp.any, jax.tree.leaves(leaves)))}
    assert read == set(model.head_params)


class WithAuxiliary(nn.Module):
    """Not a decoder, but a model by the contract: hidden states, logits, and an auxiliary loss."""

    rules: object
    config: object = None
    head_params = ("table",)

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(1.0), (VOCAB, 4))

    def __call__(self, inputs, *, encoder=None, cache=None, train=False):
        return Output(hidden=self.table[inputs.ids], aux={"balance": jnp.sum(self.table**2)})

    def logits(self, hidden):
        return hidden @ self.table.T


def test_auxiliary_losses_are_averaged_by_the_one_division(rules_on, packed_batch):
    model, batch = WithAuxiliary(rules_on()), packed_batch(BATCH, LENGTH, VOCAB)
    params = model.init(RNG, batch.inputs)["params"]
    fn = functools.partial(
        lm_loss, model, batch=batch, rng=RNG, train=True, config=LossConfig(chunk_size=8)
    )
    (objective, sums), gradient = jax.value_and_grad(lambda p: fn(p), has_aux=True)(params)
    balance, tokens = np.sum(np.square(params["table"])), np.sum(batch.weights)
    np.testing.assert_allclose(sums["balance"] / tokens, balance, rtol=1e-6)
    np.testing.assert_allclose(objective, sums["loss"] + balance * tokens, rtol=1e-6)
    plain = jax.grad(lambda p: plain_loss(model, p, batch, LossConfig())[0])(params)
    expected = plain["table"] + 2 * tokens * params["table"]
    np.testing.assert_allclose(gradient["table"], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_one_pass_over_the_logits_finds_what_three_do(scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.standard_normal((6, 1001))).astype(np.float32)
    logits[0, :500] = -np.inf
    logits[1, 7:9] = logits[1].max() + 1  # a tie at the top
    logits[2, 3] = np.nan
    target = logits[:, 7:8]

    @functools.partial(jax.jit, static_argnames="in_one_pass")
    def run(in_one_pass):
        return over_vocabulary(jnp.asarray(logits), target, in_one_pass=in_one_pass)

    (log_z, above), (expected, count) = run(in_one_pass=True), run(in_one_pass=False)
    exact = logits.astype(np.float64)
    top = exact.max(axis=-1, keepdims=True)
    exact = top[:, 0] + np.log(np.exp(exact - top).sum(axis=-1))
    np.testing.assert_allclose(log_z, exact, rtol=1e-6)
    np.testing.assert_allclose(log_z, expected, rtol=1e-6)
    np.testing.assert_array_equal(above, count)
    assert above[1] == 2 and np.isnan(log_z[2])
