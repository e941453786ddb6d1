"""A pipeline computes what its layers compute one after the other, on any stages, in R M + S - 1
iterations, and nothing but activations goes from stage to stage in them.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import assert_bitwise
from test_checkpoint import noise as make_noise
from test_equivalence import CHANGES, STEPS, assert_equivalent

from lm.checkpoint.manager import Checkpoints
from lm.config.schema import CheckpointConfig
from lm.parallel import pipeline_stages
from lm.parallel.pipeline_stages import PipelineConfig, make_schedule

AXES = {"weight": ("embed", "mlp"), "bias": (None,)}


def toy(rules, schedule, params, x, rows, rng):
    """Layers that depend on their weights, their row numbers and their keys, in the pipeline."""

    def layer(params, number, x, shared, key):
        noise = jax.random.normal(key, ())
        x = jnp.tanh(x @ params["weight"] + params["bias"] + shared[:, None, None] + noise)
        x = rules.constrain(x, "batch", "length", "act_embed")
        return x, {"noise": noise, "sum": jnp.sum(x)}

    return pipeline_stages.pipeline(
        layer,
        lambda rows, _: jnp.cos(rows),
        params,
        jnp.arange(schedule.group_size),
        x,
        rows,
        schedule=schedule,
        rules=rules,
        rng=rng,
    )


def loop(params, x, rows, rng):
    """The same one after the other."""
    out, outputs = [], []
    for m in range(x.shape[0]):
        y, found = x[m], []
        for i in range(params["bias"].shape[0]):
            noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(rng, i), m), ())
            shared = jnp.cos(rows[m])[:, None, None]
            y = jnp.tanh(y @ params["weight"][i] + params["bias"][i] + shared + noise)
            found.append({"noise": noise, "sum": jnp.sum(y)})
        out.append(y)
        outputs.append(jax.tree.map(lambda *a: jnp.stack(a), *found))
    return jnp.stack(out), jax.tree.map(lambda *a: jnp.stack(a), *outputs)


def gradients(function, params, x, *rest):
    """(outputs, gradients of a function of all of them)."""

    def total(params, x):
        y, outputs = function(params, x, *rest)
        weighted = jnp.sum(
            outputs["sum"] * jnp.cos(jnp.arange(outputs["sum"].size)).reshape(outputs["sum"].shape)
        )
        return jnp.sum(y * jnp.sin(jnp.arange(y.size).reshape(y.shape))) + weighted, (y, outputs)

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)


# stages, micro-batches, repeats, layers, other axes: with and without micro-batches that wait for
# their next repeat, with repeats that share a divisor with the stages and that don't
SCHEDULES = [(1, 3, 1, 2, {}), (2, 6, 3, 6, {})]
MORE_SCHEDULES = [
    (2, 4, 2, 8, {"fsdp": 2, "tensor": 2}),
    (4, 8, 3, 12, {"data": 2}),
    (2, 2, 1, 2, {"data": 2}),
    (4, 4, 1, 4, {"sequence": 2}),
    (4, 4, 2, 8, {"fsdp": 2}),
    (4, 12, 4, 16, {}),
    (8, 8, 1, 8, {}),
]


@pytest.mark.parametrize(
    ("s", "m", "r", "num_layers", "axes"),
    [*SCHEDULES, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE_SCHEDULES)],
)
def test_stages_compute_what_layers_in_a_row_do(rules_on, s, m, r, num_layers, axes):
    rules = rules_on(stage=s, **axes)
    schedule = make_schedule(PipelineConfig(m, r), num_layers, rules)
    rng = np.random.default_rng(0)
    params = {
        "weight": rng.normal(size=(num_layers, 4, 4)).astype(np.float32) / 2,
        "bias": rng.normal(size=(num_layers, 4)).astype(np.float32),
    }
    x = rng.normal(size=(m, 4, 2, 4)).astype(np.float32)
    rows = np.arange(m * 4, dtype=np.int32).reshape(m, 4)
    key = jax.random.key(3)
    ours = functools.partial(toy, rules, schedule)
    found = jax.jit(lambda p, x: gradients(ours, p, x, rows, key))(params, x)
    expected = jax.jit(lambda p, x: gradients(loop, p, x, rows, key))(params, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    noise = np.asarray(found[0][1][1]["noise"])
    assert noise.shape == (m, num_layers) and len(np.unique(noise)) == noise.size


# ---- the schedule ----


def lowered_toy(rules, schedule):
    shapes = {"weight": (schedule.num_layers, 4, 4), "bias": (schedule.num_layers, 4)}
    params = {
        name: jax.ShapeDtypeStruct(
            shapes[name], jnp.float32, sharding=rules.sharding("layers", *AXES[name])
        )
        for name in AXES
    }
    m = schedule.num_microbatches
    x = jax.ShapeDtypeStruct((m, 4, 2, 4), jnp.float32)
    rows = jax.ShapeDtypeStruct((m, 4), jnp.int32)
    ours = functools.partial(toy, rules, schedule)

    def run(params, x, rows):
        return gradients(ours, params, x, rows, jax.random.key(0))[1]

    return jax.jit(run).lower(params, x, rows).compile().as_text()


@pytest.fixture(scope="module")
def circular(rules_on):
    """(schedule, program) of four stages and two repeats, without any other axis."""
    rules = rules_on(stage=4)
    schedule = make_schedule(PipelineConfig(8, 2), 16, rules)
    return schedule, lowered_toy(rules, schedule)


def test_the_bubble_is_the_formulas(circular):
    """Counted in the compiled program: both ways, its loop has this many iterations, in each of
    which every stage runs a group of layers, be there work for it or not.
    """
    schedule, program = circular
    s, m, r = schedule.num_stages, schedule.num_microbatches, schedule.num_repeats
    loops = re.findall(
        r'op_name="(jit\(run\)/(?:transpose\()?jvp\(\)\)?/while)".*"known_trip_count":\{"n":"(\d+)"\}',
        program,
    )
    [(_, forwards), (_, backwards)] = [(name, int(trips)) for name, trips in loops]
    assert forwards == backwards == schedule.num_iterations == 19
    work = s * m * r
    assert (s * forwards - work) / (s * forwards) == pytest.approx((s - 1) / (r * m + s - 1))
    assert schedule.bubble == pytest.approx(3 / 19)


def test_only_activations_go_from_stage_to_stage(circular):
    """On a mesh of stages alone every collective crosses them: in the loops these are permutes of
    one micro-batch, and before and after them weights move by permutes, never by gathering.
    """
    schedule, program = circular
    found = re.findall(
        r" = (\S+) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?"
        r"\(.*op_name=\"([^\"]*)",
        program,
    )
    inside = [(shape, kind) for shape, kind, name in found if "while/body" in name]
    # forwards and backwards: to the next stage, of what waits, and of the stream
    assert [kind for _, kind in inside] == ["collective-permute"] * 6
    assert {shape.split("{")[0] for shape, _ in inside} == {"f32[1,4,2,4]"}
    outside = [(kind, name) for _, kind, name in found if "while/body" not in name]
    exchanges = [kind for kind, name in outside if "ppermute" in name]
    repeats, parameters, directions = schedule.num_repeats, 2, 2
    assert exchanges == ["collective-permute"] * (repeats * parameters * directions)
    assert not {"all-gather", "all-to-all"} & {kind for kind, _ in outside}


@pytest.mark.parametrize(("s", "r"), [(2, 2), (2, 3), (4, 2), (4, 3), (4, 6), (6, 4), (8, 8)])
def test_an_exchange_gives_every_group_to_its_stage_once(s, r):
    index, target, repeat = pipeline_stages._rounds(s, r)
    np.testing.assert_array_equal(np.sort(target, axis=1), np.tile(np.arange(s), (r, 1)))
    groups = (np.arange(s) * r + index).ravel()
    moved = dict(zip(groups, zip(target.flat, repeat.flat, strict=True), strict=True))
    assert moved == {g: (g % s, g // s) for g in range(s * r)}


# ---- the model ----

PIPELINE = "model.pipeline."
LAYERS = {"model.num_layers": 8, "optimizer.learning_rate": 0.1}
RUNS = {
    "stage2_tensor2_fsdp2_twice": (
        {"num_microbatches": 4, "num_repeats": 2},
        {"stage": 2, "tensor": 2, "fsdp": 2},
    ),
}
SLOW = {
    "stage4_fsdp2": ({"num_microbatches": 8}, {"stage": 4, "fsdp": 2}),
    "stage2_data4_twice": ({"num_microbatches": 2, "num_repeats": 2}, {"stage": 2, "data": 4}),
    "stage2_tensor2_fsdp2": ({"num_microbatches": 4}, {"stage": 2, "tensor": 2, "fsdp": 2}),
    "stage2_data4": ({"num_microbatches": 2}, {"stage": 2, "data": 4}),
    "stage2_sequence2_data2": (
        {"num_microbatches": 4, "num_repeats": 2},
        {"stage": 2, "sequence": 2, "data": 2},
    ),
    "accumulated": (
        {"num_microbatches": 2, "train.num_microbatches": 2},
        {"stage": 2, "data": 2, "fsdp": 2},
    ),
    "one_device": ({"num_microbatches": 4}, {}),
    # every stage has two layers in each repeat, the period of the pattern
    "stage4_fsdp2_twice": (
        {"num_microbatches": 8, "num_repeats": 2, "model.num_layers": 16},
        {"stage": 4, "fsdp": 2},
    ),
}


def dotted(changes):
    return {name if "." in name else PIPELINE + name: value for name, value in changes.items()}


@pytest.fixture(scope="module")
def trained(make_experiment, packed_batch):
    """(changes, **axes) -> [(sums, state, info), ...] on packed, uneven rows."""
    cache = {}

    def run(changes, **axes):
        key = (str(changes), str(axes))
        if key in cache:
            return cache[key]
        experiment = make_experiment(CHANGES | LAYERS | dotted(changes), **axes)
        state, found = experiment.init_state(), []
        for step in range(STEPS):
            batch = packed_batch(16, 32, 264, seed=step)
            state, sums, info = experiment.train_step(state, experiment.make_global_batch(batch))
            found.append(jax.device_get((dict(sums), state, dict(info))))
            state = jax.device_put(found[-1][1], jax.tree.map(lambda x: x.sharding, state))
        return cache.setdefault(key, found)

    return run


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_stages_train_as_one_device_does_without_a_pipeline(trained, name):
    """Loss, gradients, and parameters of three steps, within 5e-6 of the largest of each array."""
    changes, axes = (RUNS | SLOW)[name]
    same = {n: v for n, v in changes.items() if n == "model.num_layers"}
    assert_equivalent(trained(same), trained(changes, **axes))


VARIANTS = {
    "relative": {"positions": "relative", "norm_placement": "both", "remat": "full"},
    "alibi": {"positions": "alibi", "norm_placement": "post", "scan_unroll": -1},
    "learned": {"positions": "learned", "parallel_block": True, "qk_norm": True, "norm": "layer"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_layer_passes_the_stages(make_experiment, packed_batch, name):
    """With dropout, drawn for each layer and micro-batch: the same on any stages and on one
    device. Gradients of training, and the loss of an evaluation.
    """
    changes = {f"model.{n}": v for n, v in VARIANTS[name].items()}
    changes |= {"model.dropout": 0.3, "model.attention_dropout": 0.3, "model.num_layers": 4}
    changes |= dotted({"num_microbatches": 4, "num_repeats": 2})
    batch, found = packed_batch(16, 32, 264), []
    for axes in ({}, {"stage": 2, "fsdp": 2}):
        experiment = make_experiment(changes, **axes)
        params, global_batch = experiment.init_state().params, experiment.make_global_batch(batch)
        step = jax.jit(functools.partial(experiment.gradients, step=0))
        found.append(
            jax.device_get((step(params, global_batch), experiment.eval_step(params, global_batch)))
        )
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(a).max(), err_msg=where)
    trained, evaluated = found[0][0][1]["loss"], found[0][1]["loss"]
    assert abs(trained - evaluated) > 1e-3 * evaluated  # dropout acts


def test_checkpoints_pass_between_runs_with_and_without_a_pipeline(make_experiment, tmp_path):
    """Bitwise: parameters are stored in the order of their layers, whatever the stages."""
    with_pipeline = CHANGES | LAYERS | dotted({"num_microbatches": 4, "num_repeats": 2})
    plain = make_experiment(CHANGES | LAYERS, fsdp=4)
    staged = make_experiment(with_pipeline, stage=2, tensor=2, fsdp=2)
    for number, (one, other) in enumerate([(plain, staged), (staged, plain)]):
        state = make_noise(one.abstract_state, 7)
        folder = str(tmp_path / str(number))
        with Checkpoints(folder, CheckpointConfig()) as checkpoints:
            checkpoints.save(state)
        with Checkpoints(folder, CheckpointConfig(), read_only=True) as checkpoints:
            restored, _ = checkpoints.restore(other.abstract_state)
        assert_bitwise(jax.device_get(restored), jax.device_get(state))


def test_a_stage_holds_its_layers_alone(make_experiment):
    changes = LAYERS | dotted({"num_microbatches": 4})
    params = make_experiment(changes, stage=4, fsdp=2).abstract_params
    up = params["layers"]["mlp"]["up"]["weight"]  # [L, D, F]
    assert up.sharding.shard_shape(up.shape) == (2, 8, 32)


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "axes", "message"),
    [
        ({}, {"stage": 2}, r"num_microbatches \(1\) must be a multiple of mesh stage \(2\)"),
        (
            {"num_microbatches": 6},
            {"stage": 4},
            r"num_microbatches \(6\) must be a multiple of mesh stage \(4\)",
        ),
        (
            {"num_microbatches": 4, "model.num_layers": 6},
            {"stage": 4},
            r"num_layers \(6\) must be divisible by mesh stage \(4\) \* "
            r"config.model.pipeline.num_repeats \(1\)",
        ),
        (
            {"num_microbatches": 4, "num_repeats": 3},
            {"stage": 2},
            r"num_layers \(8\) must be divisible by mesh stage \(2\) \* "
            r"config.model.pipeline.num_repeats \(3\)",
        ),
        (
            {"num_microbatches": 8},
            {"stage": 2, "data": 4},
            r"data.batch_size \(16\) must be divisible by mesh data\*fsdp\*expert \(4\) \* "
            r"config.train.num_microbatches \(1\) \* config.model.pipeline.num_microbatches \(8\)",
        ),
        (
            {
                "num_microbatches": 2,
                "num_repeats": 4,
                "model.layer_pattern": ("local", "global"),
                "model.window": 5,
            },
            {"stage": 2},
            r"layer_pattern \(2 layers\) must divide the layers that a stage has in each repeat "
            r"\(1\)",
        ),
        ({"num_microbatches": 0}, {}, r"pipeline.num_microbatches \(0\) must be at least 1"),
    ],
)
def test_what_the_stages_do_not_divide_is_refused(make_experiment, changes, axes, message):
    with pytest.raises(ValueError, match=message):
        make_experiment(LAYERS | dotted(changes), **axes)


def test_a_forward_pass_of_rows_that_make_no_micro_batches_is_refused(rules_on):
    rows = np.zeros((6, 2))
    with pytest.raises(ValueError, match=r"of 6 rows must be divisible by mesh .*\(2\) \* .*\(2\)"):
        pipeline_stages.split(rules_on(fsdp=2), 2, rows)


def test_generation_on_several_stages_is_refused(make_experiment, pack):
    experiment = make_experiment(LAYERS | dotted({"num_microbatches": 2}), stage=2)
    tokens = pack([[4], [4]], length=4, vocab_size=264)

    def decode(params):
        cache = experiment.model.init_cache(2, 8)
        return experiment.model.apply({"params": params}, tokens, cache=cache).hidden

    with pytest.raises(ValueError, match=r"config.mesh.stage \(2\) must be 1"):
        jax.eval_shape(decode, experiment.abstract_params)


def test_micro_batches_are_the_same_rows_on_any_mesh(rules_on):
    """Micro-batch m has rows m, m + M, ..., in this order."""
    rows = jnp.arange(24)
    for axes in ({}, {"data": 2}, {"fsdp": 4, "stage": 2}):
        rules = rules_on(**axes)
        parts = pipeline_stages.split(rules, 3, pipeline_stages.interleave(rules, 3, rows))
        np.testing.assert_array_equal(parts, np.arange(24).reshape(8, 3).T)
        np.testing.assert_array_equal(
            pipeline_stages.merge(rules, pipeline_stages.split(rules, 3, rows)), rows
        )
