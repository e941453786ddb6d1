"""lm verify-sharding of two towers: right in every split, and local negatives are found."""

import jax
import pytest
from jax.sharding import PartitionSpec

from configs import clip
from lm.layers import pair_loss
from lm.planning import mesh_equivalence
from lm.planning.plan import without_data
from lm.training import losses
from lm.training.experiment import Experiment

EVERY = {"objective", "gradient norm", "gradients", "parameters"}
MESH = {"data": 2, "fsdp": 2}


@pytest.fixture(scope="module")
def config():
    config = mesh_equivalence.shrink(clip.get_config("b32"))
    config.model.vision.num_layers = config.model.text.num_layers = 1
    return config


@pytest.fixture(scope="module")
def one_device(config, devices):
    return mesh_equivalence.on_one_device(config, devices, dropout=False)


@pytest.fixture(scope="module")
def check(config, devices, one_device):
    """(mesh, num_microbatches) -> the report."""

    def run(mesh, num_microbatches):
        size = 1
        for axis in mesh.values():
            size *= axis
        many = mesh_equivalence.on_mesh(
            config, mesh, devices[:size], num_microbatches=num_microbatches
        )
        return mesh_equivalence.compare(many, one_device)

    return run


def wrong(report):
    return {d.what for d in report.differences if not d.ok}


def test_shards_and_micro_batches_pass(check):
    report = check({"data": 2, "fsdp": 2, "tensor": 2}, 2)
    assert report.ok, mesh_equivalence.describe(report)
    assert all(d.value > 0 for d in report.differences if d.what == "parameters")


def test_negatives_of_a_device_alone_are_found(check, monkeypatch):
    real = pair_loss.loss

    def local(model, params, embeddings, batch, *, kind):
        axes = model.rules.sharded_axes("act_batch")

        def of_device(params, embeddings, batch):
            found = real(model, params, embeddings, batch, kind=kind)
            return jax.tree.map(lambda x: jax.lax.psum(x, axes), found)

        rows = PartitionSpec(axes)
        mapped = jax.shard_map(
            of_device,
            mesh=model.rules.mesh,
            in_specs=(PartitionSpec(), rows, rows),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return mapped(params, embeddings, batch)

    monkeypatch.setattr(pair_loss, "loss", local)
    assert wrong(check(MESH, 2)) == EVERY


def test_negatives_of_a_micro_batch_alone_are_found(check, monkeypatch):
    """As any other loss is computed: sums over micro-batches."""
    make = losses.make
    monkeypatch.setattr(losses, "make", lambda *args, **options: make(*args, **options).__call__)
    assert wrong(check(MESH, 2)) == EVERY


@pytest.mark.parametrize("size", clip.SIZES)
def test_a_plan_needs_no_data(size, devices):
    """Random pictures of the config's size, and their captions."""
    config = without_data(clip.get_config(size))
    config.data.batch_size = 8
    batch = Experiment(config, devices[:1]).abstract_batch
    pixels = config.model.image_size
    assert batch.images.shape == (8, pixels, pixels, 3)
    assert batch.inputs.ids.shape == (8, config.model.max_length)
