"""Group-limited routing and the sequence-wise balance loss against the equations of DeepSeek-V3
(arXiv:2412.19437, section 2.1.2), written out in numpy.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.block_config import BlockConfig
from lm.layers.moe.moe import Moe, MoeConfig, balance, route

B, T, D, F = 8, 16, 16, 24
CONFIG = MoeConfig(
    num_experts=16,
    num_experts_per_token=4,
    mlp_dim=F,
    num_groups=8,
    num_groups_chosen=2,
    router="sigmoid",
    selection_bias=True,
    scale=2.5,
    sequence_balance_loss=0.1,
)
E, K, GROUPS, CHOSEN = 16, 4, 8, 2
# Tolerance, of the largest output. In bfloat16 an output is rounded eight times by up to 2^-9: the
# products with up, gate and down, the sigmoid, the activation, its product, the weight, the sum.
DTYPES = {"float32": 2e-6, "bfloat16": 8 * 2.0**-9}


@pytest.fixture(scope="module")
def inputs():
    """(x [B, T, D] of numbers that bfloat16 holds, filled [B, T]); a row is half a row long."""
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(rng.normal(size=(B, T, D)), jnp.bfloat16), np.float32)
    filled = rng.random((B, T)) < 0.85
    filled[3, T // 2 :] = False
    return x, filled


def layer(rules, dtype="float32", config=CONFIG):
    c = BlockConfig(embed_dim=D, moe=config, activation="swiglu", init_std=0.3, dtype=dtype)
    return Moe(c, rules)


def init(module, rules):
    boxed = jax.jit(module.init)(
        jax.random.key(0), np.zeros((B, T, D), np.float32), np.ones((B, T), bool)
    )
    params = nn.meta.unbox(boxed["params"])
    params["selection_bias"] = jnp.linspace(-0.3, 0.3, E)
    return params, rules.shardings(boxed["params"])


def apply(module, filled, params, x):
    y, report = module.apply({"params": params}, x, filled)
    return y, report.aux


def top(values, count):
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def experts_of(scores, bias):
    """The experts of one token, of the groups with the largest sums of their best K / M scores."""
    ranked, size = scores + bias, E // GROUPS
    members = [range(g * size, (g + 1) * size) for g in range(GROUPS)]
    sums = [sum(sorted(ranked[list(m)])[-(K // CHOSEN) :]) for m in members]
    allowed = [i for g in top(sums, CHOSEN) for i in members[g]]
    return [allowed[j] for j in top(ranked[allowed], K)]


def by_equations(params, x, filled, dtype):
    """(y [B, T, D], the sequence-wise loss), one token at a time, in float64; the matrices of the
    experts, and they alone, are rounded to the type of the computation.
    """
    experts = {n: params[n].astype(dtype) for n in ("up", "gate", "down")}
    p = {name: np.asarray(value, np.float64) for name, value in {**params, **experts}.items()}
    y, total = np.zeros((B, T, D)), 0.0
    for b in range(B):
        f, share, length = np.zeros(E), np.zeros(E), filled[b].sum()
        for t in np.flatnonzero(filled[b]):
            u = x[b, t].astype(np.float64)
            s = 1 / (1 + np.exp(-(u @ p["router"])))
            f[top(s, K)] += E / (K * length)  # equation 18
            share += s / s.sum() / length  # equations 19 and 20
            chosen = experts_of(s, p["selection_bias"])
            for i in chosen:
                gate, up = u @ p["gate"][i], u @ p["up"][i]
                weight = CONFIG.scale * s[i] / s[chosen].sum()
                y[b, t] += weight * (gate / (1 + np.exp(-gate)) * up) @ p["down"][i]
        total += f @ share * length  # equation 17, averaged over the tokens of the batch
    return y, CONFIG.sequence_balance_loss * total / filled.sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_is_that_of_the_equations(dtype, rules_on, inputs):
    x, filled = inputs
    rules = rules_on()
    module = layer(rules, dtype)
    params, _ = init(module, rules)
    expected, loss = by_equations(params, x, filled, dtype)
    y, aux = jax.jit(functools.partial(apply, module, filled))(params, x.astype(dtype))
    atol = DTYPES[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=0, atol=atol)
    assert set(aux) == {"sequence_balance_loss", "balance_loss"}  # the latter: 0, of the bias
    assert float(aux["sequence_balance_loss"]) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "mesh"),
    [
        ("bfloat16", {"expert": 2, "tensor": 2, "fsdp": 2}),
        # float32 in test_moe.py, too
        pytest.param("bfloat16", {"expert": 4, "fsdp": 2}, marks=pytest.mark.slow),
        pytest.param("float32", {"expert": 2, "tensor": 2, "fsdp": 2}, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_are_one(dtype, mesh, rules_on, inputs):
    x, filled = inputs

    def run(rules):
        module = layer(rules, dtype)
        params, shardings = init(module, rules)
        given = jax.device_put(x.astype(dtype), rules.sharding("batch", None, None))

        def objective(params):
            y, aux = apply(module, filled, params, given)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))) + sum(aux.values()), (y, aux)

        return jax.jit(jax.grad(objective, has_aux=True))(jax.device_put(params, shardings))

    one, eight = (jax.device_get(run(rules)) for rules in (rules_on(), rules_on(**mesh)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        a, b = (np.asarray(z, np.float32) for z in (a, b))
        tolerance = 2 * DTYPES[dtype] if a.ndim else 1e-5
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(a).max())


def scored(rows, seed=0):
    logits = np.random.default_rng(seed).normal(size=(rows, T, E)).astype(np.float32)
    return logits, np.random.default_rng(seed + 1).random((rows, T)) < 0.8


def test_a_tokens_experts_are_of_so_many_groups():
    logits, filled = scored(4)
    bias = jnp.linspace(-0.3, 0.3, E)
    chosen = np.asarray(route(logits, filled, CONFIG, bias).chosen)[filled]
    groups = [len(set(token // (E // GROUPS))) for token in chosen]
    assert set(groups) == {CHOSEN}  # with groups of 2, all of 4 experts fill 2
    plain = dataclasses.replace(CONFIG, num_groups=1, num_groups_chosen=1)
    free = np.asarray(route(logits, filled, plain, bias).chosen)[filled]
    assert max(len(set(token // (E // GROUPS))) for token in free) == K
    every = dataclasses.replace(CONFIG, num_groups=4, num_groups_chosen=4)
    np.testing.assert_array_equal(
        np.asarray(route(logits, filled, every, bias).chosen)[filled], free
    )


@functools.partial(jax.jit, static_argnums=0)
def loss(config, logits, filled, bias=None):
    report = balance(route(logits, filled, config, bias), filled, config, bias)
    return report.aux["sequence_balance_loss"]


def test_padding_counts_in_no_loss():
    logits, filled = scored(4)
    found = loss(CONFIG, logits, filled)
    changed = np.where(filled[..., None], logits, 5 - 3 * logits)
    assert float(loss(CONFIG, changed, filled)) == float(found)
    empty = np.concatenate([filled, np.zeros((2, T), bool)])
    more = np.concatenate([logits, logits[:2]])
    assert float(loss(CONFIG, more, empty)) == pytest.approx(float(found), rel=1e-6)
    assert float(loss(CONFIG, logits, np.zeros_like(filled))) == 0


def test_two_micro_batches_have_the_loss_of_their_batch():
    logits, filled = scored(4)
    whole = float(loss(CONFIG, logits, filled)) * filled.sum()
    parts = sum(
        float(loss(CONFIG, logits[rows], filled[rows])) * filled[rows].sum()
        for rows in (slice(0, 1), slice(1, 4))
    )
    assert parts == pytest.approx(whole, rel=1e-5)


def test_the_loss_is_one_at_a_balanced_load():
    logits = np.full((2, T, E), -2.0, np.float32)
    for t in range(T):
        logits[:, t, [(t + i) % E for i in range(K)]] = 3.0  # all experts T K / E times
    assert float(loss(CONFIG, logits, np.ones((2, T), bool))) == pytest.approx(0.1, rel=1e-6)


def test_the_bias_and_the_groups_do_not_move_the_loss():
    """Its choice is that of the scores alone (equation 18)."""
    logits, filled = scored(4)
    plain = dataclasses.replace(CONFIG, num_groups=1, num_groups_chosen=1, selection_bias=False)
    expected = float(loss(plain, logits, filled))
    assert float(loss(CONFIG, logits, filled, jnp.linspace(-0.9, 0.9, E))) == expected


def test_the_loss_reaches_the_scores_through_their_shares_alone():
    """Loads are constants, and padding and the bias of the selection get nothing."""
    logits, filled = scored(4)
    bias = jnp.linspace(-0.3, 0.3, E)
    found, of_bias = jax.grad(loss, argnums=(1, 3))(CONFIG, jnp.asarray(logits), filled, bias)
    s = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = np.zeros(logits.shape)
    for b in range(4):
        f = np.zeros(E)
        for t in np.flatnonzero(filled[b]):
            f[top(s[b, t], K)] += E / K / filled[b].sum()
        for t in np.flatnonzero(filled[b]):
            row, total = s[b, t], s[b, t].sum()
            d_score = (f - f @ row / total) / total
            expected[b, t] = CONFIG.sequence_balance_loss * d_score * row * (1 - row) / filled.sum()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert not np.asarray(found)[~filled].any() and not np.asarray(of_bias).any()


def test_the_weights_reach_the_logits_of_chosen_experts_alone():
    logits, filled = scored(4)
    bias = jnp.linspace(-0.3, 0.3, E)
    chosen = np.asarray(route(logits, filled, CONFIG, bias).chosen)
    factor = np.random.default_rng(2).normal(size=chosen.shape)

    def weighted(logits, bias):
        return jnp.sum(route(logits, filled, CONFIG, bias).weights * factor)

    d_logits, d_bias = jax.grad(weighted, argnums=(0, 1))(jnp.asarray(logits), bias)
    of_chosen = np.zeros((4, T, E), bool)
    np.put_along_axis(of_chosen, np.where(filled[..., None], chosen, 0), True, axis=-1)
    d_logits = np.asarray(d_logits)[filled]
    assert (d_logits != 0).sum() == filled.sum() * K
    assert not d_logits[~of_chosen[filled]].any() and not np.asarray(d_bias).any()
