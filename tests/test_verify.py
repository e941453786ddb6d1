"""scripts/verify_sharding.py finds what can go wrong on a mesh: each defect below is seeded."""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from configs import clip, dalle, vit, vqvae
from lm.config import schema as configs
from lm.config.conversion import resolve
from lm.layers import cross_entropy
from lm.parallel import sharding
from lm.planning import mesh_equivalence

ROOT = Path(__file__).parents[1]
FSDP = {"data": 2, "fsdp": 4}
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}  # here gradients of the loss go through psum
TENSOR = {"fsdp": 4, "tensor": 2}


@pytest.fixture(scope="module")
def config(make_config):
    """(changes) -> the config of a tiny decoder with grouped heads."""

    def make(changes=None):
        return make_config(
            {"model.num_kv_heads": 2, "model.tie_embeddings": False, **(changes or {})}
        )

    return make


@pytest.fixture(scope="module")
def one_device(config, devices):
    """The steps of one device, right in every test: what is seeded is seeded into the mesh."""
    return mesh_equivalence.on_one_device(config(), devices)


@pytest.fixture(scope="module")
def check(config, devices, one_device):
    """(mesh, changes of what one device doesn't see) -> the report."""

    def run(mesh, changes=None):
        return mesh_equivalence.compare(
            mesh_equivalence.on_mesh(config(changes), mesh, devices), one_device
        )

    return run


def wrong(report):
    return {d.what for d in report.differences if not d.ok}


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        (TENSOR, {"mesh.zero": 1, "optimizer.memory": "host", "model.remat": "offload"}),
        pytest.param({"data": 4, "fsdp": 2, "slices": 2}, {}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_that_is_right_passes(check, mesh, changes):
    report = check(mesh, changes)
    assert report.ok, mesh_equivalence.describe(report)
    assert {d.step for d in report.differences} == {0, 1, 2}
    assert all(d.value > 0 for d in report.differences if d.what == "parameters")


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [clip, dalle, vit, vqvae])
def test_models_of_pictures_are_right_on_a_mesh_and_in_micro_batches(pictures, devices):
    config = mesh_equivalence.shrink(pictures.get_config("shapes"))
    report = mesh_equivalence.verify(config, MIXED, devices, num_microbatches=2)
    assert report.ok, mesh_equivalence.describe(report)


@pytest.mark.slow
def test_experts_in_a_pipeline_are_right(config, devices):
    changes = {
        "model.pipeline.num_microbatches": 2,
        "model.moe.num_experts": 4,
        "model.moe.num_experts_per_token": 2,
    }
    report = mesh_equivalence.verify(config(changes), {"stage": 2, "expert": 2, "fsdp": 2}, devices)
    assert report.ok, mesh_equivalence.describe(report)


def test_a_missing_psum_is_found(check, monkeypatch):
    monkeypatch.setattr(cross_entropy.jax.lax, "psum", lambda x, axes: x)
    assert wrong(check(MIXED)) == {"objective", "gradient norm", "gradients", "parameters"}


def test_a_mean_of_means_is_found(check, monkeypatch):
    """Every device divides the sums of its rows by its own tokens, and their means are averaged."""
    real = cross_entropy.on_each_device

    def mean_of_means(rules, local, parameters, xs, trained=()):
        axes = rules.sharded_axes("act_batch", "length")

        def averaged(parameters, xs):
            tokens = xs.weights.sum()
            total, devices = jax.lax.psum((tokens, 1), axes)  # what the step divides by
            factor = total / (devices * tokens)
            return jax.tree.map(lambda x: x * factor, local(parameters, xs))

        return real(rules, averaged, parameters, xs, trained)

    monkeypatch.setattr(cross_entropy, "on_each_device", mean_of_means)
    assert wrong(check(MIXED)) >= {"objective", "gradient norm", "gradients", "parameters"}


def test_dropout_with_a_key_for_each_shard_is_found(check, devices, monkeypatch):
    mesh = sharding.make_mesh(configs.MeshConfig(**FSDP), devices)
    rows = PartitionSpec(tuple(FSDP))

    def call(self, x, deterministic=None, rng=None):
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return x
        key = self.make_rng("dropout")

        def local(x):
            mine = jax.random.fold_in(key, jax.lax.axis_index(tuple(FSDP)))
            kept = jax.random.bernoulli(mine, 1 - self.rate, x.shape)
            return jnp.where(kept, x / (1 - self.rate), 0)

        mapped = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        return mapped(x)

    monkeypatch.setattr(nn.Dropout, "__call__", call)
    assert wrong(check(FSDP)) >= {"objective", "gradients"}


def test_segment_ids_of_the_wrong_rows_are_found(check, monkeypatch):
    """Every device gets the segment ids of the first rows, as if they weren't sharded."""
    make = sharding.make_global_batch

    def unsharded(rules, batch, batch_size):
        rows = batch_size // rules.size("batch")
        segments = np.tile(batch.inputs.segments[:rows], (rules.size("batch"), 1))
        inputs = batch.inputs.replace(segments=segments)
        return make(rules, batch.replace(inputs=inputs), batch_size)

    monkeypatch.setattr(sharding, "make_global_batch", unsharded)
    assert wrong(check(FSDP)) >= {"objective", "gradients", "counts"}


def test_a_clip_norm_that_counts_replicas_twice_is_found(check, monkeypatch):
    """The squares of every device's shards are added up, also where shards are the same."""
    seen = []

    class Observed(mesh_equivalence.Experiment):
        def lower_train_step(self):
            seen.append(
                (self.rules.mesh, self.initializer.trained(self.rules.shardings(self.boxed_params)))
            )
            return super().lower_train_step()

    def norm(grads):
        mesh, shardings = seen[-1]

        def squares(x, own):
            def local(x):
                return jax.lax.psum(jnp.sum(jnp.square(x)), mesh.axis_names)

            specs = {"in_specs": own.spec, "out_specs": PartitionSpec()}
            return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(x)

        return jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(squares, grads, shardings))))

    monkeypatch.setattr(mesh_equivalence, "Experiment", Observed)
    monkeypatch.setattr(optax.tree, "norm", norm)
    assert wrong(check(FSDP)) >= {"gradients", "parameters"}


def test_what_is_replicated_by_accident_is_named(check):
    report = check(FSDP, {"mesh.rules": (("embed", None), ("batch", "data"))})
    text = mesh_equivalence.describe(report)
    assert re.search(r"parameter embedding.weight \(264, \d+\) .* are on every device", text)
    assert not report.ok and not wrong(report)


def test_activations_of_every_token_are_named(check, monkeypatch):
    constrain = sharding.Rules.constrain

    def forget(self, x, *logical):
        names = tuple(None if n in ("batch", "length", "act_length") else n for n in logical)
        return constrain(self, x, *names)

    monkeypatch.setattr(sharding.Rules, "constrain", forget)
    report = check(FSDP)
    assert any("holds the tokens of all devices" in line for line in report.layout)


def test_shrinking_keeps_the_structure():
    from configs import llama3

    config = llama3.get_config("70b")
    small = mesh_equivalence.shrink(config)
    assert small.model.num_heads / small.model.num_kv_heads == 8
    assert small.model.activation == config.model.activation
    resolved = resolve(small).model
    assert resolved.kv_heads == 2
    resolved.check(mesh_equivalence.LENGTH)


def test_groups_of_experts_are_still_limited_in_small(make_config):
    moe = {"num_experts": 256, "num_experts_per_token": 8, "num_groups": 8, "num_groups_chosen": 4}
    config = make_config({f"model.moe.{name}": value for name, value in moe.items()})
    small = resolve(mesh_equivalence.shrink(config)).model
    small.check(mesh_equivalence.LENGTH)
    assert 1 < small.moe.num_groups_chosen < small.moe.num_groups < small.moe.num_experts


@pytest.mark.slow
def test_the_script_says_what_was_compared_on_two_processes():
    script = [sys.executable, str(ROOT / "scripts/verify_sharding.py")]
    flags = [f"--config={ROOT}/configs/smoke.py", "--mesh=fsdp=2,tensor=2", "--processes=2"]
    done = subprocess.run([*script, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layout: as the config says" in done.stdout and "the same" in done.stdout
    [sizes] = [line for line in done.stdout.splitlines() if line.startswith("model resized")]
    assert "(--noshrink: as it is)" in sizes and "embed_dim 32 -> 64, " in sizes
    assert (
        "2 processes" in done.stdout
        and done.stdout.count("gradient norm") == mesh_equivalence.STEPS
    )


@pytest.mark.slow
def test_the_script_fails_where_something_differs():
    flags = [f"--config={ROOT}/configs/smoke.py", "--mesh=fsdp=2"]
    defect = (
        "import runpy, sys, jax; jax.lax.psum = lambda x, axes: x; del sys.argv[:2]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", defect, "-", str(ROOT / "scripts/verify_sharding.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG" in done.stdout and "gradients" in done.stdout


@pytest.mark.slow
def test_every_parallelism_is_right_on_two_processes():
    launcher = [sys.executable, str(ROOT / "scripts/launch/local.py"), "--processes=2"]
    command = [*launcher, "--devices-per-process=4", "--", str(ROOT / "tests/two_processes.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)  # -rP shows the differences
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_axis_is_named(config, devices):
    with pytest.raises(ValueError, match=r"no axis .*'fdsp'"):
        mesh_equivalence.on_mesh(config(), {"fdsp": 2}, devices)


@dataclasses.dataclass(frozen=True)
class Place:
    process_index: int
    number: int


@pytest.mark.parametrize(
    ("sizes", "processes"),
    [((2, 2, 2), 2), ((4, 2), 2), ((8,), 2), ((2, 4), 4), ((1, 6, 2), 3), ((2, 4), 1)],
)
def test_neighbours_on_every_axis_are_in_different_processes(sizes, processes):
    axes = dict(zip(("stage", "fsdp", "tensor"), sizes, strict=False))
    each = int(np.prod(sizes)) // processes
    devices = [Place(p, i) for p in range(processes) for i in range(each)]
    placed = mesh_equivalence.across_processes(axes, devices)
    assert sorted(placed, key=devices.index) == devices
    grid = np.array([d.process_index for d in placed])
    grid = grid.reshape([axes[axis] for axis in sharding.AXES if axis in axes])
    for axis in range(grid.ndim):
        assert processes == 1 or (np.diff(grid, axis=axis) != 0).all()


def test_a_slice_is_a_run_of_processes_and_what_cannot_cross_is_refused():
    devices = [Place(p, i) for p in range(2) for i in range(4)]
    assert (
        mesh_equivalence.across_processes({"data": 4, "fsdp": 2, "slices": 2}, devices) == devices
    )
    with pytest.raises(ValueError, match=r"divisible by the number of processes \(2\)"):
        mesh_equivalence.across_processes(
            {"data": 3}, [Place(p, i) for p in range(2) for i in range(3)]
        )


def test_a_replica_that_alone_is_wrong_is_found(devices):
    mesh = jax.sharding.Mesh(np.array(devices[:4]).reshape(2, 2), ("a", "b"))
    whole = np.arange(1.0, 9.0, dtype=np.float32)
    place = jax.NamedSharding(mesh, PartitionSpec("a"))
    halves = whole.reshape(2, 4)
    parts = [jax.device_put(halves[i // 2], devices[i]) for i in range(4)]
    make = functools.partial(jax.make_array_from_single_device_arrays, (8,), place)
    assert mesh_equivalence.relative({"x": whole}, {"x": make(parts)}) == [0]
    parts[3] = parts[3].at[0].add(4.0)
    assert mesh_equivalence.relative({"x": whole}, {"x": make(parts)}) == [0.5]
