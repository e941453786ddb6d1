"""Mixtures of experts against a plain loop over experts, on one device and on eight."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import some

from lm.kernels.grouped_matmul import collect, grouped_matmul, sort_by_group, spread
from lm.layers.block_config import BlockConfig
from lm.layers.moe.dispatch import ROOM
from lm.layers.moe.moe import BIAS_GRADIENT, Moe, MoeConfig, route
from lm.models import decoder, flops

B, T, D, F, E, K = 8, 16, 16, 24, 8, 3
BASE = MoeConfig(num_experts=E, num_experts_per_token=K, balance_loss=0.1, z_loss=0.01)
CAPACITY = dataclasses.replace(BASE, dispatch="capacity", capacity_factor=0.7)
KINDS = {
    "softmax_topk": BASE,
    "not normalized": dataclasses.replace(BASE, normalize=False, scale=2.5),
    "topk_softmax": dataclasses.replace(BASE, router="topk_softmax"),
    "sigmoid": dataclasses.replace(BASE, router="sigmoid", selection_bias=True, scale=1.5),
    "groups": dataclasses.replace(
        BASE,
        router="sigmoid",
        selection_bias=True,
        num_groups=4,
        num_groups_chosen=3,
        sequence_balance_loss=0.2,
    ),
    "shared": dataclasses.replace(BASE, shared_mlp_dim=8),
    "capacity": CAPACITY,
    "capacity, sigmoid": dataclasses.replace(CAPACITY, router="sigmoid", selection_bias=True),
}
MESHES = {
    "expert4_fsdp2": {"expert": 4, "fsdp": 2},
    "expert2_tensor2_fsdp2": {"expert": 2, "tensor": 2, "fsdp": 2},
    "expert2_sequence2_tensor2": {"expert": 2, "sequence": 2, "tensor": 2},
}
TOLERANCE = 5e-6  # of each array's largest entry, as in test_equivalence; 1.2e-6 measured


@pytest.fixture(scope="module")
def inputs():
    """(x [B, T, D], filled [B, T]), a sixth of it padding."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, T, D)).astype(np.float32), rng.random((B, T)) < 0.85


def make(config, rules):
    c = BlockConfig(embed_dim=D, mlp_dim=F, moe=config, activation="swiglu", init_std=0.3)
    return Moe(c, rules)


def init(config, rules):
    filled = np.ones((B, T), bool)
    boxed = jax.jit(make(config, rules).init)(
        jax.random.key(0), np.zeros((B, T, D), np.float32), filled
    )
    params = nn.meta.unbox(boxed["params"])
    if config.selection_bias:
        params["selection_bias"] = jnp.linspace(-0.2, 0.2, E)
    return params, rules.shardings(boxed["params"])


def objective(apply, params, x):
    y, aux = apply(params, x)
    return jnp.sum(jnp.sin(y)) + sum(jax.tree.leaves(aux)), (y, aux)


@functools.cache
def gradients(config, rules, filled_bytes):
    """(params, x) -> ((loss, (y, aux)), gradients), compiled."""
    filled = np.frombuffer(filled_bytes, bool).reshape(B, T)

    def apply(params, x):
        y, report = make(config, rules).apply({"params": params}, x, filled)
        return y, {**report.aux, **jax.tree.map(jax.lax.stop_gradient, report.stats)}

    return jax.jit(jax.value_and_grad(functools.partial(objective, apply), (0, 1), has_aux=True))


def run(config, rules, x, filled, params=None):
    made, shardings = init(config, rules)
    params = jax.device_put(made if params is None else params, shardings)
    x = jax.device_put(x, rules.sharding("batch", None, None))
    return jax.device_get(gradients(config, rules, filled.tobytes())(params, x))


def choices(config, params, x, filled):
    """bool [B, T, E]: the experts that each token is sent to, and those that take it."""
    scores = score(config, x @ params["router"])
    ranked = np.asarray(scores) + np.asarray(params.get("selection_bias", np.zeros(E)))
    if config.num_groups > 1:
        groups, picked = config.num_groups, config.num_groups_chosen
        members = np.sort(ranked.reshape(B, T, groups, -1), axis=-1)[..., ::-1]
        taken = best(members[..., : K // picked].sum(-1), picked)
        ranked = np.where(np.repeat(taken, E // groups, axis=-1), ranked, -np.inf)
    chosen = best(ranked, K) & filled[..., None]
    if config.dispatch == "dropless":
        return chosen, chosen
    return chosen, chosen & (np.cumsum(chosen, axis=1) <= config.capacity(T))  # a row's first


def best(values, k):
    """bool, where the k largest along the last axis are."""
    found = np.zeros(values.shape, bool)
    np.put_along_axis(found, np.argsort(-values, axis=-1)[..., :k], True, axis=-1)
    return found


def score(config, logits):
    return jax.nn.sigmoid(logits) if config.router == "sigmoid" else jax.nn.softmax(logits)


def loop(config, chosen, kept, plain, filled, params, x):
    """(y, terms of the loss) by the definition: every expert on every token. plain: the choices by
    the scores alone.
    """
    logits = x @ params["router"]
    scores = score(config, logits)
    if config.router == "topk_softmax":
        weights = jax.nn.softmax(jnp.where(chosen, logits, -1e30)) * chosen
    else:
        weights = scores * chosen
        if config.normalize:
            total = weights.sum(-1, keepdims=True)
            weights = weights / jnp.where(total > 0, total, 1.0)
    y = 0.0
    for e in range(E):
        h = jax.nn.silu(x @ params["gate"][e]) * (x @ params["up"][e])
        y = y + (config.scale * weights * kept)[..., e, None] * (h @ params["down"][e])
    if config.shared_mlp_dim:
        up, gate, down = (params["shared"][n]["weight"] for n in ("up", "gate", "down"))
        y = y + (jax.nn.silu(x @ gate) * (x @ up)) @ down
    share = scores / scores.sum(-1, keepdims=True)
    log_z = jax.nn.logsumexp(logits, axis=-1)[filled]
    load = chosen.sum((0, 1)) / chosen.sum()
    aux = {
        "balance_loss": config.balance_loss * E * jnp.sum(load * share[filled].mean(0)),
        "router_z_loss": config.z_loss * jnp.mean(log_z**2),
    }
    if config.sequence_balance_loss:
        rows = [
            E / K * jnp.sum(plain[b, filled[b]].mean(0) * share[b, filled[b]].mean(0)) * of_row
            for b, of_row in enumerate(filled.sum(1) / filled.sum())
        ]
        aux["sequence_balance_loss"] = config.sequence_balance_loss * sum(rows)
    return y, aux


def expected(config, params, x, filled):
    """The results of `run` but for the gradient of a selection bias."""
    chosen, kept = choices(config, params, x, filled)
    plain = best(np.asarray(score(config, x @ params["router"])), K)
    apply = functools.partial(loop, config, chosen, kept, plain, filled)
    grad = jax.value_and_grad(functools.partial(objective, apply), (0, 1), has_aux=True)
    (_, (y, aux)), (d_params, dx) = jax.jit(grad)(params, x)
    aux["expert_imbalance"] = chosen.sum((0, 1)).max() * E / chosen.sum()
    if config.dispatch == "capacity":
        aux["expert_dropped"] = 1 - kept.sum() / chosen.sum()
    return y, aux, d_params, dx


def assert_same(a, b, tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=name)


def assert_is_loop(config, rules, x, filled, params):
    y, aux, d_params, dx = expected(config, params, x, filled)
    (_, (found, said)), (d_found, dx_found) = run(config, rules, x, filled, params)
    if config.selection_bias:
        del d_params["selection_bias"], d_found["selection_bias"]
    assert_same((y, aux, d_params, dx), (found, said, d_found, dx_found), 1e-5)


# ---- one device ----


USUAL = ("not normalized", "groups", "shared", "capacity")


@pytest.mark.parametrize("kind", some(KINDS, *USUAL))
def test_layer_is_a_loop_over_experts(kind, rules_on, inputs):
    params, _ = init(KINDS[kind], rules_on())
    assert_is_loop(KINDS[kind], rules_on(), *inputs, params)


def test_capacity_drops_what_comes_too_late(rules_on, inputs):
    (_, (_, said)), _ = run(CAPACITY, rules_on(), *inputs)
    assert 0.1 < said["expert_dropped"] < 0.9
    roomy = dataclasses.replace(CAPACITY, capacity_factor=float(E))
    (_, (y, said)), _ = run(roomy, rules_on(), *inputs)
    assert said["expert_dropped"] == 0
    (_, (dropless, _)), _ = run(BASE, rules_on(), *inputs)
    assert_same(dropless, y, 1e-5)


@pytest.mark.parametrize("config", [BASE, CAPACITY], ids=["dropless", "capacity"])
def test_later_tokens_and_other_rows_change_no_output(config, rules_on, inputs):
    x, filled = inputs
    changed = x.copy()
    changed[:, T // 2 :] += 1.0
    changed[1:] += 1.0
    (_, (y, _)), _ = run(config, rules_on(), x, filled)
    (_, (z, _)), _ = run(config, rules_on(), changed, filled)
    np.testing.assert_allclose(y[0, : T // 2], z[0, : T // 2], rtol=0, atol=1e-6)
    assert np.abs(y - z)[filled].max() > 0.1


@pytest.mark.parametrize("config", [BASE, CAPACITY], ids=["dropless", "capacity"])
def test_padding_takes_no_place_and_counts_nowhere(config, rules_on, inputs):
    x, filled = inputs
    changed = np.where(filled[..., None], x, 7.0 * x + 3.0).astype(np.float32)
    (_, (y, said)), (_, dx) = run(config, rules_on(), x, filled)
    (_, (z, other)), _ = run(config, rules_on(), changed, filled)
    np.testing.assert_array_equal(y, z)
    assert said == other
    assert not y[~filled].any() and not dx[~filled].any()


def test_a_batch_of_padding_alone_says_nothing(rules_on, inputs):
    x, filled = inputs
    (_, (y, said)), grads = run(CAPACITY, rules_on(), x, np.zeros_like(filled))
    assert not y.any() and not any(said.values())
    assert not any(g.any() for g in jax.tree.leaves(grads))


def test_bias_moves_the_choice_and_not_the_weights():
    logits = jnp.array([[[0.3, 0.2, 0.1, 0.0]]])
    config = MoeConfig(num_experts=4, num_experts_per_token=1, router="sigmoid", normalize=False)
    bias = jnp.array([0.0, 0.0, 0.0, 1.0])
    plain, moved = (route(logits, jnp.ones((1, 1), bool), config, b) for b in (None, bias))
    assert int(plain.chosen[0, 0, 0]) == 0 and int(moved.chosen[0, 0, 0]) == 3
    assert float(moved.weights[0, 0, 0]) == 0.5  # sigmoid(0)


def test_gradient_of_the_bias_is_the_excess_of_load(rules_on, inputs):
    config, (x, filled) = KINDS["sigmoid"], inputs
    params, _ = init(config, rules_on())
    chosen, _ = choices(config, params, x, filled)
    load = chosen.sum((0, 1)) / chosen.sum()
    _, (d_params, _) = run(config, rules_on(), x, filled)
    found = d_params["selection_bias"] / BIAS_GRADIENT
    np.testing.assert_allclose(found, load - 1 / E, rtol=0, atol=1e-6)


# ---- eight devices ----


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        *((kind, mesh) for kind in ("shared", "capacity, sigmoid") for mesh in list(MESHES)[::2]),
        ("groups", "expert2_sequence2_tensor2"),
        ("shared", "fsdp8"),
        # as part of a model below
        pytest.param("shared", "expert2_tensor2_fsdp2", marks=pytest.mark.slow),
        pytest.param("capacity, sigmoid", "expert2_tensor2_fsdp2", marks=pytest.mark.slow),
        pytest.param("capacity, sigmoid", "fsdp8", marks=pytest.mark.slow),
    ],
)
def test_layer_on_eight_devices_is_that_on_one(kind, mesh, rules_on, inputs):
    one = run(KINDS[kind], rules_on(), *inputs)
    eight = run(KINDS[kind], rules_on(**(MESHES | {"fsdp8": {"fsdp": 8}})[mesh]), *inputs)
    assert_same(one, eight, TOLERANCE)


def test_nothing_is_dropped_when_all_tokens_want_the_experts_of_one_shard(rules_on, inputs):
    """Four times a balanced load, and more than a pass holds: there are further passes."""
    x, filled = np.abs(inputs[0]), np.ones((B, T), bool)
    config = dataclasses.replace(BASE, num_experts_per_token=2)
    params, _ = init(config, rules_on())
    params["router"] = params["router"].at[:, :2].set(1.0)
    rules = rules_on(**MESHES["expert4_fsdp2"])
    assert rules.size("expert") > 2 * ROOM
    one = run(config, rules_on(), x, filled, params)
    assert one[0][1][1]["expert_imbalance"] == E / 2  # two experts have it all
    assert_same(one, run(config, rules, x, filled, params), TOLERANCE)


def collectives(config, rules, inputs):
    """(name, elements of each result) of the collectives of the layer and its gradient."""
    x, filled = inputs
    params, shardings = init(config, rules)
    x = jax.device_put(x, rules.sharding("batch", None, None))
    step = gradients(config, rules, filled.tobytes())
    text = step.lower(jax.device_put(params, shardings), x).compile().as_text()
    names = "all-to-all|all-gather|reduce-scatter"
    for shapes, name in re.findall(rf"= (.*?) ({names})(?:-start)?\(", text):
        sizes = [
            np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"\[([\d,]+)\]", shapes)
        ]
        yield name, int(sum(sizes))


def test_capacity_sends_its_places_by_all_to_all(rules_on, inputs):
    found = list(collectives(CAPACITY, rules_on(expert=8), inputs))
    places = (B // 8) * E * CAPACITY.capacity(T) * D  # of one device
    assert [size for name, size in found if name == "all-to-all"] == [places] * 4
    assert not [size for name, size in found if name != "all-to-all" and size >= (B // 8) * T * D]


def test_dropless_gathers_tokens_over_the_expert_axis_alone(rules_on, inputs):
    found = list(collectives(BASE, rules_on(**MESHES["expert4_fsdp2"]), inputs))
    tokens, weights = (B // 8) * T * D, (E // 4) * D * F
    gathered = [size for name, size in found if name == "all-gather"]
    # forward and backward: tokens of the four; the three matrices from two halves
    assert gathered.count(4 * tokens) == 2 and gathered.count(weights) == 3
    assert max(gathered) == max(4 * tokens, weights)
    scattered = [size for name, size in found if name == "reduce-scatter"]
    assert scattered.count(tokens) == 2 and scattered.count(weights // 2) == 3


# ---- parts ----


def test_spread_and_collect_are_transposes_of_each_other():
    rng = np.random.default_rng(1)
    groups = rng.integers(0, 5, 24)  # 4: none
    order, slots, sizes = sort_by_group(jnp.asarray(groups), 4)
    np.testing.assert_array_equal(sizes, np.bincount(groups, minlength=5)[:4])
    np.testing.assert_array_equal(groups[order[: sum(sizes)]], np.sort(groups)[: sum(sizes)])
    slots = slots.reshape(8, 3)
    x, rows = rng.normal(size=(8, 2)), rng.normal(size=(24, 2))
    rows[order == 24] = 0  # a row that has no assignment is read by nobody
    left = float(np.sum(spread(x, order, slots) * rows))
    right = float(np.sum(x * collect(rows, order, slots)))
    assert left == pytest.approx(right, rel=1e-5)
    plain, pulled = jax.vjp(lambda x: jnp.take(x, order // 3, axis=0, mode="fill", fill_value=0), x)
    np.testing.assert_array_equal(plain, spread(x, order, slots))
    [dx] = jax.vjp(lambda x: spread(x, order, slots), x)[1](rows.astype(plain.dtype))
    np.testing.assert_allclose(dx, pulled(rows.astype(plain.dtype))[0], atol=1e-6)


def test_grouped_product_and_its_gradient_are_those_of_a_loop():
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(20, 6)), rng.normal(size=(4, 6, 5))
    sizes, dy = np.array([3, 0, 9, 5], np.int32), rng.normal(size=(20, 5))
    dy[17:] = 0  # rows of no group
    ends = np.cumsum(sizes)

    def plain(x, w):
        parts = [x[e - s : e] @ w[i] for i, (s, e) in enumerate(zip(sizes, ends, strict=True))]
        return jnp.concatenate([*parts, jnp.zeros((3, 5))])

    def grouped(x, w):
        return grouped_matmul("cpu", 1.0, x, w, jnp.asarray(sizes))

    for f, g in ((plain, grouped),):
        (y, back), (z, other) = (jax.vjp(h, jnp.float32(x), jnp.float32(w)) for h in (f, g))
        np.testing.assert_allclose(y[:17], z[:17], atol=1e-5)
        for a, b in zip(back(jnp.float32(dy)), other(jnp.float32(dy)), strict=True):
            np.testing.assert_allclose(a[:17], b[:17], atol=1e-5)


# ---- the model ----

MODEL = {
    "model.activation": "swiglu",
    "model.moe.num_experts": 8,
    "model.moe.num_experts_per_token": 2,
    "model.moe.balance_loss": 0.1,
    "model.moe.z_loss": 0.01,
    "model.moe.selection_bias": True,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.5,
    "optimizer.schedule.kind": "constant",
    "optimizer.bias_rate": 0.01,
    "guard.self_check": False,
}


@pytest.fixture(scope="module")
def trained(make_experiment, packed_batch):
    """(mesh, dispatch) -> [(sums, state, info), ...] of three steps on packed, uneven rows."""

    @functools.cache
    def run(mesh=None, dispatch="dropless"):
        experiment = make_experiment(
            MODEL | {"model.moe.dispatch": dispatch}, **MESHES.get(mesh, {})
        )
        state, found = experiment.init_state(), []
        for step in range(3):
            batch = packed_batch(16, 32, 264, seed=step)
            state, sums, info = experiment.train_step(state, experiment.make_global_batch(batch))
            found.append(jax.device_get((dict(sums), state, dict(info))))
            state = jax.device_put(found[-1][1], jax.tree.map(lambda x: x.sharding, state))
        return found

    return run


@pytest.mark.parametrize(
    ("mesh", "dispatch"),
    [
        ("expert2_tensor2_fsdp2", "dropless"),
        pytest.param("expert4_fsdp2", "capacity", marks=pytest.mark.slow),
        pytest.param("expert4_fsdp2", "dropless", marks=pytest.mark.slow),
        pytest.param("expert2_tensor2_fsdp2", "capacity", marks=pytest.mark.slow),
    ],
)
def test_three_steps_on_eight_devices_are_those_on_one(trained, mesh, dispatch):
    for (sums, state, info), (other_sums, other_state, other_info) in zip(
        trained(None, dispatch), trained(mesh, dispatch), strict=True
    ):
        assert_same(sums, other_sums, TOLERANCE)
        assert_same(state.params, other_state.params, TOLERANCE)
        assert_same(state.opt_state, other_state.opt_state, TOLERANCE)
        assert_same(info["grad_norm"], other_info["grad_norm"], TOLERANCE)


def test_biases_move_by_their_rate_whatever_the_learning_rate(trained):
    moved = [state.params["layers"]["moe"]["selection_bias"] for _, state, _ in trained()]
    assert set(np.abs(moved[0]).flat) <= {np.float32(0.01), np.float32(0)}
    assert moved[0].min() < 0 < moved[0].max()
    assert np.abs(moved[2] - moved[1]).max() == pytest.approx(0.01, rel=1e-4)


def test_biases_do_not_show_in_the_norm_of_the_gradient(trained, make_experiment, packed_batch):
    params = make_experiment(MODEL).init_state().params
    del params["layers"]["moe"]["selection_bias"]
    experiment = make_experiment(MODEL | {"model.moe.selection_bias": False})
    state = experiment.init_state().replace(params=params)
    batch = experiment.make_global_batch(packed_batch(16, 32, 264, seed=0))
    _, sums, info = experiment.train_step(state, batch)
    other, _, biased = trained()[0]
    assert float(info["grad_norm"]) == pytest.approx(float(biased["grad_norm"]), rel=1e-6)
    assert float(sums["loss"]) == pytest.approx(float(other["loss"]), rel=1e-6)


def test_terms_of_the_loss_are_per_token_and_statistics_are_not_in_it(trained):
    sums = trained(None, "capacity")[0][0]
    assert {"balance_loss", "router_z_loss", "expert_imbalance", "expert_dropped"} <= set(sums)
    whole = sums["loss"] + sums["balance_loss"] + sums["router_z_loss"]
    assert float(sums["objective"]) == pytest.approx(float(whole), rel=1e-6)
    assert 1 <= sums["expert_imbalance"] / sums["tokens"] <= 8
    assert 0 < sums["expert_dropped"] / sums["tokens"] < 1


def small(tiny_decoder, **changes):
    moe = MoeConfig(num_experts=8, num_experts_per_token=2, mlp_dim=16, shared_mlp_dim=8)
    model = tiny_decoder(activation="swiglu", moe=dataclasses.replace(moe, **changes))
    zeros = jnp.zeros((1, 8), jnp.int32)
    tokens = decoder.Tokens(zeros, zeros, zeros)
    everything = functools.partial(model.init, method=lambda m, x: m.logits(m(x).hidden))
    return model, nn.meta.unbox(jax.jit(everything)(jax.random.key(0), tokens))["params"]


def test_a_packed_neighbour_changes_nothing(tiny_decoder, pack):
    model, params = small(tiny_decoder)
    tokens = pack([[10, 12, 6]], length=32, vocab_size=264)
    mine = tokens.segments == 2
    other = tokens.replace(ids=np.where(mine, tokens.ids, (tokens.ids + 31) % 264))
    apply = jax.jit(lambda t: model.apply({"params": params}, t).hidden)
    x, y = np.asarray(apply(tokens)), np.asarray(apply(other))
    np.testing.assert_allclose(x[mine], y[mine], rtol=0, atol=1e-6)
    assert np.abs(x - y)[~mine].max() > 0.1


def test_cached_decoding_is_the_whole_pass(tiny_decoder, pack):
    model, params = small(tiny_decoder)
    tokens = pack([[12], [12]], length=12, vocab_size=264)
    whole = jax.jit(model.apply)({"params": params}, tokens).hidden

    @jax.jit
    def step(tokens, cache):
        output = model.apply({"params": params}, tokens, cache=cache)
        return output.hidden, output.cache

    cache = model.init_cache(2, 12)
    for start, stop in ((0, 7), *((t, t + 1) for t in range(7, 12))):
        part = jax.tree.map(lambda a: a[:, start:stop], tokens)  # noqa: B023
        hidden, cache = step(part, cache)
        np.testing.assert_allclose(hidden, whole[:, start:stop], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"num_experts_per_token": 9},
            r"moe.num_experts_per_token \(9\) must be at most moe.num_experts \(8\)",
        ),
        (
            {"num_groups": 3},
            r"moe.num_experts \(8\) must be divisible by moe.num_groups \(3\)",
        ),
        (
            {"num_groups_chosen": 2},
            r"moe.num_groups_chosen \(2\) must be at most moe.num_groups \(1\)",
        ),
        (
            {"num_groups": 4, "num_groups_chosen": 3},
            r"moe.num_experts_per_token \(2\) must be divisible by moe.num_groups_chosen \(3\)",
        ),
        (
            {"num_groups": 8},
            r"moe.num_experts_per_token \(2\) must be at most the 1 experts of "
            r"moe.num_groups_chosen \(1\) of moe.num_groups \(8\)",
        ),
        ({"num_groups": 0}, r"moe.num_groups \(0\) must be at least 1"),
        ({"sequence_balance_loss": -1.0}, r"moe.sequence_balance_loss \(-1.0\) must be at least 0"),
        ({"router": "hash"}, r"moe\.router \('hash'\) must be one of softmax_topk"),
        ({"dispatch": "some"}, r"moe\.dispatch \('some'\) must be one of dropless, capacity"),
        ({"capacity_factor": 0.0}, r"moe.capacity_factor \(0.0\) must be above 0"),
        ({"z_loss": -1.0}, r"moe.z_loss \(-1.0\) must be at least 0"),
    ],
)
def test_values_that_do_not_fit_are_refused(changes, words, tiny_decoder):
    with pytest.raises(ValueError, match=rf"config\.model\.{words}"):
        small(tiny_decoder, **changes)


def test_biases_in_the_mlp_are_refused(tiny_decoder):
    with pytest.raises(ValueError, match="mlp_bias must be False"):
        tiny_decoder(mlp_bias=True, moe=BASE)


def test_experts_that_the_mesh_does_not_divide_are_refused(make_experiment):
    experiment = make_experiment(MODEL | {"model.moe.num_experts": 6}, expert=4)
    with pytest.raises(ValueError, match=r"expert \(6\) must be divisible by mesh expert \(4\)"):
        experiment.abstract_params  # noqa: B018


def test_muon_takes_each_expert_as_a_matrix_of_its_own(make_experiment, packed_batch):
    """Its updates are orthogonal matrices: their norm is that of the narrow side."""
    changes = {"optimizer.name": "muon", "optimizer.weight_decay": 0.0, "optimizer.clip_norm": 0.0}
    experiment = make_experiment(MODEL | changes | {"optimizer.learning_rate": 1.0})
    state = experiment.init_state()
    before = jax.device_get(state.params["layers"]["moe"])
    batch = experiment.make_global_batch(packed_batch(16, 32, 264))
    after = jax.device_get(experiment.train_step(state, batch)[0].params["layers"]["moe"])
    scale = 0.2 * 32**0.5
    for name in ("up", "down"):  # [L, E, 16, 32] and [L, E, 32, 16]
        values = np.linalg.svd((after[name] - before[name]) / scale, compute_uv=False)
        assert values.shape == (2, 8, 16)
        assert values.min() > 0.5 and values.max() < 1.5  # five Newton-Schulz steps
    assert flops.parameters(experiment.config.model).groups["experts"] == 3 * before["up"].size
