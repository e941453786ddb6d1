"""The LSTM: its equation, where its state and its gradients stop, and what it keeps for generation.

In float32; measured differences are below 2e-6 everywhere, the bound is 1e-5.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.layers import recurrent
from lm.layers.linear import Matrix
from lm.layers.recurrent import Marks, State
from lm.models import flops, lstm
from lm.planning import mesh_equivalence
from lm.tokenizers.tokenizer import ByteTokenizer
from lm.types import Tokens
from tests.test_flops import forward, product_flops

TINY = {"vocab_size": 264, "embed_dim": 16, "init_std": 0.4}
LENGTH = 12
VARIANTS = {
    "tied": {},
    "wider": {"hidden_dim": 24, "head_bias": False},
    "untied": {"hidden_dim": 8, "tie_embeddings": False, "scan_unroll": -1},
}
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def tiny(rules_on):
    """(**changes) -> (model, params with random biases)."""

    @functools.cache
    def make(**changes):
        config = lstm.Config(**{**TINY, **changes})
        config.check(LENGTH)
        model = lstm.build(config, rules_on())
        init = functools.partial(model.init, method=lambda m, x: m.logits(m(x).hidden))
        zeros = np.zeros((1, 1), np.int32)
        shapes = jax.eval_shape(init, jax.random.key(0), Tokens(zeros, zeros, zeros))["params"]
        rng = np.random.default_rng(0)
        return model, jax.tree.map(
            lambda x: rng.normal(0, 0.4, x.shape).astype(x.dtype), nn.unbox(shapes)
        )

    return make


@functools.partial(jax.jit, static_argnames="model")
def run(model, params, tokens, cache=None):
    return model.apply({"params": params}, tokens, cache=cache)


def hidden(model, params, tokens):
    return run(model, params, tokens).hidden


def alone(tokens):
    """Each segment of packed rows, row after row, at the start of a row of its own."""
    found = [
        jax.tree.map(lambda x, r=row, n=number: x[r, tokens.segments[r] == n], tokens)
        for row in range(len(tokens.ids))
        for number in range(1, tokens.segments[row].max() + 1)
    ]
    return jax.tree.map(lambda *xs: np.stack([np.pad(x, (0, LENGTH - len(x))) for x in xs]), *found)


def by_hand(inputs, weight, state, where):
    """`recurrence` as plainly as it can be written, for jax to differentiate."""
    outputs = []
    for t in range(inputs.shape[1]):
        filled, starts, cuts = (
            x[:, t, None] for x in (where.non_padding, where.starts, where.cuts)
        )
        stopped = jax.tree.map(
            lambda a, cuts=cuts: jnp.where(cuts, jax.lax.stop_gradient(a), a), state
        )
        before = jax.tree.map(lambda a, starts=starts: jnp.where(starts, 0.0, a), stopped)
        gates = inputs[:, t] + jnp.einsum("bf,fgk->bgk", before.hidden, weight)
        i, f, g, o = (gates[:, n] for n in range(4))
        memory = jax.nn.sigmoid(f) * before.memory + jax.nn.sigmoid(i) * jnp.tanh(g)
        new = State(jax.nn.sigmoid(o) * jnp.tanh(memory), memory)
        state = jax.tree.map(lambda a, b, f=filled: jnp.where(f, a, b), new, stopped)
        outputs.append(state.hidden)
    return jnp.stack(outputs, 1), state


def test_values_and_gradients_are_those_of_the_equation_written_as_a_loop(rules_on):
    rng = np.random.default_rng(1)
    batch, width = 3, 5
    inputs, weight, *state = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((batch, 9, 4, width), (width, 4, width), (batch, width), (batch, width))
    )
    where = Marks(*(rng.random((batch, 9)) < p for p in (0.7, 0.3, 0.3)))
    where = where.replace(starts=where.starts & where.non_padding)
    scale = rng.standard_normal((batch, 9, width)), rng.standard_normal((2, batch, width))

    def loss(function, inputs, weight, state):
        outputs, last = function(inputs, weight, state, where)
        ends = scale[1][0] * last.hidden + scale[1][1] * last.memory
        return jnp.sum(jnp.sin(outputs) * scale[0]) + jnp.sum(ends)

    def gradients(function):
        differentiate = jax.value_and_grad(functools.partial(loss, function), argnums=(0, 1, 2))
        return jax.jit(differentiate)(inputs, weight, State(*state))

    def recurrence(inputs, weight, state, where):
        return recurrent.recurrence(rules_on(), inputs, Matrix(weight), state, where)

    ours = gradients(recurrence)
    jax.tree.map(close, ours, gradients(by_hand))


def test_outputs_and_gradients_are_those_of_torch(rules_on):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    batch, length, size, width = 3, 7, 5, 6
    x = rng.standard_normal((batch, length, size)).astype(np.float32)
    layer = recurrent.Lstm(hidden_dim=width, rules=rules_on())
    where = Marks(*np.zeros((3, batch, length), bool)).replace(
        non_padding=np.ones((batch, length), bool)
    )
    state = State(*rng.standard_normal((2, batch, width)).astype(np.float32))
    params = nn.unbox(layer.init(jax.random.key(0), x, state, where))["params"]
    params = jax.tree.map(lambda p: 0.5 * rng.standard_normal(p.shape).astype(np.float32), params)

    theirs = torch.nn.LSTM(size, width, batch_first=True)
    flat = {name: torch.tensor(np.moveaxis(p, 0, -1)) for name, p in params.items()}
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(flat["weight"].reshape(4 * width, size))
        theirs.weight_hh_l0.copy_(flat["recurrent"].reshape(4 * width, width))
        theirs.bias_ih_l0.copy_(torch.tensor(params["bias"]).reshape(-1))
        theirs.bias_hh_l0.zero_()
    first = tuple(torch.tensor(a)[None] for a in (state.hidden, state.memory))
    wanted, (last_hidden, last_memory) = theirs(torch.tensor(x), first)
    wanted.sin().sum().backward()

    def loss(params):
        outputs, last = layer.apply({"params": params}, x, state, where)
        return jnp.sum(jnp.sin(outputs)), (outputs, last)

    grads, (outputs, last) = jax.jit(jax.grad(loss, has_aux=True))(params)
    close(outputs, wanted.detach())
    close(last.hidden, last_hidden[0].detach())
    close(last.memory, last_memory[0].detach())
    for name, grad in (("weight", theirs.weight_ih_l0), ("recurrent", theirs.weight_hh_l0)):
        close(np.moveaxis(grads[name], 0, -1).reshape(4 * width, -1), grad.grad)
    close(grads["bias"].reshape(-1), theirs.bias_ih_l0.grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_have_the_states_that_each_has_alone(tiny, pack, variant):
    model, params = tiny(**VARIANTS[variant])
    tokens = pack([[5, 4, 2], [3, 9]], length=LENGTH, vocab_size=264)
    own = alone(tokens)
    assert (own.segments != 0).sum(axis=1).tolist() == [5, 4, 2, 3, 9]
    packed = hidden(model, params, tokens)[tokens.segments != 0]
    close(packed, hidden(model, params, own)[own.segments != 0])


def test_gradients_do_not_cross_segments(tiny, pack):
    model, params = tiny()
    tokens = pack([[5, 7]], length=LENGTH, vocab_size=264)
    tokens = tokens.replace(ids=np.arange(LENGTH, dtype=np.int32)[None])  # each its own row

    @jax.jit
    def reaching(params):  # of what the second segment says, the gradient of each token's row
        return jnp.sum(jnp.sin(model.apply({"params": params}, tokens).hidden[:, 5:]))

    found = np.abs(jax.grad(reaching)(params)["embedding"]["weight"]).max(axis=1)
    assert (found[:5] == 0).all() and (found[5:LENGTH] > 1e-4).all()


def test_gradients_stop_every_bptt_tokens_and_states_go_on(tiny, pack):
    whole, params = tiny()
    cut, _ = tiny(bptt=4)
    tokens = pack([[10]], length=LENGTH, vocab_size=264)
    tokens = tokens.replace(ids=np.arange(LENGTH, dtype=np.int32)[None])
    close(hidden(cut, params, tokens), hidden(whole, params, tokens))

    def last(model, params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, tokens).hidden[:, 9]))

    grads = jax.jit(jax.grad(functools.partial(last, cut)))(params)
    found = np.abs(grads["embedding"]["weight"]).max(axis=1)
    assert (found[:8] == 0).all() and (found[8:10] > 1e-4).all()

    # the published way: the states of one piece, as constants, go into the next
    def pieces(params):
        state, outputs = whole.init_cache(1, 0), []
        for start in range(0, LENGTH, 4):
            piece = jax.tree.map(lambda x, start=start: x[:, start : start + 4], tokens)
            state = jax.lax.stop_gradient(state)
            output = whole.apply({"params": params}, piece, cache=state)
            state = output.cache
            outputs.append(output.hidden)
        return jnp.sum(jnp.sin(jnp.concatenate(outputs, 1)))

    def all_at_once(params):
        return jnp.sum(jnp.sin(cut.apply({"params": params}, tokens).hidden))

    jax.tree.map(close, *(jax.jit(jax.grad(f))(params) for f in (pieces, all_at_once)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_continues_what_it_holds(tiny, pack, variant):
    model, params = tiny(**VARIANTS[variant])
    tokens = pack([[12], [7, 5]], length=LENGTH, vocab_size=264)
    state, outputs = model.init_cache(2, LENGTH), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        piece = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], tokens)
        output = run(model, params, piece, state)
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), state, output.cache)
        state = output.cache
        outputs.append(output.hidden)
    close(jnp.concatenate(outputs, 1), hidden(model, params, tokens))


def test_padding_leaves_the_state_as_it_is(tiny, pack):
    model, params = tiny()
    tokens = pack([[6]], length=6, vocab_size=264)
    padded = jax.tree.map(  # before, in the middle and behind
        lambda x: np.concatenate([x[:, :0], 0 * x[:, :2], x[:, :4], 0 * x[:, :3], x[:, 4:]], 1),
        tokens,
    )
    output = run(model, params, padded, model.init_cache(1, 0))
    wanted = run(model, params, tokens, model.init_cache(1, 0))
    close(output.hidden[padded.segments != 0], wanted.hidden[0])
    jax.tree.map(close, output.cache, wanted.cache)


def test_greedy_text_is_the_most_likely_token_after_token(tiny):
    model, params = tiny()
    prompts = [[1, 2, 3], list(range(50, 70))]  # of two lengths: one is padded on the left
    generator = Generator(model, params, ByteTokenizer())
    for found in generator.generate(prompts, max_new_tokens=6, sampling=Sampling(temperature=0)):
        ids = [ByteTokenizer.bos_id, *prompts[found.prompt]]
        for token, logprob in zip(found.ids, found.logprobs, strict=True):
            row = np.zeros((3, 1, 32), np.int32)
            row[:, 0, : len(ids)] = ids, np.ones(len(ids)), np.arange(len(ids))
            states = hidden(model, params, Tokens(*row))[:, len(ids) - 1 : len(ids)]
            logits = model.apply({"params": params}, states, method="logits")[0, 0]
            assert token == np.argmax(logits[: ByteTokenizer.vocab_size])
            assert logprob == pytest.approx(float(jax.nn.log_softmax(logits)[token]), abs=1e-4)
            ids.append(int(token))


def test_bfloat16_keeps_the_memory_in_float32(tiny, pack):
    model, params = tiny(dtype="bfloat16")
    tokens = pack([[12]], length=LENGTH, vocab_size=264)
    output = run(model, params, tokens, model.init_cache(1, 0))
    assert output.hidden.dtype == output.cache.hidden.dtype == jnp.bfloat16
    assert output.cache.memory.dtype == jnp.float32
    exact = hidden(tiny()[0], params, tokens)
    np.testing.assert_allclose(output.hidden.astype(np.float32), exact, atol=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_formula_counts_parameters_and_products(tiny, pack, variant):
    model, params = tiny(**VARIANTS[variant])
    assert flops.parameters(model.config).total == sum(x.size for x in jax.tree.leaves(params))
    tokens = pack([[12], [5, 7]], length=LENGTH, vocab_size=264)

    def loss(params):
        return jnp.sum(nn.logsumexp(forward(model, tokens, params), axis=-1))

    wanted = tokens.ids.size * flops.flops_per_token(model.config, LENGTH)
    assert product_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) == wanted


@pytest.mark.slow
def test_eight_devices_train_as_one(make_config, devices):
    config = make_config()
    config.model = type(config)({"name": "lstm", **dataclasses.asdict(lstm.Config(**TINY))})
    report = mesh_equivalence.verify(config, {"data": 2, "fsdp": 2, "tensor": 2}, devices)
    assert report.ok, mesh_equivalence.describe(report)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"sequence": 2}, r"config\.mesh\.sequence \(2\) must be 1 for config\.model\.name=lstm"),
        ({"stage": 2}, r"config\.mesh\.stage \(2\) must be 1 for config\.model\.name=lstm"),
    ],
)
def test_a_mesh_that_would_cut_time_or_depth_is_refused(rules_on, axes, message):
    with pytest.raises(ValueError, match=message):
        lstm.build(lstm.Config(), rules_on(**axes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bptt": 35}, r"config\.model\.bptt \(35\) must be at most config\.data\.length \(12\)"),
        ({"hidden_dim": 0}, r"config\.model\.hidden_dim \(0\) must be at least 1"),
        ({"scan_unroll": 3}, r"scan_unroll \(3\) must be at most num_layers \(2\)"),
        ({"dropout": 1.0}, r"config\.model\.dropout \(1\.0\) must be in \[0, 1\)"),
        (
            {"dtype": "float16"},
            r"config\.model\.dtype \('float16'\) must be one of float32, bfloat16",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        lstm.Config(**changes).check(LENGTH)


def test_a_bidirectional_prefix_is_refused(tiny, pack):
    model, params = tiny()
    tokens = pack([[5]], length=5, vocab_size=264)
    with pytest.raises(ValueError, match="reads from left to right"):
        model.apply({"params": params}, tokens.replace(bidirectional=tokens.ids == 0))
