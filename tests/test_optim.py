"""Schedules by their values, optimizers by plain numpy, and stacked and sharded parameters."""

import functools
import math
import pkgutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.config.components import COMPONENTS, component
from lm.config.schema import OptimizerConfig, ScheduleConfig
from lm.layers.lora import LoraConfig
from lm.layers.moe.moe import MoeConfig
from lm.models import conv, decoder, encoder, encoder_decoder, lstm
from lm.optim import optimizers
from lm.optim.chain import check, make_optimizer, parameter_roles
from lm.optim.optimizer_state import averaged_params
from lm.optim.optimizers import muon
from lm.optim.schedules import make_schedule
from lm.types import Tokens

# adversarial is for models of two parts: tests/test_seqgan.py
OPTIMIZERS = sorted({m.name for m in pkgutil.iter_modules(optimizers.__path__)} - {"adversarial"})
CONSTANT = ScheduleConfig(kind="constant")


def values(config, num_steps, steps):
    schedule = make_schedule(config, num_steps)
    return [float(schedule(jnp.int32(step))) for step in steps]


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"kind": "constant"}, {0: 1, 50: 1, 100: 1}),
        ({"kind": "constant", "warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 100: 1}),
        ({"kind": "constant", "warmup_steps": 1}, {0: 1, 1: 1}),
        ({"kind": "cosine"}, {0: 1, 50: 0.55, 100: 0.1, 200: 0.1}),
        ({"kind": "cosine", "warmup_steps": 20}, {0: 0.05, 19: 1, 20: 1, 60: 0.55, 100: 0.1}),
        (
            {"kind": "cosine", "final_fraction": 0.0},
            {25: (1 + math.cos(math.pi / 4)) / 2, 50: 0.5, 100: 0},
        ),
        ({"kind": "linear", "warmup_steps": 20}, {9: 0.5, 20: 1, 60: 0.55, 100: 0.1}),
        ({"kind": "linear", "final_fraction": 0.0}, {0: 1, 50: 0.5, 100: 0}),
        ({"kind": "inverse_sqrt", "warmup_steps": 10}, {9: 1, 10: 1, 40: 0.5, 90: 1 / 3}),
        ({"kind": "inverse_sqrt"}, {0: 1, 3: 0.5, 99: 0.1}),
        ({"kind": "range", "final_fraction": 1e-4}, {0: 1e-4, 99: 1, 33: 1e-4 ** (2 / 3)}),
        ({"kind": "wsd"}, {0: 1, 80: 1, 90: 0.55, 100: 0.1}),
        (
            {"kind": "wsd", "warmup_steps": 10, "decay_steps": 40, "final_fraction": 0.0},
            {0: 0.1, 10: 1, 60: 1, 80: 0.5, 100: 0},
        ),
    ],
)
def test_schedule_at_key_steps(config, expected):
    found = values(ScheduleConfig(**config), 100, expected)
    np.testing.assert_allclose(found, list(expected.values()), atol=1e-6)


def test_schedules_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match=r"warmup_steps \(20\) and decay need 70 .* has 60"):
        make_schedule(ScheduleConfig(kind="wsd", warmup_steps=20, decay_steps=50), 60)
    with pytest.raises(ValueError, match=r"warmup_steps \(20\) .* 20 .* has 10"):
        make_schedule(ScheduleConfig(warmup_steps=20), 10)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"name": "adam"}, r"name \('adam'\) is not in lm\.optim\.optimizers;.*did you mean adamw"),
        ({"schedule": ScheduleConfig(kind="step")}, r"schedule\.kind \('step'\) must be one of "),
        ({"decay_roles": ("matrices",)}, r"decay_roles\[0\] \('matrices'\) must be one of matrix"),
        ({"b1": 1.0}, r"b1 \(1\.0\) must be in \[0, 1\)"),
    ],
)
def test_configs_that_no_optimizer_takes_are_refused(config, message):
    with pytest.raises(ValueError, match=r"config\.optimizer\." + message):
        check(OptimizerConfig(**config))


# ---- small trees of parameters ----

AXES = {
    "embedding": ("vocab", "embed"),
    "position": (None, "embed"),
    "head": ("embed", "vocab"),
    "query": ("layers", "embed", "heads", "head_dim"),
    "out": ("layers", "heads", "head_dim", "embed"),
    "up": ("layers", "embed", "mlp"),
    "scale": ("layers", None),
    "bias": ("layers", "heads", "head_dim"),
}
SHAPES = {
    "embedding": (10, 6),
    "position": (7, 6),
    "head": (6, 10),
    "query": (3, 6, 2, 4),
    "out": (3, 2, 4, 6),
    "up": (3, 6, 9),
    "scale": (3, 6),
    "bias": (3, 2, 4),
}


def box(names=tuple(AXES), shapes=SHAPES, axes=AXES):
    return {n: nn.Partitioned(jax.ShapeDtypeStruct(shapes[n], jnp.float32), axes[n]) for n in names}


def random_tree(shapes, seed, size=1.0):
    rng = np.random.default_rng(seed)
    return {n: (size * rng.normal(size=shape)).astype(np.float32) for n, shape in shapes.items()}


def config_of(name, *values, **changes):
    """The config of the optimizer `name`, of its own class."""
    return component(COMPONENTS["optimizer"], name).Config(name, *values, **changes)


def run(config, params, gradients, boxed=None, num_steps=100):
    """(parameters after each gradient, last state), and the transformation."""
    tx = make_optimizer(config, box() if boxed is None else boxed, num_steps)
    state, found = tx.init(params), []
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found, state


def test_roles_follow_the_logical_axes():
    assert parameter_roles(box()) == {
        "embedding": "embedding",
        "position": "embedding",
        "head": "embedding",
        "query": "matrix",
        "out": "matrix",
        "up": "matrix",
        "scale": "vector",
        "bias": "vector",
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay_roles", [("matrix",), ("embedding", "vector"), ()])
def test_only_the_named_roles_decay(name, decay_roles):
    config = config_of(
        name, 0.1, CONSTANT, weight_decay=0.5, decay_roles=decay_roles, muon_learning_rate=0.2
    )
    params = random_tree(SHAPES, 0)
    zeros = jax.tree.map(np.zeros_like, params)
    [after], _ = run(config, params, [zeros])
    for leaf, role in parameter_roles(box()).items():
        rate = 0.2 if name == "muon" and role == "matrix" else 0.1
        factor = 1 - rate * 0.5 if role in decay_roles else 1.0
        np.testing.assert_allclose(after[leaf], factor * params[leaf], rtol=1e-5, err_msg=leaf)


def adamw(p, g, state, t, c, rate):
    m, v = state
    m, v = c.b1 * m + (1 - c.b1) * g, c.b2 * v + (1 - c.b2) * g * g
    m_hat, v_hat = m / (1 - c.b1**t), v / (1 - c.b2**t)
    return rate * m_hat / (np.sqrt(v_hat) + c.eps), (m, v)


def lion(p, g, state, t, c, rate):
    m, v = state
    return rate * np.sign(c.b1 * m + (1 - c.b1) * g), (c.b2 * m + (1 - c.b2) * g, v)


def sgd(p, g, state, t, c, rate):
    m, v = state
    return rate * (c.b1 * m + g), (c.b1 * m + g, v)


@pytest.mark.parametrize("rule", [adamw, lion, sgd], ids=lambda rule: rule.__name__)
def test_updates_are_the_numpy_ones(rule):
    schedule = ScheduleConfig(kind="linear", warmup_steps=2, final_fraction=0.0)
    config = OptimizerConfig(
        rule.__name__, 0.01, schedule, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-3, clip_norm=0.0
    )
    params = random_tree(SHAPES, 0)
    gradients = [random_tree(SHAPES, seed) for seed in range(1, 6)]
    found, _ = run(config, params, gradients, num_steps=10)
    rates = [0.01 * f for f in (0.5, 1.0, 1.0, 0.875, 0.75)]
    for name in SHAPES:
        p, state = params[name].astype(np.float64), (0.0, 0.0)
        decay = 0.3 if parameter_roles(box())[name] == "matrix" else 0.0
        for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
            step, state = rule(p, gradient[name].astype(np.float64), state, t, config, rate)
            p = p - step - rate * decay * p
            np.testing.assert_allclose(found[t - 1][name], p, atol=2e-6, err_msg=f"{name} {t}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_a_regression(name):
    rng = np.random.default_rng(0)
    x, truth = rng.normal(size=(64, 6)), rng.normal(size=(6, 9))
    y = (x @ truth).astype(np.float32)
    axes, shapes = {"up": ("embed", "mlp"), "bias": ("mlp",)}, {"up": (6, 9), "bias": (9,)}
    rate = {"adafactor": 0.5, "sgd": 0.05, "muon": 0.3}.get(name, 0.1)
    config = config_of(name, rate, ScheduleConfig(), weight_decay=0.0, clip_norm=0.0)
    tx = make_optimizer(config, box(shapes, shapes, axes), 150)

    def loss(params):
        return jnp.mean((x @ params["up"] + params["bias"] - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = random_tree(shapes, 1, size=0.1)
    before, state = float(loss(params)), tx.init(params)
    for _ in range(150):
        params, state = step(params, state)
    assert float(loss(params)) < 0.02 * before


def test_muon_updates_stacked_layers_as_it_updates_each():
    config = config_of("muon", 0.1, CONSTANT, muon_learning_rate=0.3, clip_norm=0.0)
    params = random_tree(SHAPES, 0)
    gradients = [random_tree(SHAPES, seed) for seed in (1, 2)]
    (*_, stacked), _ = run(config, params, gradients)
    names = ("query", "out", "up")
    boxed = box(names, {n: SHAPES[n][1:] for n in names}, {n: AXES[n][1:] for n in names})
    for layer in range(3):
        own = [{n: tree[n][layer] for n in names} for tree in (params, *gradients)]
        (*_, alone), _ = run(config, own[0], own[1:], boxed)
        for n in names:
            np.testing.assert_allclose(stacked[n][layer], alone[n], atol=1e-5, err_msg=n)


def test_muon_makes_the_singular_values_of_matrices_equal():
    config = config_of(
        "muon", 1.0, CONSTANT, weight_decay=0.0, muon_learning_rate=1.0, clip_norm=0.0
    )
    params, gradient = random_tree(SHAPES, 0), random_tree(SHAPES, 1)
    [after], _ = run(config, params, [gradient])
    matrices = {"query": (6, 8), "out": (8, 6), "up": (6, 9)}
    for name, (rows, columns) in matrices.items():
        update = (np.asarray(after[name]) - params[name]).reshape(3, rows, columns)
        singular = np.linalg.svd(update, compute_uv=False) / (0.2 * max(rows, columns) ** 0.5)
        assert 0.6 < singular.min() <= singular.max() < 1.3, name  # five Newton-Schulz steps
        inner = np.sum(update * gradient[name].reshape(3, rows, columns), axis=(1, 2))
        assert np.all(inner < 0), name
    np.testing.assert_allclose(  # vectors and embeddings: Adam's first step is the sign
        after["embedding"] - params["embedding"], -np.sign(gradient["embedding"]), atol=1e-4
    )


# Every set of axes of a matrix in a model, and how many of its dimensions, the stacked ones left
# out, are rows.
ROWS = {
    ("layers", "embed", "heads", "head_dim"): 1,
    ("layers", "embed", "kv_heads", "head_dim"): 1,
    ("layers", "heads", "head_dim", "embed"): 2,
    ("layers", "embed", "mlp"): 1,
    ("layers", "mlp", "embed"): 1,
    ("layers", "expert", "embed", "mlp"): 1,
    ("layers", "expert", "mlp", "embed"): 1,
    ("layers", "embed", "expert"): 1,
    ("layers", "embed", "rank"): 1,
    ("layers", "mlp", "rank"): 1,
    ("layers", "heads", "head_dim", "rank"): 2,
    ("layers", "rank", "embed"): 1,
    ("layers", "rank", "mlp"): 1,
    ("layers", "rank", "heads", "head_dim"): 1,
    ("layers", "rank", "kv_heads", "head_dim"): 1,
    ("layers", "embed", "taps", "gates", "mlp"): 2,
    ("layers", "embed", "gates", "mlp"): 1,
    ("embed", "mlp"): 1,
    ("mlp", "embed"): 1,
    ("embed", "rank"): 1,
}


@pytest.mark.parametrize("axes", ROWS, ids="-".join)
def test_the_rows_of_a_matrix_are_what_its_map_sums_over(axes):
    rows, columns = muon.matrix_dimensions(axes)
    *_, last = axes
    stacked = [i for i, n in enumerate(axes) if n == "layers" or (n == "expert" and n != last)]
    assert list(rows) + list(columns) == [i for i in range(len(axes)) if i not in stacked]
    assert len(rows) == ROWS[axes]


@pytest.mark.parametrize("name", ["decoder", "moe", "encoder", "encoder_decoder", "conv", "lstm"])
def test_the_matrices_of_every_model_are_known(rules_on, name):
    """A model with another set of axes has to say here what the rows are."""
    sizes = {"vocab_size": 32, "num_layers": 2, "embed_dim": 16}
    heads = {"num_heads": 4, "max_length": 8}
    targets = ("query", "key", "value", "out", "up", "down", "head")
    lora = {"lora": LoraConfig(rank=2, targets=targets), "tie_embeddings": False}
    model, changes = {
        "decoder": (decoder, {**heads, **lora, "num_kv_heads": 2}),
        "moe": (decoder, {**heads, "moe": MoeConfig(num_experts=4)}),
        "encoder": (encoder, {**heads, "pooler_dim": 8}),
        "encoder_decoder": (encoder_decoder, heads),
        "conv": (conv, {"kernel_size": 3}),
        "lstm": (lstm, {"hidden_dim": 24}),
    }[name]
    model = model.build(model.Config(**sizes, **changes), rules_on())
    zeros = jnp.zeros((1, 4), jnp.int32)
    tokens = Tokens(zeros, zeros + 1, zeros)
    source = tokens if model.config.takes_encoder else None

    def everything(model, tokens, encoder):
        return model.logits(model(tokens, encoder=encoder).hidden)

    init = functools.partial(model.init, method=everything)
    boxed = jax.eval_shape(init, jax.random.key(0), tokens, source)["params"]
    is_box = {"is_leaf": lambda x: isinstance(x, nn.Partitioned)}
    names = jax.tree.leaves(
        jax.tree.map(lambda leaf: leaf.names, boxed, **is_box),
        **{"is_leaf": lambda x: isinstance(x, tuple)},
    )
    found = {
        n
        for n, r in zip(names, jax.tree.leaves(parameter_roles(boxed)), strict=True)
        if r == "matrix"
    }
    assert found and found <= set(ROWS), found - set(ROWS)


def test_muon_makes_adapters_and_convolutions_orthogonal_as_the_maps_that_they_are():
    axes = {
        "lora_b": ("layers", "rank", "heads", "head_dim"),
        "convolution": ("layers", "embed", "taps", "gates", "mlp"),
    }
    shapes = {"lora_b": (3, 4, 4, 6), "convolution": (3, 6, 3, 2, 7)}
    config = config_of("muon", 1.0, CONSTANT, weight_decay=0.0, clip_norm=0.0)
    params, gradient = random_tree(shapes, 0), random_tree(shapes, 1)
    [after], _ = run(config, params, [gradient], box(shapes, shapes, axes))
    for name, (rows, columns) in {"lora_b": (4, 24), "convolution": (18, 14)}.items():
        update = (np.asarray(after[name]) - params[name]).reshape(3, rows, columns)
        singular = np.linalg.svd(update, compute_uv=False) / (0.2 * max(rows, columns) ** 0.5)
        assert 0.6 < singular.min() <= singular.max() < 1.3, name


def test_bfloat16_moments_leave_the_constants_of_muon_exact():
    """One step of a momentum that bfloat16 holds exactly is that of float32, to every bit."""
    shapes, axes = {"up": (8, 16)}, {"up": ("embed", "mlp")}
    params = random_tree(shapes, 0)
    gradient = {"up": np.random.default_rng(1).integers(-8, 8, (8, 16)).astype(np.float32)}
    steps = []
    for dtype in ("float32", "bfloat16"):
        config = config_of("muon", 1.0, CONSTANT, moment_dtype=dtype, clip_norm=0.0)
        [after], _ = run(config, params, [gradient], box(shapes, shapes, axes))
        steps.append(np.asarray(after["up"]))
    np.testing.assert_array_equal(*steps)


# moments that are factored and not, of more layers than a layer has rows, and of one number
ADAFACTOR = {
    "up": ((3, 128, 130), ("layers", "embed", "mlp")),
    "out": ((140, 2, 130, 4), ("layers", "heads", "head_dim", "embed")),
    "scale": ((3, 6), ("layers", None)),
    "gain": ((3, 1), ("layers", None)),
}


def test_adafactor_updates_stacked_layers_as_it_updates_each():
    """Gradients and parameters whose sizes differ from layer to layer by up to 100."""
    shapes = {n: shape for n, (shape, _) in ADAFACTOR.items()}
    axes = {n: names for n, (_, names) in ADAFACTOR.items()}
    config = OptimizerConfig("adafactor", 0.1, CONSTANT, clip_norm=0.0)

    def uneven(seed):
        def one(x):
            sizes = 10.0 ** np.random.default_rng(seed).uniform(-1, 1, len(x))
            return x * sizes.astype(np.float32).reshape(-1, *[1] * (x.ndim - 1))

        return {n: one(x) for n, x in random_tree(shapes, seed).items()}

    trees = [uneven(seed) for seed in range(4)]  # parameters and three gradients
    (*_, stacked), state = run(config, trees[0], trees[1:], box(shapes, shapes, axes))
    for name, (shape, names) in ADAFACTOR.items():
        boxed = box([name], {name: shape[1:]}, {name: names[1:]})
        for layer in (0, len(stacked[name]) - 1):
            own = [{name: tree[name][layer]} for tree in trees]
            (*_, alone), _ = run(config, own[0], own[1:], boxed)
            np.testing.assert_allclose(
                stacked[name][layer], alone[name], rtol=1e-5, atol=1e-6, err_msg=name
            )
    sizes = {n: x.shape for n, x in optax.tree.get(state, "v_row").items()}
    assert sizes == {"up": (3, 128), "out": (1,), "scale": (1,), "gain": (1,)}


def test_the_average_of_weights_is_the_loop():
    config = OptimizerConfig("sgd", 0.1, CONSTANT, weight_decay=0.1, ema_decay=0.3)
    params = random_tree(SHAPES, 0)
    found, state = run(config, params, [random_tree(SHAPES, seed) for seed in range(1, 7)])
    expected = params
    for count, new in enumerate(found):
        d = min(0.3, (1 + count) / (10 + count))
        expected = {n: d * expected[n] + (1 - d) * np.asarray(new[n]) for n in new}
    averaged = averaged_params(state)
    for n in params:
        np.testing.assert_allclose(averaged[n], expected[n], atol=1e-6, err_msg=n)
    assert averaged_params(run(OptimizerConfig(), params, [params])[1]) is None


def test_averaging_leaves_the_updates_alone():
    gradients = [random_tree(SHAPES, seed) for seed in (1, 2)]
    params = random_tree(SHAPES, 0)
    (*_, plain), _ = run(OptimizerConfig(), params, gradients)
    (*_, averaged), _ = run(OptimizerConfig(ema_decay=0.9), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, plain, averaged)


def test_gradients_are_clipped_by_their_global_norm():
    gradient = random_tree(SHAPES, 1)
    norm = math.sqrt(sum(np.sum(np.square(g)) for g in gradient.values()))
    params = random_tree(SHAPES, 0)

    def step(clip_norm):
        config = OptimizerConfig("sgd", 1.0, CONSTANT, weight_decay=0.0, clip_norm=clip_norm)
        [after], _ = run(config, params, [gradient])
        return {n: params[n] - np.asarray(after[n]) for n in params}

    for n in params:
        np.testing.assert_allclose(step(0.5)[n], 0.5 / norm * gradient[n], atol=1e-6)
        np.testing.assert_allclose(step(0.0)[n], gradient[n], atol=1e-6)
        np.testing.assert_allclose(step(2 * norm)[n], gradient[n], atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_sharded_like_its_parameters(make_experiment, name):
    changes = {"optimizer.name": name, "optimizer.ema_decay": 0.9, "model.embed_dim": 64}
    state = make_experiment(changes, fsdp=4, tensor=2).abstract_state
    params = jax.tree_util.tree_leaves_with_path(state.params)
    held = jax.tree_util.tree_leaves_with_path(state.opt_state)
    copies = {"adamw": 3, "adafactor": 2, "lion": 2, "muon": None, "sgd": 2}[name]
    for path, leaf in params:
        own = [
            other for at, other in held if at[-len(path) :] == path and other.shape == leaf.shape
        ]
        if name == "muon":
            matrix = "weight" in str(path[-1]) and "layers" in str(path[0])
            copies = 2 if matrix else 3
        assert len(own) == copies, jax.tree_util.keystr(path)
        assert all(other.sharding == leaf.sharding for other in own)
    sharded = sum(not leaf.sharding.is_fully_replicated for _, leaf in params)
    assert sharded >= 6


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_moments_in_bfloat16_take_half_and_steer_the_same_way(name):
    boxed = {"w": nn.Partitioned(jax.ShapeDtypeStruct((8, 16), jnp.float32), ("embed", "mlp"))}
    params = {"w": jax.random.normal(jax.random.key(0), (8, 16))}
    updates, sizes = {}, {}
    for dtype in ("float32", "bfloat16"):
        config = config_of(name, schedule=CONSTANT, moment_dtype=dtype, weight_decay=0.0)
        tx = make_optimizer(config, boxed, 10)
        state = tx.init(params)
        for step in range(20):
            gradient = {"w": jax.random.normal(jax.random.key(step // 4), (8, 16))}
            updates[dtype], state = tx.update(gradient, state, params)
        moments = [x for x in jax.tree.leaves(state) if x.ndim == 2]
        assert moments and {x.dtype for x in moments} == {jnp.dtype(dtype)}
        sizes[dtype] = sum(x.nbytes for x in moments)
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    a, b = (np.asarray(updates[dtype]["w"]) for dtype in ("float32", "bfloat16"))
    if name == "lion":  # signs: a few sums near zero fall on the other side
        assert np.mean(a == b) > 0.95
    else:
        # each step rounds at 2^-9; muon's orthogonalisation magnifies what is small
        assert 0 < np.linalg.norm(b - a) < 0.05 * np.linalg.norm(a)


def test_moments_that_bfloat16_would_round_away_are_refused():
    with pytest.raises(ValueError, match=r"b2 \(0\.999\) must be at most 0\.99 .*bfloat16"):
        check(OptimizerConfig(b2=0.999, moment_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"adafactor.*moment_dtype \(bfloat16\)"):
        check(OptimizerConfig("adafactor", moment_dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"moment_dtype \('float16'\) must be one of float32,"):
        check(OptimizerConfig(moment_dtype="float16"))
    with pytest.raises(ValueError, match=r"memory \('disk'\) must be one of device, host"):
        check(OptimizerConfig(memory="disk"))
