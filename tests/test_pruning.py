"""Pruning: its masks by NumPy, what stays 0, shards, types, resuming, export, and mistakes.

Three steps on other meshes: bounds are those of tests/test_distillation.py.
"""

import dataclasses
import functools
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import safe_open

from lm.checkpoint import restore as stored
from lm.config.components import COMPONENTS, component
from lm.config.schema import PruningConfig, ScheduleConfig
from lm.hf.exporting import export_folder
from lm.models import flops
from lm.optim import optimizer_state, param_tree, pruning
from lm.optim.chain import check, make_optimizer
from lm.storage.epaths import StoragePath
from lm.telemetry import metrics
from lm.training import loop

pytestmark = pytest.mark.usefixtures("shared_steps")
AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "router": ("layers", "embed", "expert"),
    "lora_a": ("layers", "embed", "rank"),
    "bias": ("layers", "mlp"),
    "query": ("layers", "embed", "heads", "head_dim"),
    "out": ("layers", "heads", "head_dim", "embed"),
    "experts": ("layers", "expert", "embed", "mlp"),
}
SHAPES = {
    "embedding": (10, 8),
    "head": (8, 10),
    "router": (3, 8, 4),
    "lora_a": (3, 8, 2),
    "bias": (3, 5),
    "query": (3, 8, 2, 6),
    "out": (3, 2, 6, 8),
    "experts": (3, 4, 8, 5),
}
OPTIMIZERS = ("adafactor", "adamw", "lion", "muon", "sgd")
MATRICES = {"query": ((1,), (2, 3)), "out": ((1, 2), (3,)), "experts": ((2,), (3,))}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}


def boxed():
    of = jax.ShapeDtypeStruct
    return {n: nn.Partitioned(of(SHAPES[n], jnp.float32), axes) for n, axes in AXES.items()}


def train(own, gradients, name="adamw", rate=0.01, **changes):
    """[(parameters, masks, average) after each gradient]."""
    constant = ScheduleConfig(kind="constant")
    config = component(COMPONENTS["optimizer"], name).Config(
        name, rate, constant, pruning=PruningConfig(**own), ema_decay=0.9, **changes
    )
    tx = make_optimizer(config, boxed(), 100)
    params = tree(0)
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        masks = optimizer_state.pruning_state(state).masks
        found.append(jax.device_get((params, masks, optimizer_state.averaged_params(state))))
    return found


def as_matrices(x, name):
    """[matrices, inputs, outputs]."""
    inputs, outputs = MATRICES[name]
    rows, columns = (int(np.prod([x.shape[i] for i in dims])) for dims in (inputs, outputs))
    return np.asarray(x).reshape(-1, rows, columns)


def magnitude_mask(matrices, share):
    """True for all but the round(share * size) smallest of each matrix."""
    masks = []
    for matrix in matrices:
        order = np.argsort(np.abs(matrix), axis=None)
        mask = np.ones(matrix.size, bool)
        mask[order[: round(share * matrix.size)]] = False
        masks.append(mask.reshape(matrix.shape))
    return np.stack(masks)


def pattern_mask(matrices, n, m):
    count, rows, columns = matrices.shape
    groups = np.abs(matrices).reshape(count, rows // m, m, columns)
    order = np.argsort(-groups, axis=2, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :, :n], True, axis=2)
    return mask.reshape(matrices.shape)


# ---- masks ----


def test_sparsity_grows_by_the_cubic_and_takes_the_smallest_of_each_matrix():
    own = {"sparsity": 0.75, "start_step": 1, "ramp_steps": 4, "every": 2}
    found = train(own, [tree(seed) for seed in range(1, 8)])
    # arXiv:1710.01878, equation 1, at steps 1, 3 and 5; no pruning in between
    shares = [0, 0, 0, *[0.75 * (1 - (1 - 2 / 4) ** 3)] * 2, 0.75, 0.75]
    for step, (share, (params, masks, _)) in enumerate(zip(shares, found, strict=True)):
        for name in MATRICES:
            mask = as_matrices(masks[name], name)
            size = mask[0].size
            assert (~mask).sum((1, 2)).tolist() == [round(share * size)] * len(mask), (step, name)
            np.testing.assert_array_equal(params[name] != 0, masks[name])
    # without momentum the weights before the masks are known
    [(params, masks, _)] = train({"sparsity": 0.6}, [tree(1)], "sgd", weight_decay=0.0)
    gradient, start = tree(1), tree(0)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in gradient.values()))
    for name in MATRICES:
        before = as_matrices(start[name] - 0.01 * gradient[name] / norm, name)
        wanted = magnitude_mask(before, 0.6)
        np.testing.assert_array_equal(as_matrices(masks[name], name), wanted)
        after = as_matrices(params[name], name)
        np.testing.assert_allclose(after, np.where(wanted, before, 0), atol=1e-6)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 2)])
def test_a_pattern_keeps_the_largest_of_consecutive_inputs(n, m):
    [(params, masks, _)] = train({"pattern": f"{n}:{m}"}, [tree(1)], "sgd", weight_decay=0.0)
    for name in MATRICES:
        mask = as_matrices(masks[name], name)
        rate = 0.01 / np.sqrt(sum(np.sum(np.square(x)) for x in tree(1).values()))
        before = as_matrices(tree(0)[name] - rate * tree(1)[name], name)
        np.testing.assert_array_equal(mask, pattern_mask(before, n, m))
        assert (mask.reshape(len(mask), -1, m, mask.shape[2]).sum(2) == n).all()
        np.testing.assert_array_equal(params[name] != 0, masks[name])


def test_only_matrices_of_linear_maps_are_pruned_and_of_those_the_named_ones():
    [(params, masks, _)] = train({"sparsity": 0.5}, [tree(1)])
    assert set(masks) == set(MATRICES)
    assert all((params[name] != 0).all() for name in SHAPES.keys() - MATRICES.keys())
    [(_, masks, _)] = train({"sparsity": 0.5, "parameters": ("out", "exp*")}, [tree(1)])
    assert set(masks) == {"out", "experts"}


def test_of_equal_weights_a_pattern_keeps_the_first_and_a_sparsity_all():
    dims = pruning.matrix_dimensions(("embed", "mlp"))
    scores = pruning._scores(jnp.ones((8, 3)), jnp.ones((8, 3), bool))
    kept = pruning._largest_of_groups(scores, 2, 4, dims)
    assert kept.tolist() == [[True] * 3, [True] * 3, [False] * 3, [False] * 3] * 2
    assert pruning._largest(scores, jnp.float32(0.5), dims).all()


@pytest.mark.parametrize("rank", [0, 1, 34, 59])
def test_order_statistics_are_those_of_a_sort(rank):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, (2, 5, 3, 4), np.uint32)
    values[0, :, 1] = 7  # ties
    values[1, 0, 0, :2] = 0, 2**32 - 1
    found = pruning._order_statistic(jnp.asarray(values), jnp.int32(rank), (1, 2, 3))
    assert found.shape == (2, 1, 1, 1)
    assert found[:, 0, 0, 0].tolist() == np.sort(values.reshape(2, -1))[:, rank].tolist()


EVERY = [(own, name) for own in ("sparsity", "pattern") for name in OPTIMIZERS]
FEW = [("sparsity", "adamw"), ("pattern", "muon")]


@pytest.mark.parametrize(
    "kind, name", [*FEW, *(pytest.param(*x, marks=pytest.mark.slow) for x in EVERY if x not in FEW)]
)
def test_no_moment_brings_a_pruned_weight_back_to_weights_or_average(kind, name):
    own = {"sparsity": 0.5} if kind == "sparsity" else {"pattern": "2:4"}
    # moments of 3 steps before the first pruning, and updates as large as the weights; the last
    # pruning finds the same masks
    gradients = [tree(seed) for seed in range(1, 9)]
    found = train({**own, "start_step": 3, "every": 4}, gradients, name, 1.0)
    assert all(mask.all() for mask in found[2][1].values())
    for params, masks, average in found[3:]:
        for leaf in MATRICES:
            np.testing.assert_array_equal(masks[leaf], found[3][1][leaf])
            np.testing.assert_array_equal(params[leaf] != 0, masks[leaf])
            np.testing.assert_array_equal(average[leaf] != 0, masks[leaf])


def test_a_step_that_is_not_applied_postpones_no_later_pruning():
    config = dataclasses.replace(
        component(COMPONENTS["optimizer"], "adamw").Config(),
        pruning=PruningConfig(sparsity=0.5, start_step=5, every=2),
    )
    tx, params = make_optimizer(config, boxed(), 100), tree(0)
    update, state = jax.jit(tx.update), tx.init(params)
    for step, share in [(5, 0.5), (6, 0.0), (7, 0.5)]:  # of the run; updates that were applied: 0
        at = optimizer_state.set_schedule_step(state, jnp.int32(step))
        _, after = update(tree(1), at, params)
        pruned = optimizer_state.pruning_state(after)
        assert float(pruned.sparsity) == pytest.approx(share) and int(pruned.step) == step + 1


# ---- training ----

QUIET = {"guard.self_check": False, "optimizer.schedule.kind": "constant"}
HALF = {"optimizer.pruning.sparsity": 0.5, "optimizer.pruning.every": 1}
TWO_OF_FOUR = {"optimizer.pruning.pattern": "2:4"}


@pytest.fixture(scope="module")
def trained(make_experiment):
    """(own, dtype, **axes) -> (parameters, masks, info) after three steps."""

    @functools.cache
    def run(own, dtype="float32", **axes):
        changes = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.3, "model.dtype": dtype}
        stages = {"model.pipeline.num_microbatches": axes.get("stage", 1)}
        experiment = make_experiment({**changes, **stages, **QUIET, **dict(own)}, **axes)
        state, info = experiment.init_state(), {}
        for _, batch in experiment.batches(0, 3):
            state, _, info = experiment.train_step(state, batch)
        masks = optimizer_state.pruning_state(state.opt_state).masks
        return jax.device_get((state.params, masks, dict(info)))

    return run


SPLITS = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    pytest.param({"tensor": 4, "fsdp": 2}, marks=pytest.mark.slow),
    pytest.param({"stage": 2, "data": 4}, marks=pytest.mark.slow),
]
HALF_OF_EACH, TWO_OF_FOUR_INPUTS = tuple(HALF.items()), tuple(TWO_OF_FOUR.items())
OWN = [HALF_OF_EACH, TWO_OF_FOUR_INPUTS]


@pytest.mark.parametrize(
    "own", [pytest.param(HALF_OF_EACH, marks=pytest.mark.slow), TWO_OF_FOUR_INPUTS], ids=str
)
@pytest.mark.parametrize("split", SPLITS)
def test_shards_prune_as_one(trained, own, split):
    one, other = trained(own), trained(own, **split)
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])
    for x, y in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(x).max())
    assert one[2]["sparsity"] == other[2]["sparsity"] == 0.5
    mlp = one[1]["layers"]["mlp"]
    assert (~mlp["up"]["weight"]).mean((1, 2)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("own", [OWN[0], pytest.param(OWN[1], marks=pytest.mark.slow)], ids=str)
def test_in_bfloat16_too(trained, own):
    """Gradients differ by roundings of bfloat16, and so may the last weights that are pruned."""
    one, other = trained(own, "bfloat16"), trained(own, "bfloat16", **SPLITS[0])
    weights = [param_tree.flatten(x[0]) for x in (one, other)]
    masks = [param_tree.flatten(x[1]) for x in (one, other)]
    for name in weights[0]:
        x, y, same = weights[0][name], weights[1][name], True
        if name in masks[0]:
            same = masks[0][name] == masks[1][name]
            assert (~same).mean() < 0.01, name
            assert ((x != 0) == masks[0][name]).all()
        off = np.linalg.norm((x - y) * same) / np.linalg.norm(x)
        assert off < 2**-6, (name, off)


def test_the_norm_of_the_gradient_leaves_pruned_weights_out(make_experiment):
    experiment = make_experiment({**QUIET, **HALF, "optimizer.pruning.sparsity": 0.9})
    state = experiment.init_state()
    gradients = jax.jit(experiment.gradients)
    for step, batch in experiment.batches(0, 2):
        found, sums = jax.device_get(gradients(state.params, batch, step))
        masks = optimizer_state.pruning_state(state.opt_state).masks
        whole = float(optax.tree.norm(found)) / float(sums["tokens"])
        masked = optimizer_state.apply_masks(masks, found)
        wanted = float(optax.tree.norm(masked)) / float(sums["tokens"])
        state, _, info = experiment.train_step(state, batch)
        assert float(info["grad_norm"]) == pytest.approx(wanted, rel=1e-4)
        assert (wanted < 0.99 * whole) == (step == 1)


def test_without_pruning_there_is_no_mask_and_no_figure(make_experiment):
    experiment = make_experiment(QUIET)
    assert optimizer_state.pruning_state(experiment.abstract_state.opt_state) is None
    _, batch = next(experiment.batches(0, 1))
    assert "sparsity" not in experiment.train_step(experiment.init_state(), batch)[2]


# ---- runs ----


def checksums(folder, step):
    manifest = stored.read_manifest(StoragePath(str(folder)) / "checkpoints" / str(step))
    return {name: leaf.checksum for name, leaf in manifest.leaves.items()}


RAMP = {
    **{f"optimizer.pruning.{k}": v for k, v in (("start_step", 1), ("ramp_steps", 4))},
    **{"train.num_steps": 8, "checkpoint.every": 4, "train.log_every": 1},
    **{"optimizer.ema_decay": 0.5, "checkpoint.keep_last": 9},
}


@pytest.fixture(scope="module")
def finished(make_config, devices, tmp_path_factory):
    """(config, folder) of a run whose sparsity grows from step 1 to 5, saved at 4 and 8."""
    folder = tmp_path_factory.mktemp("pruned")
    config = make_config({**QUIET, **HALF, **RAMP})
    config.mesh.data, config.mesh.fsdp = 1, 2
    loop.train(config, str(folder), devices[:2])
    return config, folder


def test_a_run_that_resumes_amid_its_ramp_has_the_same_bits(finished, devices, tmp_path):
    config, folder = finished
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "8")
    loop.train(config, str(again), devices[:2])
    assert checksums(again, 8) == checksums(folder, 8)
    changed = [n for n, x in checksums(folder, 4).items() if x != checksums(folder, 8)[n]]
    assert any("masks" in name for name in changed)


def test_the_log_has_the_sparsity_of_each_step(finished):
    records = [r for r in metrics.read(str(finished[1])) if r["kind"] == "train"]
    wanted = [0.5 * (1 - (1 - min(max(step - 1, 0) / 4, 1)) ** 3) for step in range(8)]
    assert [r["sparsity"] for r in records] == pytest.approx(wanted, abs=0.005)


def test_masks_in_the_memory_of_the_host_and_beside_frozen_parameters(make_experiment):
    own = {"optimizer.memory": "host", "optimizer.frozen": ("layers.mlp.up.*",)}
    experiment = make_experiment({**QUIET, **TWO_OF_FOUR, **own})
    state = experiment.init_state()
    before = np.asarray(state.params["layers"]["mlp"]["up"]["weight"])
    [(_, batch)] = experiment.batches(0, 1)
    state, _, _ = experiment.train_step(state, batch)
    masks = optimizer_state.pruning_state(state.opt_state).masks["layers"]["mlp"]
    assert masks["down"]["weight"].sharding.memory_kind == "pinned_host" and "up" not in masks
    np.testing.assert_array_equal(state.params["layers"]["mlp"]["up"]["weight"], before)
    down = np.asarray(state.params["layers"]["mlp"]["down"]["weight"])
    assert ((down != 0).reshape(2, -1, 4, 16).sum(2) == 2).all()


def test_an_export_has_the_zeros_where_hardware_looks_for_them(make_experiment, tmp_path):
    """Two of four along a row of [outputs, inputs], the layout of sparse tensor cores."""
    llama = {"model.positions": "rotary", "model.activation": "swiglu", "model.norm": "rms"}
    experiment = make_experiment({**QUIET, **TWO_OF_FOUR, **llama, "optimizer.ema_decay": 0.5})
    state = experiment.init_state()
    [(_, batch)] = experiment.batches(0, 1)
    state, _, _ = experiment.train_step(state, batch)
    params = optimizer_state.averaged_params(state.opt_state)
    export_folder(experiment, params, str(tmp_path / "out"), say=str)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as tensors:
        names = [n for n in tensors.keys() if n.endswith("_proj.weight")]  # noqa: SIM118
        assert len(names) == 14
        for name in names:
            rows = tensors.get_tensor(name)
            assert ((rows != 0).reshape(len(rows), -1, 4).sum(2) == 2).all(), name
        assert (tensors.get_tensor("model.embed_tokens.weight") != 0).all()


# ---- mistakes and costs ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sparsity": 1.0}, r"sparsity \(1\.0\) must be in \[0, 1\)"),
        ({"sparsity": 0.5, "pattern": "2:4"}, r"sparsity \(0\.5\) and .*pattern \(2:4\) exclude"),
        ({"pattern": "2-4"}, r"pattern \('2-4'\) must be N:M"),
        ({"pattern": "4:4"}, r"pattern \('4:4'\) must be N:M with 0 < N < M"),
        ({"pattern": "2:4", "ramp_steps": 100}, r"ramp_steps \(100\) is for sparsity"),
        ({"sparsity": 0.5, "ramp_steps": 250}, r"ramp_steps \(250\) .* by .*every \(100\)"),
    ],
)
def test_values_that_do_not_go_together_are_refused(changes, message):
    config = component(COMPONENTS["optimizer"], "adamw").Config(pruning=PruningConfig(**changes))
    with pytest.raises(ValueError, match=r"config\.optimizer\.pruning\..*" + message):
        check(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pattern": "3:5"}, r"pattern \(3:5\): the inputs of .*\(16\) must be divisible by 5"),
        ({"sparsity": 0.5, "start_step": 10}, r"start_step \(10\) \+ ramp_steps \(0\) .* \(10\)"),
        ({"sparsity": 0.5, "parameters": ("embedding.*",)}, r"parameters: 'embedding\.\*' matches"),
    ],
)
def test_runs_that_cannot_be_pruned_so_are_refused_before_a_compile(
    make_config, devices, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    config = make_config(QUIET)
    config.optimizer.pruning.update(changes)
    config.mesh.data = 1
    with pytest.raises(ValueError, match=r"config\.optimizer\.pruning.*" + message):
        loop.train(config, str(tmp_path / "run"), devices[:1])


def test_adapters_are_not_pruned(make_experiment):
    experiment = make_experiment({**QUIET, **HALF, "model.lora.rank": 2, "optimizer.frozen": ()})
    with pytest.raises(ValueError, match=r"no matrix .* adapters \(config\.model\.lora\.rank\)"):
        _ = experiment.abstract_state


def test_the_memory_of_a_plan_has_a_byte_for_each_weight_that_may_be_pruned(make_experiment):
    dense, pruned = (make_experiment({**QUIET, **own}).config for own in ({}, HALF))
    more = flops.optimizer_bytes(dense.model, pruned.optimizer)
    more -= flops.optimizer_bytes(dense.model, dense.optimizer)
    maps = [p for p in flops.abstract_parameters(dense.model) if p.role == "hidden"]
    assert more == sum(p.size for p in maps) + 8  # and two scalars
    schedule = dataclasses.replace(pruned.optimizer.pruning, start_step=500, ramp_steps=300)
    later = dataclasses.replace(pruned.optimizer, pruning=schedule)
    assert flops.optimizer_bytes(dense.model, later) == flops.optimizer_bytes(
        dense.model, pruned.optimizer
    )
