"""Checksums see every bit and its place, nothing of the mesh; a manifest sees its own damage."""

import functools
import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm import cli
from lm.checkpoint import checksums as sums_of
from lm.checkpoint import manifest
from lm.checkpoint.code_version import code_version
from lm.checkpoint.manifest import Damaged, Leaf, Manifest

checksums = jax.jit(sums_of.checksums)
SHAPES = [(), (1,), (5,), (16, 24), (3, 4, 40), (2, 33_000), (70_000, 1), (0, 3), (3, 0)]
DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool", "float8_e4m3fn"]


def noise(shape, dtype="float32", seed=0):
    values = np.random.default_rng(seed).normal(size=shape) * 10
    return jnp.asarray(values).astype(dtype)


def flipped(x, bit):
    """`x` with one bit of its memory inverted."""
    words = np.array(x)
    words.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    return words


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_device_and_host_agree_on_every_shape_and_dtype(shape, dtype):
    x = noise(shape, dtype)
    found = checksums(x)
    assert found.shape == (2,) and found.dtype == jnp.uint32
    np.testing.assert_array_equal(found, sums_of.host_checksums(np.asarray(x)))


@pytest.mark.parametrize(
    "spec",
    [
        (),
        ("data",),
        (None, "fsdp"),
        ("fsdp", "tensor"),
        ("tensor", "fsdp"),
        (("data", "fsdp"), "tensor"),
        (None, ("tensor", "data", "fsdp")),
    ],
    ids=str,
)
def test_the_checksum_does_not_depend_on_mesh_or_order_of_shards(rules_on, spec):
    mesh = rules_on(data=2, fsdp=2, tensor=2).mesh
    x = noise((16, 24, 3), "bfloat16")
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    np.testing.assert_array_equal(checksums(sharded), sums_of.host_checksums(np.asarray(x)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_one_changed_element_changes_both_sums(dtype):
    x = np.asarray(noise((40, 50), dtype))
    before = sums_of.host_checksums(x)
    rng = np.random.default_rng(0)
    for position in rng.integers(x.size, size=200):
        bit = 0 if dtype == "bool" else int(rng.integers(8 * x.itemsize))
        changed = flipped(x, int(position) * 8 * x.itemsize + bit)
        assert (sums_of.host_checksums(changed) != before).all()


def by_definition(x):
    """The checksum of an array of 4-byte elements, element by element."""

    def fmix(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    totals = [0, 0]
    for index, bits in np.ndenumerate(np.asarray(x).view(np.uint32)):
        row = int(np.ravel_multi_index(index[:-1], x.shape[:-1])) if index[:-1] else 0
        for i, (seed, odd) in enumerate([(0x9E3779B9, 0x85EBCA77), (0x7F4A7C15, 0xC2B2AE3D)]):
            mixed = fmix((row + seed) % 2**32) ^ (index[-1] * odd % 2**32)
            totals[i] += fmix((int(bits) + mixed) % 2**32)
    return [total % 2**32 for total in totals]


@pytest.mark.parametrize("shape", [(7,), (513,), (3, 4, 5), (40, 9), (5, 65), (2, 2, 513), (9, 1)])
def test_the_checksum_is_the_one_that_old_checkpoints_have(shape):
    x = np.asarray(noise(shape))
    assert sums_of.host_checksums(x).tolist() == by_definition(x)
    assert checksums(x).tolist() == by_definition(x)


@pytest.mark.parametrize("shape", [(1_500_007,), (1100, 1601), (700_001, 3), (3, 700, 333)])
@pytest.mark.parametrize("offset", [0, 4, 20])
def test_large_blocks_in_memory_of_any_alignment_have_the_checksum_of_the_device(shape, offset):
    x = np.frombuffer(np.random.default_rng(2).bytes(4 * np.prod(shape) + offset), np.float32)
    x = x[offset // 4 :].reshape(shape)
    np.testing.assert_array_equal(sums_of.host_checksums(x), checksums(x))


@pytest.mark.parametrize(
    "given, used", [("tpu", "tpu,cpu"), ("cuda,cpu", "cuda,cpu"), ("cpu", "cpu"), (None, None)]
)
def test_scripts_keep_the_host_that_computes_checksums(given, used):
    assert cli.with_host(given) == used


def test_a_host_that_is_left_out_is_asked_for(monkeypatch):
    def no_cpu(*, backend):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", no_cpu)
    sums_of._host_device.cache_clear()
    with pytest.raises(ValueError, match="leaves out the host, which computes checksums: write"):
        sums_of.host_checksums(np.ones(3, np.float32))


def test_values_that_compare_equal_but_have_other_bits_differ():
    zeros = jnp.zeros((4, 4))
    assert (checksums(zeros) != checksums(-zeros)).all()
    nan = np.full((2, 2), np.nan, np.float32)
    assert (checksums(flipped(nan, 3)) != checksums(nan)).all()


def test_swapped_elements_rows_and_columns_are_seen():
    x = np.array(noise((60, 70)))
    before = sums_of.host_checksums(x)
    rng = np.random.default_rng(1)
    for _ in range(300):
        changed = x.copy()
        a, b = rng.choice(x.size, 2, replace=False)
        changed.flat[[a, b]] = x.flat[[b, a]]
        assert (sums_of.host_checksums(changed) != before).all()
    for changed in (x[::-1], x[:, ::-1], np.roll(x, 1, 0), np.roll(x, 1, 1), np.sort(x, None)):
        assert (sums_of.host_checksums(changed.reshape(x.shape)) != before).all()


def test_the_sums_of_blocks_add_up_to_that_of_the_whole():
    x = np.asarray(noise((7, 10, 45)))
    total = np.zeros(2, np.uint32)
    for i in range(0, 7, 3):
        for j in range(0, 10, 4):
            for k in range(0, 45, 11):
                block = x[i : i + 3, j : j + 4, k : k + 11]
                total += sums_of.host_checksums(block, (i, j, k), x.shape)
    np.testing.assert_array_equal(total, sums_of.host_checksums(x))


def test_places_in_an_array_of_more_than_2_to_the_32_elements_are_distinct():
    """A counter of 32 bits would give elements that are 2^32 apart the same place."""
    shape, block = (2**20, 2**13), np.ones((1, 8), np.float32)
    at = [sums_of.host_checksums(block, (row, 0), shape) for row in (0, 2**19)]
    assert (at[0] != at[1]).all()


@pytest.mark.parametrize("x", [np.zeros(3, np.float64), jax.random.key(0)], ids=["8 byte", "key"])
def test_what_has_no_checksum_is_refused(x):
    with pytest.raises(ValueError, match="no checksum for"):
        sums_of.checksums(x)


# ---- replicas ----


def with_wrong_device(x, sharding, device):
    """`x`, where one device holds another bit than its replicas."""
    shards = []
    for d, index in sharding.addressable_devices_indices_map(x.shape).items():
        local = np.array(x[index])
        shards.append(jax.device_put(flipped(local, 13) if d == device else local, d))
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)


@pytest.fixture(scope="module")
def shardings(rules_on):
    mesh = rules_on(data=2, fsdp=2, tensor=2).mesh
    specs = {
        "replicated": (),
        "fsdp": ("fsdp",),
        "both": ("tensor", "fsdp"),
        "together": (None, ("fsdp", "tensor")),
        "unique": ("data", ("tensor", "fsdp")),
    }
    return {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}


@pytest.fixture(scope="module")
def mismatches(shardings):
    return jax.jit(functools.partial(sums_of.replica_mismatches, shardings=shardings))


def test_replicas_that_agree_are_left_alone(shardings, mismatches):
    tree = jax.tree.map(lambda s: jax.device_put(noise((8, 12)), s), shardings)
    assert not any(map(bool, mismatches(tree).values()))


@pytest.mark.parametrize("wrong", ["replicated", "fsdp", "both", "together"])
def test_one_bit_on_one_device_is_found_and_the_leaf_named(shardings, mismatches, devices, wrong):
    x = noise((8, 12))
    for device in devices:
        tree = jax.tree.map(lambda s: jax.device_put(x, s), shardings)
        tree[wrong] = with_wrong_device(x, shardings[wrong], device)
        found = mismatches(tree)
        assert [name for name in found if found[name]] == [wrong]
        for flag in found.values():  # the same answer everywhere
            assert len({bool(shard.data) for shard in flag.addressable_shards}) == 1


def test_a_leaf_without_replicas_can_not_disagree(shardings, mismatches, devices):
    tree = jax.tree.map(lambda s: jax.device_put(noise((8, 12)), s), shardings)
    tree["unique"] = with_wrong_device(noise((8, 12)), shardings["unique"], devices[3])
    assert not any(map(bool, mismatches(tree).values()))


# ---- the manifest ----


def example():
    tree = {"params": {"w": noise((3, 4)), "b": noise((4,), "bfloat16")}}
    sums = np.stack(jax.tree.leaves(sums_of.checksums(tree)))
    return Manifest(
        step=12,
        leaves=manifest.leaves(tree, sums),
        ledger={"tokens": 2**40, "hash": "ab12"},
        config={"data": {"train": ("a", "b")}, "rate": 1e-3, "none": None},
        code=code_version(),
        parent={"workdir": "runs/ä", "step": 3},
        time=1.7e9,
    )


def test_a_manifest_comes_back_from_json_as_it_was():
    written = example()
    read = Manifest.from_json(json.dumps(written.to_dict()))
    assert read.leaves == written.leaves
    assert set(read.leaves) == {"params.w", "params.b"}
    assert str(read.leaves["params.b"]) == "bfloat16 [4]"
    for name in ("step", "ledger", "code", "parent", "time"):
        assert getattr(read, name) == getattr(written, name)
    assert read.config == json.loads(json.dumps(written.config))  # tuples are lists in JSON


def test_a_flipped_bit_in_a_manifest_is_found_or_changes_nothing():
    text = json.dumps(example().to_dict()).encode()
    written = Manifest.from_json(text)
    found = 0
    for bit in np.random.default_rng(0).choice(8 * len(text), 400, replace=False):
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert Manifest.from_json(bytes(changed)) == written
        except Damaged:
            found += 1
    assert found > 350


def test_a_manifest_of_a_newer_format_says_so():
    tree = {**example().to_dict(), "format": 2}
    del tree["sha256"]
    tree["sha256"] = manifest._digest(tree)
    with pytest.raises(ValueError, match="format 2, this code reads 1") as caught:
        Manifest.from_json(json.dumps(tree))
    assert not isinstance(caught.value, Damaged)


def test_differences_name_every_leaf_of_both_sides():
    stored = {"a": Leaf((2,), "float32", "0" * 16), "b": Leaf((), "int32"), "c": Leaf((3,), "int8")}
    wanted = {"a": Leaf((2,), "float32"), "b": Leaf((), "int8"), "d": Leaf((4, 5), "bfloat16")}
    assert manifest.differences(stored, wanted) == [
        "only in the checkpoint: c, int8 [3]",
        "only in this run: d, bfloat16 [4, 5]",
        "differs: b, int32 [] in the checkpoint, int8 [] in this run",
    ]


def test_the_code_version_names_commit_source_and_packages():
    version = code_version()
    assert version["jax"] == jax.__version__
    assert len(version["source"]) == 64
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert version["commit"] == (head.stdout.strip() or None)
    assert json.loads(json.dumps(version)) == version
