"""Muon and its variants against SVDs and the papers' equations in float64, and on eight devices."""

import collections
import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm.checkpoint.manager import Checkpoints
from lm.compiled import costs, hlo, interconnect, topology, traffic
from lm.config import conversion
from lm.config.components import COMPONENTS, component
from lm.config.schema import ScheduleConfig
from lm.models import flops
from lm.optim import matrix_owners
from lm.optim.chain import check, make_optimizer, store_as
from lm.optim.optimizer_state import shard_like_params
from lm.optim.optimizers import UpdateCost, muon
from lm.planning import estimate, plan, report

CONSTANT = ScheduleConfig(kind="constant")


def config_of(name="muon", **changes):
    changes = {"learning_rate": 1.0, "weight_decay": 0.0, "clip_norm": 0.0} | changes
    return component(COMPONENTS["optimizer"], name).Config(name, schedule=CONSTANT, **changes)


def random_tree(shapes, seed):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}


def boxes(axes, shapes):
    return {n: nn.Partitioned(jax.ShapeDtypeStruct(shapes[n], "float32"), axes[n]) for n in axes}


# ---- the iteration ----


def polar_express_by_remez(steps, lower=1e-3, cushion=0.02407327424182761):
    """The polynomials of arXiv:2505.16932: each the best odd one of degree 5 for 1 on the interval
    to which those before it have brought [lower, 1], found where its error alternates.
    """
    low, high, found = lower, 1.0, []
    for _ in range(steps):
        left = max(low, cushion * high)
        inner, error, last = [(3 * left + high) / 4, (left + 3 * high) / 4], 0.0, None
        while last is None or abs(last - error) > 1e-15:
            last, x = error, np.array([left, *inner, high])
            rows = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
            a, b, c, error = np.linalg.solve(rows, np.ones(4))
            root = math.sqrt(9 * b * b - 20 * a * c)  # where the derivative is zero
            inner = np.sqrt((-3 * b + np.array([-1, 1]) * root) / (10 * c))
        value = lambda x, a=a, b=b, c=c: a * x + b * x**3 + c * x**5  # noqa: E731
        centre = 2 / (value(low) + value(high))  # the cushion had moved it
        found.append((a * centre, b * centre, c * centre))
        low = centre * value(low)
        high = 2 - low
    return found


def test_polar_express_has_the_polynomials_of_its_paper():
    expected = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in polar_express_by_remez(6)]
    np.testing.assert_allclose(muon.coefficients("polar_express", 6), expected, rtol=2e-4)
    found = muon.coefficients("polar_express", 10)
    assert len(found) == 10 and found[7:] == [(1.875, -1.25, 0.375)] * 3
    assert muon.coefficients("standard", 4) == [(3.4445, -4.7750, 2.0315)] * 4


@pytest.mark.parametrize("name, steps, slack", [("standard", 5, 1.0), ("polar_express", 5, 1.01)])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-4), ("bfloat16", 0.1)])
def test_newton_schulz_is_the_polynomials_of_the_singular_values(
    name, steps, slack, dtype, tolerance
):
    """U p(S) V^T of an SVD in float64. bfloat16 rounds at 2^-9; steps multiply that by up to 8."""
    x = np.random.default_rng(0).normal(size=(3, 12, 20))
    polynomials = muon.coefficients(name, steps)
    found = muon.newton_schulz(jnp.asarray(x, dtype), polynomials, slack)
    assert found.dtype == jnp.dtype(dtype)
    u, s, v = np.linalg.svd(np.asarray(jnp.asarray(x, dtype), np.float64), full_matrices=False)
    s = s / (slack * np.linalg.norm(s, axis=1, keepdims=True))
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    expected = (u * s[:, None, :]) @ v
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)


@pytest.mark.parametrize("name, slack", [("standard", 1.0), ("polar_express", 1.01)])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.03)])
def test_the_values_of_the_config_reach_the_update(name, slack, dtype, tolerance):
    """Two iterations, after which singular values still tell one table and type from another."""
    axes, shapes = {"up": ("layers", "embed", "mlp")}, {"up": (3, 12, 20)}
    config = config_of(newton_schulz=name, newton_schulz_steps=2, newton_schulz_dtype=dtype)
    tx = make_optimizer(config, boxes(axes, shapes), 10)
    gradient = random_tree(shapes, 0)
    found = -jax.jit(lambda g: tx.update(g, tx.init(g), g)[0])(gradient)["up"]
    u, s, v = np.linalg.svd(gradient["up"].astype(np.float64), full_matrices=False)
    s = s / (slack * np.linalg.norm(s, axis=1, keepdims=True))
    for a, b, c in muon.coefficients(name, 2):
        s = a * s + b * s**3 + c * s**5
    expected = 0.2 * 20**0.5 * (u * s[:, None, :]) @ v
    error = np.abs(found - expected).max()
    assert error < tolerance and (dtype == "float32" or error > 1e-4)


def test_polar_express_converges_to_the_polar_factor():
    """Singular values from 1 to 1/300; five steps of the standard ones end 0.3 away."""
    rng = np.random.default_rng(1)
    u, _, v = np.linalg.svd(rng.normal(size=(16, 24)), full_matrices=False)
    x = jnp.asarray((u * np.geomspace(1, 1 / 300, 16)) @ v, jnp.float32)[None]
    errors = {}
    for name in muon.COEFFICIENTS:
        y = muon.newton_schulz(x, muon.coefficients(name, 8), 1.01)
        errors[name] = np.linalg.norm(np.asarray(y[0], np.float64) - u @ v, 2)
    assert errors["polar_express"] < 1e-4 < 0.1 < errors["standard"]


def test_momentum_and_iteration_are_those_of_optax():
    shapes = {"up": (3, 6, 16), "out": (3, 2, 4, 6)}
    axes = {"up": ("layers", "embed", "mlp"), "out": ("layers", "heads", "head_dim", "embed")}
    dimensions = {n: muon.matrix_dimensions(a) for n, a in axes.items()}
    own = optax.chain(
        muon.nesterov_momentum(0.9), muon.orthogonalize(muon.Config(), dimensions, None)
    )
    table = muon.COEFFICIENTS["standard"][0]
    theirs = optax.contrib.scale_by_muon(table, 5, 0.9, weight_dimension_numbers=dimensions)
    states = [t.init(random_tree(shapes, 0)) for t in (own, theirs)]
    update = [jax.jit(t.update) for t in (own, theirs)]
    for seed in range(3):
        gradient = random_tree(shapes, seed)
        a, states[0] = update[0](gradient, states[0])
        b, states[1] = update[1](gradient, states[1])
        for n in shapes:
            np.testing.assert_allclose(a[n], b[n], atol=5e-6, err_msg=f"{n} {seed}")


# ---- variants ----


def test_normuon_is_its_algorithm_in_numpy():
    """Algorithm 1 of arXiv:2510.05491 for weights [outputs, inputs], with the momentum of Muon."""
    axes = {
        "up": ("layers", "embed", "mlp"),
        "out": ("layers", "heads", "head_dim", "embed"),
        "conv": ("embed", "taps", "gates", "mlp"),
    }
    shapes = {"up": (2, 6, 9), "out": (2, 2, 4, 6), "conv": (4, 3, 2, 5)}
    sides = {"up": (2, 6, 9), "out": (2, 8, 6), "conv": (1, 12, 10)}
    b1, b2, rate, decay = 0.9, 0.8, 0.1, 0.3
    config = config_of(
        learning_rate=rate, muon_momentum=b1, normuon_b2=b2, weight_decay=decay, eps=1e-8
    )
    tx = make_optimizer(config, boxes(axes, shapes), 10)
    params = random_tree(shapes, 0)
    state, weights = tx.init(params), {n: x.astype(np.float64) for n, x in params.items()}
    update = jax.jit(tx.update)
    momentum, second = dict.fromkeys(shapes, 0.0), dict.fromkeys(shapes, 0.0)
    for t in range(1, 5):
        gradient = random_tree(shapes, t)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for n, g in gradient.items():
            g = g.astype(np.float64)
            momentum[n] = b1 * momentum[n] + (1 - b1) * g
            ahead = b1 * momentum[n] / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
            m = ahead.reshape(sides[n]).swapaxes(1, 2)  # [L, outputs, inputs]
            x = m / np.linalg.norm(m, axis=(1, 2), keepdims=True)
            for _ in range(5):
                gram = x @ x.swapaxes(1, 2)
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            second[n] = b2 * second[n] + (1 - b2) * np.mean(x * x, axis=2)
            x = x / (np.sqrt(second[n])[:, :, None] + 1e-8)
            root = math.sqrt(x[0].size)
            step = 0.2 * rate * root / np.linalg.norm(x, axis=(1, 2), keepdims=True) * x
            step = step.swapaxes(1, 2).reshape(shapes[n])
            assert np.std(step) == pytest.approx(0.2 * rate, rel=0.02)
            weights[n] = weights[n] - rate * decay * weights[n] - step
            np.testing.assert_allclose(params[n], weights[n], atol=2e-5, err_msg=f"{n} {t}")


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_cautious_decay_is_its_equation(name):
    """x - rate (u + decay [u x >= 0] x) of arXiv:2510.12402, with u of the run without decay."""
    shapes, axes = {"up": (3, 6, 8)}, {"up": ("layers", "embed", "mlp")}
    params, gradient = random_tree(shapes, 0), random_tree(shapes, 1)

    def step(**changes):
        tx = make_optimizer(config_of(name, learning_rate=0.1, **changes), boxes(axes, shapes), 10)
        updates, _ = tx.update(gradient, tx.init(params), params)
        return np.asarray(updates["up"], np.float64)

    x = params["up"].astype(np.float64)
    u = -step() / 0.1
    aligned = u * x >= 0
    assert 0.2 < np.mean(aligned) < 0.8
    found = step(weight_decay=0.5, decay_rule="cautious")
    np.testing.assert_allclose(found, -0.1 * (u + 0.5 * aligned * x), atol=1e-6)
    everywhere = step(weight_decay=0.5)
    np.testing.assert_allclose(everywhere, -0.1 * (u + 0.5 * x), atol=1e-6)


# ---- on eight devices ----

# Matrices of several stacks: numbers that no number of devices divides, a router, experts whose
# stack is sharded, an adapter, a convolution and one by itself.
AXES = {
    "query": ("layers", "embed", "heads", "head_dim"),
    "key": ("layers", "embed", "kv_heads", "head_dim"),
    "out": ("layers", "heads", "head_dim", "embed"),
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
    "expert_up": ("layers", "expert", "embed", "mlp"),
    "router": ("layers", "embed", "expert"),
    "lora_a": ("layers", "heads", "head_dim", "rank"),
    "lora_b": ("layers", "rank", "mlp"),
    "convolution": ("layers", "embed", "taps", "gates", "mlp"),
    "pooler": ("embed", "mlp"),
    "embedding": ("vocab", "embed"),
    "scale": ("layers", "embed"),
}
SIZES = {
    "layers": 6, "embed": 16, "heads": 4, "kv_heads": 4, "head_dim": 4, "mlp": 24, "expert": 4,
    "rank": 2, "taps": 3, "gates": 2, "vocab": 32,
}  # fmt: skip
SHAPES = {n: tuple(SIZES[a] for a in axes) for n, axes in AXES.items()}
MESHES = {
    "fsdp8": {"fsdp": 8},
    "fsdp4_tensor2": {"fsdp": 4, "tensor": 2},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data8": {"data": 8},
    "expert2_fsdp2_stage2": {"expert": 2, "fsdp": 2, "stage": 2},
}

QUICK = (
    ("data2_fsdp2_tensor2", "all"),
    ("data2_fsdp2_tensor2", "replica"),
    ("expert2_fsdp2_stage2", "all"),
)


@functools.cache
def one_device():
    config = config_of(normuon_b2=0.9, weight_decay=0.1, decay_rule="cautious")
    tx = make_optimizer(config, boxes(AXES, SHAPES), 10)
    params, gradient = random_tree(SHAPES, 0), random_tree(SHAPES, 1)
    update = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])
    return config, params, gradient, update(gradient, params)


CASES = [
    pytest.param(m, o, marks=() if (m, o) in QUICK else pytest.mark.slow)
    for m in MESHES
    for o in ("all", "replica")
]


@pytest.mark.parametrize("mesh", [{}, {"data": 4, "fsdp": 2}])
def test_matrices_that_memory_does_not_take_at_once_are_exchanged_in_rounds(
    rules_on, monkeypatch, mesh
):
    config, params, gradient, expected = one_device()
    monkeypatch.setattr(matrix_owners, "AT_ONCE", 16 * 24)
    boxed, rules = boxes(AXES, SHAPES), rules_on(**mesh)
    tx = make_optimizer(config, boxed, 10, shardings=rules.shardings(boxed))
    update = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])
    lowered = update.lower(gradient, params)
    assert lowered.as_text().count("stablehlo.while") >= 3
    found = update(gradient, params)
    for n in AXES:
        np.testing.assert_allclose(found[n], expected[n], atol=1e-5, err_msg=n)


@pytest.mark.parametrize("mesh, owners", CASES)
def test_an_update_on_eight_devices_is_that_of_one(rules_on, mesh, owners):
    """Sums of float32 in another order: 2e-6 of updates of up to 1, measured."""
    config, params, gradient, expected = one_device()
    boxed = boxes(AXES, SHAPES)
    shardings = rules_on(**MESHES[mesh]).shardings(boxed)
    config = dataclasses.replace(config, owners=owners)
    tx = make_optimizer(config, boxed, 10, shardings=shardings)
    params, gradient = jax.device_put((params, gradient), (shardings, shardings))
    update = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0], out_shardings=shardings)
    found = update(gradient, params)
    for n in AXES:
        np.testing.assert_allclose(found[n], expected[n], atol=1e-5, err_msg=n)


@pytest.mark.parametrize(
    "count, axes",
    [(2, ()), (3, ("data",)), (4, ("data",)), (5, ("data", "sequence")), (8, ("data", "sequence"))],
)
def test_replicas_divide_matrices_while_that_leaves_them_fewer(rules_on, count, axes):
    mesh = rules_on(data=2, fsdp=2, sequence=2).mesh
    group = matrix_owners.Group((16, 24), ("fsdp",), (), ())
    assert matrix_owners.replicas(group, count, mesh) == axes


def lowered_update(rules, axes, shapes, *, placed=True, **changes):
    """The update of parameters with these axes and shapes, lowered for the devices of the rules."""
    boxed = boxes(axes, shapes)
    shardings = rules.shardings(boxed)
    tx = make_optimizer(config_of(**changes), boxed, 10, shardings=shardings if placed else None)
    params = {n: jax.ShapeDtypeStruct(shapes[n], "float32", sharding=shardings[n]) for n in shapes}
    state = shard_like_params(jax.eval_shape(tx.init, params), params, rules.sharding())
    shards = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(tx.update, out_shardings=(shardings, shards)).lower(params, state, params)


def compiled_update(rules, axes, shapes, **options):
    """(FLOPs of the products of a device, {(kind, mesh axes): bytes that it sends})."""
    module = hlo.of_compiled(lowered_update(rules, axes, shapes, **options).compile())
    sent = collections.Counter()
    for c in traffic.collectives(module, rules.mesh.shape):
        sent[c.kind, c.axis] += c.bytes
    # without sums of a few numbers, as the norm of the gradient
    return costs.count_flops_and_hbm_bytes(module).flops, {k: n for k, n in sent.items() if n > 99}


@pytest.mark.parametrize("mesh", ["fsdp8", "data2_fsdp2_tensor2", "data8"])
def test_a_device_iterates_an_eighth_of_the_matrices_and_sends_its_shards(rules_on, mesh):
    """5 iterations of 4 m^2 n + 2 m^3 FLOPs; two all-to-alls of what a device holds."""
    axes = {n: AXES[n] for n in ("query", "out", "up", "down")}
    shapes = {"query": (8, 16, 4, 4), "out": (8, 4, 4, 16), "up": (8, 16, 24), "down": (8, 24, 16)}
    every = 5 * (16 * (6 * 16**3) + 16 * (4 * 16**2 * 24 + 2 * 16**3))
    flops, sent = compiled_update(rules_on(**MESHES[mesh]), axes, shapes)
    assert flops == every / 8
    held = 4 * sum(map(math.prod, shapes.values()))
    assert (
        sent
        == {
            "fsdp8": {("all-to-all", "fsdp"): 2 * held / 8 * 7 / 8},
            "data2_fsdp2_tensor2": {
                # each replica exchanges its half of the matrices, and gathers the other half
                ("all-to-all", "fsdp+tensor"): 2 * held / 4 / 2 * 3 / 4,
                ("all-gather", "data"): held / 4 / 2,
            },
            "data8": {("all-gather", "data"): held * 7 / 8},
        }[mesh]
    )


def test_owners_of_a_replica_send_nothing_to_the_others(rules_on):
    axes, shapes = {"up": AXES["up"]}, {"up": (8, 16, 24)}
    rules, held = rules_on(data=2, fsdp=4), 4 * 8 * 16 * 24
    flops, sent = compiled_update(rules, axes, shapes, owners="replica")
    assert flops == 5 * 2 * (4 * 16**2 * 24 + 2 * 16**3)
    assert sent == {("all-to-all", "fsdp"): 2 * held / 4 * 3 / 4}


def test_left_to_the_compiler_devices_repeat_the_iteration(rules_on):
    axes, shapes = {"up": AXES["up"]}, {"up": (8, 16, 24)}
    every = 5 * 8 * (4 * 16**2 * 24 + 2 * 16**3)
    flops, _ = compiled_update(rules_on(data=8), axes, shapes, placed=False)
    assert flops == every
    _, sent = compiled_update(rules_on(fsdp=8), axes, shapes, placed=False)
    placed = compiled_update(rules_on(fsdp=8), axes, shapes)
    assert placed[0] == every / 8
    assert sum(sent.values()) > 4 * sum(placed[1].values())


@pytest.mark.parametrize("dtype, sent", [("float32", "f32"), ("bfloat16", "bf16")])
def test_matrices_travel_in_the_type_of_the_iteration(rules_on, dtype, sent):
    """As lowered: XLA's CPU compiler has no all-to-all of bfloat16."""
    axes, shapes = {"up": AXES["up"]}, {"up": (8, 16, 24)}
    text = lowered_update(
        rules_on(data=2, fsdp=4), axes, shapes, newton_schulz_dtype=dtype
    ).as_text()
    found = re.findall(r'"stablehlo.(all_to_all|all_gather)".*-> tensor<[\dx]*(\w+)>', text)
    assert found == [("all_to_all", sent)] * 2 + [("all_gather", sent)]


# ---- state ----


def test_second_moments_of_neurons_are_sharded_as_their_outputs(rules_on):
    boxed, rules = boxes(AXES, SHAPES), rules_on(fsdp=4, tensor=2)
    shardings = rules.shardings(boxed)
    tx = make_optimizer(config_of(normuon_b2=0.9), boxed, 10, shardings=shardings)
    params = {n: jax.ShapeDtypeStruct(SHAPES[n], "float32", sharding=shardings[n]) for n in AXES}
    state = shard_like_params(jax.eval_shape(tx.init, params), params, rules.sharding())
    nu = optax.tree.get(state, "NeuronState").nu
    assert {n: nu[n].shape for n in ("up", "out")} == {"up": (6, 1, 24), "out": (6, 1, 1, 16)}
    for name, spec in (("up", P(None, None, "tensor")), ("out", P(None, None, None, "fsdp"))):
        assert nu[name].sharding.is_equivalent_to(NamedSharding(rules.mesh, spec), nu[name].ndim)
    mu = optax.tree.get(state, "MomentumState").mu
    assert mu["up"].sharding == shardings["up"]


def test_only_moments_are_rounded():
    """A state with constants, as that of `optax.contrib.scale_by_muon`."""
    params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    dimensions = dict.fromkeys(params, optax.contrib.MuonDimensionNumbers())
    theirs = store_as("bfloat16", optax.contrib.scale_by_muon(weight_dimension_numbers=dimensions))
    _, state = theirs.update(params, theirs.init(params))
    assert state.ns_coeffs.dtype == jnp.float32
    np.testing.assert_array_equal(state.ns_coeffs, np.float32([3.4445, -4.7750, 2.0315]))
    assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype("bfloat16")}
    assert state.count.dtype == jnp.int32


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_the_state_of_muon_is_counts_and_moments(moment_dtype):
    boxed = boxes(AXES, SHAPES)
    config = config_of(normuon_b2=0.9, moment_dtype=moment_dtype)
    params = random_tree(SHAPES, 0)
    tx = make_optimizer(config, boxed, 10)
    state = jax.jit(lambda p: tx.update(p, tx.init(p), p)[1])(params)
    held = jax.tree_util.tree_leaves_with_path(
        optax.tree.get(state, "PartitionState").inner_states["muon"]
    )
    moments = {k: x.dtype for k, x in held if k[-1] in map(jax.tree_util.DictKey, AXES)}
    assert len(moments) == 2 * (len(AXES) - 2)  # neither of the embedding nor of the scale
    assert set(moments.values()) == {jnp.dtype(moment_dtype)}
    assert {x.dtype for k, x in held if k not in moments} == {jnp.dtype("int32")}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"newton_schulz": "cubic"}, r"newton_schulz \('cubic'\) must be one of standard, polar_"),
        ({"newton_schulz_steps": 0}, r"newton_schulz_steps \(0\) must be in \[1, 20\]"),
        ({"owners": "some"}, r"owners \('some'\) must be one of all, replica"),
        ({"decay_rule": "signed"}, r"decay_rule \('signed'\) must be one of decoupled, cautious"),
        ({"normuon_b2": 1.0}, r"normuon_b2 \(1\.0\) must be in \[0, 1\)"),
        (
            {"muon_momentum": 0.995, "moment_dtype": "bfloat16"},
            r"muon_momentum \(0\.995\) and normuon_b2 \(0\.0\) must be at most 0\.99 .*bfloat16",
        ),
    ],
)
def test_values_that_muon_does_not_take_are_refused(changes, message):
    with pytest.raises(ValueError, match=r"config\.optimizer\." + message):
        check(config_of(**changes))


# ---- runs ----

VARIANT = {
    "optimizer.name": "muon",
    "optimizer.newton_schulz": "polar_express",
    "optimizer.normuon_b2": 0.95,
    "optimizer.decay_rule": "cautious",
    "optimizer.moment_dtype": "bfloat16",
}


def test_a_run_of_muon_goes_on_with_the_same_bytes(tmp_path, make_experiment):
    experiment = make_experiment(VARIANT, data=2, fsdp=2)

    def go(state, start, stop):
        for _, batch in experiment.batches(start, stop):
            state, _, _ = experiment.train_step(state, batch)
        return state

    with Checkpoints(str(tmp_path), experiment.config.checkpoint) as checkpoints:
        state = go(experiment.init_state(), 0, 2)
        checkpoints.save(state)
        whole = jax.device_get(go(state, 2, 4))
        checkpoints.wait()
        restored, _ = checkpoints.restore(experiment.abstract_state, 2)
    resumed = jax.device_get(go(restored, 2, 4))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_a_plan_prices_the_exchange(make_config):
    """By the compiled step, and by formula: 16 matrices of 16 x 16 and 8 of 16 x 32."""
    changes = {"optimizer.name": "muon", "mesh.fsdp": 4, "mesh.data": 2, "model.num_layers": 4}
    config = make_config(changes)
    found = plan.make(config, "cpu:8")
    sent = {(t.kind, t.axis): t.bytes for t in found.optimizer_transfers}
    size = 4 * (16 * 16 * 16 + 8 * 16 * 32)
    assert sent == {
        ("all-to-all", "fsdp"): 2 * size / 4 / 2 * 3 / 4,
        ("all-gather", "data"): size / 4 / 2,
    }
    every = {(t.kind, t.axis): t.bytes for t in found.transfers}
    assert all(n <= every[key] for key, n in sent.items())
    resolved = conversion.resolve(config)
    cost = flops.update_cost(resolved.model, resolved.optimizer)
    assert cost == UpdateCost(8 * found.work.optimizer_flops, 2 * size, size)
    assert cost.flops == 5 * (16 * 6 * 16**3 + 8 * (4 * 16**2 * 32 + 2 * 16**3))
    assert plan.from_json(found.to_json()) == found
    page = report.page(found)
    assert "lm/optim/matrix_owners.py" in page
    assert f"of which the optimizer {cost.flops / 8e3:.0f}kFLOP" in page
    assert "of which the optimizer 10.00 KiB: all-to-all fsdp 6.00 KiB" in page


def test_an_estimate_prices_the_update(make_experiment):
    target = topology.parse("v5e:2x4")

    def of(name, **axes):
        e = make_experiment({"model.dtype": "bfloat16", "optimizer.name": name}, **axes)
        grid = [interconnect.ChipCoord(0, (i // 4, i % 4), 0) for i in range(8)]
        found = estimate.estimate(e.config, e.batch_size, target, e.rules, coords=grid)
        return found.parts, flops.update_cost(e.config.model, e.config.optimizer)

    (plain, nothing), (parts, cost) = (of(n, fsdp=4, data=2) for n in ("adamw", "muon"))
    assert nothing == UpdateCost()
    own = cost.flops / 8 / target.chip.peak_flops("bfloat16")
    assert parts["compute"] == pytest.approx(plain["compute"] + own)
    assert parts["fsdp"] > plain["fsdp"] and parts["data"] > plain["data"]
