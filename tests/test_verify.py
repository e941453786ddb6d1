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
import pytest
from jax.sharding import PartitionSpec

from lm import loss, optim, sharding, verify
from lm.config import resolve

ROOT = Path(__file__).parents[1]
FSDP = {"data": 2, "fsdp": 4}
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}  # here gradients of the loss go through psum
TENSOR = {"fsdp": 4, "tensor": 2}


@pytest.fixture(scope="module")
def check(make_config, devices):
    """(mesh, changes) -> the report of a tiny decoder with windows and grouped heads."""

    def run(mesh, changes=None):
        changes = {"model.num_kv_heads": 2, "model.tie_embeddings": False, **(changes or {})}
        return verify.verify(make_config(changes), mesh, devices)

    return run


def wrong(report):
    return {d.what for d in report.differences if not d.ok}


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        (TENSOR, {"mesh.zero": 1, "optimizer.memory": "host", "model.remat": "offload"}),
        ({"data": 4, "fsdp": 2, "slices": 2}, {}),
        (
            {"stage": 2, "expert": 2, "fsdp": 2},
            {
                "model.pipeline.num_microbatches": 2,
                "model.moe.num_experts": 4,
                "model.moe.num_experts_per_token": 2,
            },
        ),
    ],
)
def test_a_mesh_that_is_right_passes(check, mesh, changes):
    report = check(mesh, changes)
    assert report.ok, verify.describe(report)
    assert {d.step for d in report.differences} == {0, 1, 2}
    assert all(d.value > 0 for d in report.differences if d.what == "parameters")


def test_a_missing_psum_is_found(check, monkeypatch):
    monkeypatch.setattr(loss.jax.lax, "psum", lambda x, axes: x)
    assert wrong(check(MIXED)) == {"objective", "gradient norm", "gradients", "parameters"}


def test_a_mean_of_means_is_found(check, monkeypatch):
    def mean_of_means(sums, axes):
        """Every device divides by its own tokens, and means are averaged."""
        sums, *rest = sums if isinstance(sums, tuple) else (sums,)
        share = jax.lax.axis_size(axes)
        own = jax.lax.all_gather(jnp.float32(1.0), axes).sum() / share
        scale = own * (1.0 + 0.01 * jax.lax.axis_index(axes))
        summed = jax.tree.map(lambda x: psum(x * scale, axes), (sums, *rest))
        return summed if rest else summed[0]

    psum = jax.lax.psum
    monkeypatch.setattr(loss.jax.lax, "psum", mean_of_means)
    assert "gradients" in wrong(check(MIXED))


def test_dropout_with_a_key_for_each_shard_is_found(check, monkeypatch):
    def call(self, x, deterministic=None, rng=None):
        if deterministic or sharding_mesh[0] is None:  # None: shapes alone are wanted
            return x
        key = self.make_rng("dropout")
        mesh = sharding_mesh[0]
        axes = tuple(a for a in ("data", "fsdp") if mesh.shape[a] > 1)

        def local(x):
            mine = jax.random.fold_in(key, jax.lax.axis_index(axes)) if axes else key
            return jnp.where(jax.random.bernoulli(mine, 1 - self.rate, x.shape), x, 0)

        spec = PartitionSpec(axes or None)
        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)

    sharding_mesh = [None]

    class PerExperiment(verify.Experiment):
        def lower_train_step(self):
            sharding_mesh[0] = self.rules.mesh
            return super().lower_train_step()

    monkeypatch.setattr(verify, "Experiment", PerExperiment)
    monkeypatch.setattr(nn.Dropout, "__call__", call)
    assert wrong(check(FSDP)) >= {"objective", "gradients"}


def test_segment_ids_of_the_wrong_rows_are_found(check, monkeypatch):
    """Every device gets the segment ids of the first rows, as if they weren't sharded."""
    put = sharding.put

    def unsharded(rules, batch, batch_size):
        rows = batch_size // rules.size("batch")
        segments = np.tile(batch.inputs.segments[:rows], (rules.size("batch"), 1))
        inputs = batch.inputs.replace(segments=segments)
        return put(rules, batch.replace(inputs=inputs), batch_size)

    monkeypatch.setattr(sharding, "put", unsharded)
    assert wrong(check(FSDP)) >= {"objective", "gradients"}


def test_a_clip_norm_that_counts_replicas_twice_is_found(check, monkeypatch):
    """A norm whose squares replicas count again is that of a smaller bound."""

    class Twice(verify.Experiment):
        @functools.cached_property
        def tx(self):
            config = self.config.optimizer
            bound = config.clip_norm / self.rules.mesh.shape["data"] ** 0.5
            config = dataclasses.replace(config, clip_norm=bound)
            return optim.make_optimizer(config, self.boxed_params, self.num_steps)

    monkeypatch.setattr(verify, "Experiment", Twice)
    assert wrong(check(FSDP)) >= {"gradients", "parameters"}


def test_what_is_replicated_by_accident_is_named(check):
    report = check(FSDP, {"mesh.rules": (("embed", None), ("batch", "data"))})
    text = verify.describe(report)
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
    small = verify.shrink(config)
    assert small.model.num_heads / small.model.num_kv_heads == 8
    assert small.model.activation == config.model.activation
    resolved = resolve(small).model
    assert resolved.kv_heads == 2
    resolved.check(verify.LENGTH)


def script(*flags, config="smoke.py"):
    command = [sys.executable, str(ROOT / "scripts/verify_sharding.py")]
    config = f"--config={ROOT}/configs/{config}"
    return subprocess.run([*command, config, *flags], capture_output=True, text=True)


def test_the_script_says_what_was_compared_on_two_processes():
    done = script("--mesh=fsdp=2,tensor=2", "--processes=2")
    assert done.returncode == 0, done.stderr
    assert "layout: as the config says" in done.stdout and "the same" in done.stdout
    assert "2 processes" in done.stdout and done.stdout.count("gradient norm") == verify.STEPS


PIPELINE = "--config.model.pipeline.num_microbatches"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "mesh", "flags"),
    [
        ("llama3.py:8b", "fsdp=8", ()),
        ("llama3.py:8b", "data=2,fsdp=4", ()),
        ("llama3.py:8b", "fsdp=2,tensor=4", ()),
        ("llama3.py:8b", "sequence=4,fsdp=2", ("--config.model.sequence_parallel=ring",)),
        ("llama3.py:8b", "sequence=4,fsdp=2", ("--config.model.sequence_parallel=gather",)),
        ("mixtral.py", "expert=4,fsdp=2", ()),
        ("llama3.py:8b", "stage=4,fsdp=2", (f"{PIPELINE}=4",)),
        ("llama3.py:8b", "stage=2,tensor=2,fsdp=2", (f"{PIPELINE}=2",)),
        ("llama3.py:8b", "data=4,fsdp=2,slices=2", ()),
    ],
)
def test_every_parallelism_on_two_processes(config, mesh, flags):
    done = script(f"--mesh={mesh}", "--processes=2", *flags, config=config)
    print(done.stdout)  # shown by -rP
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_ends_with_1_where_something_differs():
    done = script("--mesh=fsdp=2", "--config.mesh.rules=(('embed', None),)")
    assert done.returncode == 1 and "on every device" in done.stdout


def test_an_unknown_axis_is_named(check):
    with pytest.raises(ValueError, match=r"no axis .*'fdsp'"):
        check({"fdsp": 2})


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
    placed = verify.across_processes(axes, devices)
    assert sorted(placed, key=devices.index) == devices
    grid = np.array([d.process_index for d in placed])
    grid = grid.reshape([axes[axis] for axis in sharding.AXES if axis in axes])
    for axis in range(grid.ndim):
        assert processes == 1 or (np.diff(grid, axis=axis) != 0).all()


def test_a_slice_is_a_run_of_processes_and_what_cannot_cross_is_refused():
    devices = [Place(p, i) for p in range(2) for i in range(4)]
    assert verify.across_processes({"data": 4, "fsdp": 2, "slices": 2}, devices) == devices
    with pytest.raises(ValueError, match=r"divisible by the number of processes \(2\)"):
        verify.across_processes({"data": 3}, [Place(p, i) for p in range(2) for i in range(3)])


def test_a_replica_that_alone_is_wrong_is_found(devices):
    mesh = jax.sharding.Mesh(np.array(devices[:4]).reshape(2, 2), ("a", "b"))
    whole = np.arange(1.0, 9.0, dtype=np.float32)
    place = jax.NamedSharding(mesh, PartitionSpec("a"))
    halves = whole.reshape(2, 4)
    parts = [jax.device_put(halves[i // 2], devices[i]) for i in range(4)]
    make = functools.partial(jax.make_array_from_single_device_arrays, (8,), place)
    assert verify.relative({"x": whole}, {"x": make(parts)}) == [0]
    parts[3] = parts[3].at[0].add(4.0)
    assert verify.relative({"x": whole}, {"x": make(parts)}) == [0.5]
