"""Meshes and rules: what they refuse, and that parameters and state really lie in shards."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm.config.schema import MeshConfig
from lm.parallel.sharding import local_rows, make_global_batch, make_mesh, make_rules


@pytest.mark.parametrize(
    "axes, num_devices, message",
    [
        ({"data": 3}, 8, r"config\.mesh \(data=3\) must use all devices \(8\)"),
        ({"data": 2, "fsdp": 2}, 8, r"config\.mesh \(data=2 \* fsdp=2\) .* devices \(8\)"),
        ({"tensor": 3}, 8, r"config\.mesh \(data=-1 \* tensor=3\) .* devices \(8\)"),
        ({"data": 1}, 2, r"config\.mesh \(1\) must use all devices \(2\)"),
        ({"fsdp": -1}, 8, r"at most one is -1, got data=-1 \* fsdp=-1"),
        ({"fsdp": 0}, 8, r"sizes are positive .* fsdp=0"),
        ({"data": -2}, 8, r"sizes are positive .* data=-2"),
    ],
)
def test_a_mesh_that_does_not_fit_its_devices_is_refused(devices, axes, num_devices, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**axes), devices[:num_devices])


def test_one_axis_takes_what_the_others_leave(devices):
    assert make_mesh(MeshConfig(tensor=2), devices).shape["data"] == 4
    assert make_mesh(MeshConfig(data=2, fsdp=-1), devices[:6]).shape["fsdp"] == 3
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), devices)
    assert set(mesh.devices.ravel().tolist()) == set(devices)
    sizes = {"data": 1, "fsdp": 4, "expert": 1, "tensor": 2, "sequence": 1, "stage": 1}
    assert dict(mesh.shape) == sizes


def test_unknown_logical_axes_are_refused(rules_on):
    rules = rules_on(fsdp=2, tensor=2)
    with pytest.raises(ValueError, match=r"'embd' is not a logical axis; known: .*embed"):
        rules.spec("batch", "embd")
    with pytest.raises(ValueError, match="'heds' is not a logical axis"):
        rules.constrain(jnp.zeros((4, 4)), "batch", "heds")
    with pytest.raises(ValueError, match=r"1 logical axes \('batch',\) .* \(4, 4\)"):
        rules.constrain(jnp.zeros((4, 4)), "batch")


def test_two_dimensions_on_one_mesh_axis_are_refused(rules_on):
    with pytest.raises(
        ValueError, match=r"two dimensions of \('heads', 'mlp'\) over \('tensor',\)"
    ):
        rules_on(tensor=2).spec("heads", "mlp")
    assert rules_on(fsdp=2).spec("heads", "mlp") == PartitionSpec(None, None)  # nothing is sharded


def test_indivisible_dimensions_are_refused_with_path_and_numbers(rules_on, make_experiment):
    with pytest.raises(ValueError, match=r"x\.y: mlp \(6\) must be divisible by mesh tensor \(4\)"):
        rules_on(tensor=4).check("x.y", (4, 6), ("embed", "mlp"))
    experiment = make_experiment({"model.mlp_dim": 30}, tensor=4)
    with pytest.raises(ValueError, match=r"\['mlp'\].*mlp \(30\) .* tensor \(4\)"):
        assert experiment.abstract_params
    with pytest.raises(ValueError, match=r"batch_size \(16\) .* data\*fsdp\*expert \(3\)"):
        make_experiment(fsdp=3)
    with pytest.raises(ValueError, match=r"batch_size \(16\) .*\(2\) \* .*num_microbatches \(16\)"):
        make_experiment({"train.num_microbatches": 16}, fsdp=2)
    with pytest.raises(ValueError, match=r"data\.length \(30\) .* sequence\*tensor \(4\)"):
        make_experiment({"data.length": 30}, sequence=4)


@pytest.mark.parametrize(
    "row, message",
    [
        (("embd", None), "'embd'.* replaces no row of .*embed"),
        (("embed",), r"\('embed',\) replaces no row"),
        (("embed", "fdsp"), r"\['fdsp'\] are no mesh axes"),
        (("embed", ("fsdp", "tnsor")), r"\['tnsor'\] are no mesh axes"),
    ],
)
def test_rows_that_replace_nothing_are_refused(devices, row, message):
    with pytest.raises(ValueError, match=r"config\.mesh\.rules: .*" + message):
        make_rules(MeshConfig(rules=(row,)), devices)


def test_a_row_of_the_table_is_replaced(rules_on, make_experiment):
    rules = rules_on(rules=(("embed", None), ("mlp", ("tensor", "fsdp"))), fsdp=2, tensor=4)
    assert rules.spec("embed", "mlp") == PartitionSpec(None, ("tensor", "fsdp"))
    assert rules.spec("heads") == PartitionSpec("tensor")
    changes = {"mesh.rules": (("embed", None), ("mlp", None))}
    params = make_experiment(changes, fsdp=2, tensor=4).abstract_params["layers"]
    assert shard_shape(params["mlp"]["up"]["weight"]) == (2, 16, 32)
    assert shard_shape(params["attention"]["query"]["weight"]) == (2, 16, 1, 4)


def shard_shape(x):
    return x.sharding.shard_shape(x.shape)


def test_parameters_and_moments_lie_in_shards(make_experiment):
    experiment = make_experiment(fsdp=2, tensor=4)
    state = experiment.init_state()
    attention, mlp = (state.params["layers"][name] for name in ("attention", "mlp"))
    expected = {
        (2, 8, 1, 4): attention["query"]["weight"],  # [L, D / fsdp, N / tensor, H]
        (2, 1, 4, 8): attention["out"]["weight"],
        (2, 8, 8): mlp["up"]["weight"],
        (66, 8): state.params["embedding"]["weight"],  # [V / tensor, D / fsdp]
        (2, 16): state.params["layers"]["mlp_norm"]["scale"],
    }
    for shape, leaf in expected.items():
        assert {s.data.shape for s in leaf.addressable_shards} == {shape}
    shards = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, state)
    wanted = jax.tree.map(shard_shape, experiment.abstract_state)
    assert shards == wanted
    assert any("mu" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))


def test_state_is_initialised_in_shards_and_never_whole(make_experiment):
    changes = {"model.embed_dim": 64, "model.mlp_dim": 416}  # a shape that nothing else has
    whole = "f32[2,64,416]"

    def compiled(**axes):
        experiment = make_experiment(changes, **axes)
        return jax.jit(experiment.init_state).lower().compile()

    alone, spread = compiled(data=1), compiled(fsdp=4, tensor=2)
    assert whole in alone.as_text()
    assert whole not in spread.as_text() and "f32[2,16,208]" in spread.as_text()
    assert not re.search(r"\w\[2,64,416\]", spread.as_text())  # random bits neither
    sizes = [c.memory_analysis().output_size_in_bytes for c in (alone, spread)]
    assert sizes[1] < sizes[0] / 4


def test_initial_values_are_the_same_on_every_mesh(make_experiment):
    alone = make_experiment().init_state()
    spread = make_experiment(data=2, fsdp=2, tensor=2).init_state()
    jax.tree.map(np.testing.assert_array_equal, alone.params, spread.params)


def test_independent_parameters_have_independent_values(make_experiment):
    params = make_experiment({"model.tie_embeddings": False}).init_state().params
    leaves = [np.asarray(x).ravel() for x in jax.tree.leaves(params) if np.std(x) > 0]
    assert len(leaves) == 8
    layers = params["layers"]["mlp"]["up"]["weight"]
    leaves += [np.asarray(layers[0]).ravel(), np.asarray(layers[1]).ravel()]
    for i, a in enumerate(leaves[:-2]):
        for b in leaves[i + 1 : -2]:
            n = min(len(a), len(b))
            assert abs(np.corrcoef(a[:n], b[:n])[0, 1]) < 0.2
    assert abs(np.corrcoef(*leaves[-2:])[0, 1]) < 0.2


# ---- rows ----


def test_one_process_holds_all_rows(rules_on):
    for axes in ({"data": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "sequence": 2}):
        np.testing.assert_array_equal(local_rows(rules_on(**axes), 16), np.arange(16))


@pytest.mark.parametrize(
    "axes, shard",
    [
        ({"data": 8}, (2, 6)),
        ({"fsdp": 2, "tensor": 4}, (8, 6)),
        ({"data": 2, "fsdp": 2, "sequence": 2}, (4, 3)),
    ],
)
def test_rows_become_global_arrays(rules_on, axes, shard):
    rules = rules_on(**axes)
    tree = {"x": np.arange(96).reshape(16, 6), "y": np.arange(16.0)}
    arrays = make_global_batch(rules, tree, 16)
    np.testing.assert_array_equal(arrays["x"], tree["x"])
    np.testing.assert_array_equal(arrays["y"], tree["y"])
    for piece in arrays["x"].addressable_shards:
        assert piece.data.shape == shard
        np.testing.assert_array_equal(piece.data, tree["x"][piece.index])


def test_boxed_trees_get_the_shardings_of_their_axes(rules_on):
    rules = rules_on(fsdp=2, tensor=4)
    boxed = {"w": nn.Partitioned(jnp.zeros((4, 8)), ("embed", "mlp")), "other": jnp.zeros(3)}
    shardings = rules.shardings(boxed)
    assert shardings["w"].spec == PartitionSpec("fsdp", "tensor")
    assert shardings["other"].spec == PartitionSpec()


def test_a_misspelled_axis_is_an_error_on_one_device_too(rules_on):
    with pytest.raises(ValueError, match="'embd' is not a logical axis"):
        rules_on().constrain(np.zeros((2, 2)), "batch", "embd")
