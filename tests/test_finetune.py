"""Runs that begin with another run's parameters, keep some of them, or train adapters alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment import run_script

from lm.checkpoint import step_files
from lm.checkpoint.manager import Checkpoints
from lm.config.schema import CheckpointConfig
from lm.hf.exporting import export_folder
from lm.layers import lora
from lm.models import flops
from lm.optim import param_tree
from lm.scaling import run_table
from lm.telemetry import metrics
from lm.training.evaluation import evaluate
from lm.training.loop import train
from lm.training.merge_lora import merge_run
from lm.training.restore import eval_params, restore, restore_params
from lm.training.stored_run import load

LORA = {
    "model.lora.rank": 2,
    "model.lora.targets": ("query", "value", "down"),
    "optimizer.learning_rate": 0.03,
}


def names(tree):
    return set(param_tree.flatten(tree))


def bits(tree):
    return {name: np.asarray(x).tobytes() for name, x in param_tree.flatten(tree).items()}


def run(config, workdir, devices):
    """Trains to the end and returns (experiment, checkpoint folder, whole parameters)."""
    train(config, str(workdir), devices)
    experiment = load(str(workdir), devices[:1])
    step, params = restore_params(experiment, str(workdir))
    return experiment, workdir / "checkpoints" / str(step), params


@pytest.fixture(scope="module")
def base(make_config, devices, tmp_path_factory):
    """(folder, parameters) of a short run of an untied model."""
    folder = tmp_path_factory.mktemp("base")
    config = make_config(
        {"model.tie_embeddings": False, "train.num_steps": 3, "guard.self_check": False}
    )
    _, _, params = run(config, folder, devices[:1])
    return folder, params


@pytest.fixture
def tuned_config(make_config, base):
    """(changes by dotted path) -> the config of two more steps that begin with `base`."""

    def make(changes=None):
        return make_config(
            {
                "init.from_": str(base[0]),
                "model.tie_embeddings": False,
                "train.num_steps": 2,
                "guard.self_check": False,
                **(changes or {}),
            }
        )

    return make


@pytest.fixture
def tuned(tuned_config, devices):
    """(changes by dotted path, **mesh axes) -> the Experiment of `tuned_config`."""
    from lm.training.experiment import Experiment

    def make(changes=None, **axes):
        config = tuned_config(changes)
        config.mesh.update({"data": 1, **axes})
        return Experiment(config, devices[: int(np.prod(list(axes.values()), dtype=int))])

    return make


# ---- init.from ----


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_a_run_begins_with_the_bits_of_its_base_on_any_mesh(tuned, base, axes):
    experiment = tuned(**axes)
    state = experiment.init_state()
    assert bits(state.params) == bits(base[1])
    assert int(state.step) == 0
    for leaf, wanted in zip(
        jax.tree.leaves(state), jax.tree.leaves(experiment.abstract_state), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_new_parameters_are_those_of_a_run_without_a_base(tuned, make_experiment, base):
    changes = {"init.new": ("head.*",), "init.skip": ("head.*",)}
    params = tuned(changes).init_state().params
    fresh = make_experiment({"model.tie_embeddings": False}).init_state().params
    assert bits(params["head"]) == bits(fresh["head"])
    assert bits(params["layers"]) == bits(base[1]["layers"]) != bits(fresh["layers"])


@pytest.mark.parametrize(
    "changes, lines",
    [
        ({"model.qkv_bias": True}, ["only in this run: layers.attention.query.bias, float32 ["]),
        ({"model.tie_embeddings": True}, ["only in the checkpoint: head.weight, float32 ["]),
        (
            {"model.mlp_dim": 48},
            ["differs: layers.mlp.up.weight, float32 [2, 16, 32] in the checkpoint, "
             "float32 [2, 16, 48] in this run"],
        ),
        ({"init.new": ("head.*",)}, ["only in the checkpoint: head.weight"]),
        ({"init.skip": ("head.*",)}, ["only in this run: head.weight"]),
        ({"init.new": ("haed.*",)}, ["config.init.new: 'haed.*' matches none", "head.weight"]),
        ({"init.skip": ("haed.*",)}, ["config.init.skip: 'haed.*' matches none", "head.weight"]),
        ({"init.step": 2}, ["no checkpoint of step 2; there are [3]"]),
        ({"init.from_": "", "init.skip": ("head.*",)}, ["config.init.from, which is not given"]),
        ({"optimizer.frozen": ("*",)}, ["leaves nothing to train"]),
        ({"model.lora.rank": 2, "model.lora.targets": ("querry",)}, ["no linear map", "'querry'"]),
    ],
    ids=str,
)  # fmt: skip
def test_lists_that_are_not_exact_are_refused_with_both_sides(tuned, changes, lines):
    experiment = tuned(changes)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        _ = experiment.initializer.frozen, experiment.initializer.new, experiment.initializer.parent
    for line in lines:
        assert line in str(caught.value)


def test_the_base_is_not_read_again_when_the_run_goes_on(tuned_config, base, devices, tmp_path):
    config = tuned_config({"optimizer.schedule.kind": "constant"})  # which may be made longer
    _, folder, _ = run(config, tmp_path / "run", devices[:1])
    parent = step_files.read_manifest(folder).parent
    assert (parent["workdir"], parent["step"]) == (str(base[0]), 3)
    config.init.from_, config.train.num_steps = "nowhere", 3
    _, folder, _ = run(config, tmp_path / "run", devices[:1])
    assert step_files.read_manifest(folder).parent == parent


def test_the_flag_is_spelled_init_from(tmp_path):
    """`from` is a keyword of Python, in which ml_collections reads the paths of flags."""
    for flag in (["--config.init.from=runs/x"], ["--config.init.from", "runs/x"]):
        done = run_script("train", "--config=configs/smoke.py", "--explain", *flag)
        assert "--config.init.from_='runs/x'" in done.stdout


# ---- frozen parameters ----


def test_frozen_parameters_keep_every_bit_and_have_no_optimizer_state(tuned, base):
    frozen = ("embedding.*", "layers.attention.*")
    # decay, averages and a clipped norm would all show a parameter that they touch
    changes = {"optimizer.ema_decay": 0.5, "optimizer.weight_decay": 1.0}
    experiment = tuned({**changes, "optimizer.frozen": frozen})
    state = experiment.init_state()
    held = names(state.params) - names(experiment.initializer.trained(state.params))
    assert held == {
        n for n in names(state.params) if n.startswith(("embedding.", "layers.attention."))
    }
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    state_of = {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves}
    assert any("mlp" in name for name in state_of)
    assert not any("attention." in name or "embedding" in name for name in state_of)
    for _, batch in experiment.batches(0, 2):
        state, _, _ = experiment.train_step(state, batch)
    before, after = bits(base[1]), bits(state.params)
    assert {name for name in before if before[name] == after[name]} == held
    evaluated = bits(eval_params(experiment, state))
    assert all(evaluated[name] == after[name] for name in held)
    assert evaluated["head.weight"] != after["head.weight"]


def test_what_is_trained_gets_the_gradient_that_it_gets_beside_the_rest(tuned):
    whole, part = tuned(), tuned({"optimizer.frozen": ("head.*", "embedding.*")})
    params = whole.init_state().params
    batch = whole.make_global_batch(whole.train_data.batch_at(0))
    (all_of_them, _), (some, _) = (jax.jit(e.gradients)(params, batch, 0) for e in (whole, part))
    assert names(all_of_them) - names(some) == {"head.weight", "embedding.weight"}
    expected = part.initializer.trained(all_of_them)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        some,
        expected,
    )


def test_no_gradient_of_a_frozen_vocabulary_matrix_is_made(tuned):
    def shapes(frozen):
        experiment = tuned({"optimizer.frozen": frozen, "loss.chunk_size": 128})
        text = str(jax.make_jaxpr(experiment.gradients)(
            experiment.abstract_params, experiment.abstract_batch, 0
        ))  # fmt: skip
        products = re.findall(r":f32\[([\d,]+)\] = dot_general", text)
        return {tuple(map(int, p.split(","))) for p in products}

    head = {(16, 264), (264, 16)}
    assert shapes(()) & head
    assert not shapes(("head.*",)) & head


# ---- adapters ----


@pytest.fixture(scope="module")
def adapted(make_config, base, devices, tmp_path_factory):
    """(experiment, checkpoint folder, whole parameters) of a run of adapters on `base`."""
    workdir = tmp_path_factory.mktemp("lora")
    config = make_config(
        {"init.from_": str(base[0]), "model.tie_embeddings": False, "train.num_steps": 4,
         "guard.self_check": False, **LORA}
    )  # fmt: skip
    return run(config, workdir, devices[:1])


def hidden(experiment, params, tokens):
    return np.asarray(jax.jit(experiment.model.apply)({"params": params}, tokens).hidden)


def test_training_of_adapters_begins_with_the_function_of_the_base(tuned, make_experiment, base):
    experiment = tuned({**LORA, "model.lora.dropout": 0.5})
    plain = make_experiment({"model.tie_embeddings": False})
    tokens = experiment.train_data.batch_at(0).inputs
    params = experiment.init_state().params
    np.testing.assert_array_equal(
        hidden(experiment, params, tokens), hidden(plain, base[1], tokens)
    )


def test_only_adapters_are_trained_and_saved(adapted, base):
    _, folder, params = adapted
    before, after = bits(base[1]), bits(params)
    assert all(after[name] == before[name] for name in before)
    assert lora.adapters(after) == after.keys() - before.keys()
    assert all(np.any(params["layers"]["mlp"]["down"][name]) for name in lora.NAMES)
    stored_names = step_files.read_manifest(folder).leaves
    kept = {n.removeprefix("params.") for n in stored_names if n.startswith("params.")}
    assert kept == lora.adapters(after)
    assert not any("weight" in name for name in stored_names)


def test_frozen_weights_are_spared_a_third_of_their_flops_in_what_a_run_reports(adapted):
    experiment, folder, _ = adapted
    c = experiment.config
    record = metrics.read(str(folder.parent.parent))[-1]
    whole = flops.flops_per_token(c.model, c.data.length)
    assert 0.65 < experiment.flops_per_token / whole < 0.8
    assert record["flops_seen"] == record["tokens_seen"] * experiment.flops_per_token
    assert run_table._flops_per_token(c, [record]) == experiment.flops_per_token
    assert run_table._flops_per_token(c, [{"tokens_seen": 5}]) == whole  # of a run made before


def test_merged_adapters_compute_what_they_did_beside_the_weights(
    adapted, make_experiment, devices
):
    experiment, _, params = adapted
    plain = make_experiment({"model.tie_embeddings": False})
    merged = lora.merge(experiment.config.model.lora, params)
    assert names(merged) == names(plain.abstract_params)
    tokens = experiment.train_data.batch_at(0).inputs
    expected = hidden(experiment, params, tokens)
    found = hidden(plain, merged, tokens)
    assert np.abs(found - expected).max() <= 5e-6 * np.abs(expected).max()
    untouched = hidden(plain, param_tree.split(params, lora.adapters(names(params)))[1], tokens)
    assert np.abs(untouched - expected).max() > 1e-2 * np.abs(expected).max()


def test_a_merged_run_evaluates_as_the_adapted_one_without_its_base(
    adapted, base, devices, tmp_path
):
    experiment, folder, params = adapted
    changes = {"data.validation": ("synthetic:markov:64",)}
    merge_run(str(folder.parents[1]), str(tmp_path / "merged"), devices[:1])
    merged = load(str(tmp_path / "merged"), devices[:1], changes)
    assert not merged.config.init.from_ and not merged.config.model.lora.rank
    step, found = restore_params(merged, str(tmp_path / "merged"))
    assert step == 0 and names(found) == names(base[1])
    targets = ("query.weight", "value.weight", "down.weight")
    kept, before = bits(found), bits(base[1])
    assert {n for n in kept if kept[n] != before[n]} == {n for n in kept if n.endswith(targets)}
    losses = {
        name: evaluate(run, values)["synthetic:markov:64"]["loss"]
        for name, run, values in (
            ("adapted", experiment.variant(changes), params),
            ("merged", merged, found),
            ("base", merged, base[1]),
        )
    }
    assert losses["merged"] == pytest.approx(losses["adapted"], rel=1e-5)
    assert abs(losses["base"] - losses["adapted"]) > 1e-2
    assert step_files.read_manifest(tmp_path / "merged" / "checkpoints" / "0").parent == {
        "workdir": str(folder.parents[1]), "step": 4,
    }  # fmt: skip


def test_what_cannot_be_merged_is_refused(adapted, base, devices, tmp_path):
    with pytest.raises(ValueError, match="has no adapters to merge"):
        merge_run(str(base[0]), str(tmp_path / "x"), devices[:1])
    with pytest.raises(ValueError, match="holds a run already"):
        merge_run(str(adapted[1].parents[1]), str(base[0]), devices[:1])


@pytest.mark.parametrize("family", [None, "llama"])
def test_an_export_of_adapters_that_are_not_merged_names_the_script_that_merges(
    family, adapted, tmp_path
):
    experiment, _, params = adapted
    with pytest.raises(ValueError, match=r"lora\.rank is 2.*scripts/merge_lora\.py") as error:
        export_folder(experiment, params, str(tmp_path / "out"), family=family)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_adapters_save_bytes_of_checkpoints_and_of_the_optimizer(adapted, base, tuned):
    _, folder, params = adapted
    (whole,) = (base[0] / "checkpoints").iterdir()

    def stored_bytes(path):
        leaves = step_files.read_manifest(path).leaves.values()
        return sum(4 * np.prod(leaf.shape, dtype=int) for leaf in leaves)

    num_adapters = sum(
        x.size for n, x in param_tree.flatten(params).items() if n in lora.adapters(names(params))
    )
    assert stored_bytes(folder) <= 3 * 4 * num_adapters + 64  # parameters and two moments
    assert stored_bytes(folder) < stored_bytes(whole) / 4
    sizes = [
        sum(x.size for x in jax.tree.leaves(tuned(change).abstract_state.opt_state))
        for change in (LORA, {})
    ]
    assert sizes[0] < sizes[1] / 4


def test_a_run_of_adapters_goes_on_bitwise_and_only_with_its_own_base(
    tuned_config, base, devices, tmp_path, adapted
):
    from lm.training.experiment import Experiment

    config = tuned_config({**LORA, "optimizer.schedule.kind": "constant"})
    run(config, tmp_path / "run", devices[:1])
    config.train.num_steps = 4
    _, _, resumed = run(config, tmp_path / "run", devices[:1])
    _, _, once = run(config, tmp_path / "once", devices[:1])
    assert bits(resumed) == bits(once)

    other = tuned_config({"seed": 5, "init.from_": "", "train.num_steps": 3})
    run(other, tmp_path / "other", devices[:1])
    config.init.from_, config.train.num_steps = str(tmp_path / "other"), 5
    experiment = Experiment(config, devices[:1])
    with (
        pytest.raises(ValueError, match="are not those that this run's adapters were trained on"),
        Checkpoints(str(tmp_path / "run"), CheckpointConfig()) as checkpoints,
    ):
        restore(experiment, checkpoints)


def test_adapters_on_several_devices_train_as_on_one(tuned):
    states = []
    for axes in ({}, {"fsdp": 2, "tensor": 2}):
        experiment = tuned(LORA, **axes)
        state = experiment.init_state()
        for _, batch in experiment.batches(0, 2):
            state, _, _ = experiment.train_step(state, batch)
        states.append(jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *states)
    assert experiment.abstract_params["layers"]["mlp"]["down"]["lora_a"].sharding.spec == (
        jax.sharding.PartitionSpec(None, "tensor", None)
    )


def test_the_dropout_of_adapters_is_on_in_training_alone(tuned, base):
    experiment = tuned({**LORA, "model.lora.dropout": 0.5})
    params = experiment.init_state().params
    layers = params["layers"]["mlp"]["down"]
    layers["lora_b"] = jnp.ones_like(layers["lora_b"])
    tokens = experiment.train_data.batch_at(0).inputs
    apply = jax.jit(lambda rng: experiment.model.apply(
        {"params": params}, tokens, train=True, rngs={"dropout": rng}
    ).hidden)  # fmt: skip
    first, second = apply(jax.random.key(1)), apply(jax.random.key(2))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(
        hidden(experiment, params, tokens), hidden(experiment, params, tokens)
    )


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"rank": -1}, "config.model.lora.rank (-1) must be at least 0"),
        ({"alpha": 0.0}, "config.model.lora.alpha (0.0) must be above 0"),
        ({"dropout": 1.0}, "config.model.lora.dropout (1.0) must be in [0, 1)"),
        ({"rank": 2, "targets": ()}, "config.model.lora.targets (()) must be given with a rank"),
    ],
    ids=str,
)
def test_adapters_that_mean_nothing_are_refused(change, expected, tiny_decoder):
    with pytest.raises(ValueError, match=re.escape(expected)):
        tiny_decoder(lora=lora.LoraConfig(**change))
