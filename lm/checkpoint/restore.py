"""Verified restore of one checkpoint to the devices, and agreement of processes about its faults.

No process may leave the others in a collective or a barrier because it met a damaged file. So each
of them first tries by itself, and all learn of every fault before the next collective.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lm.checkpoint import arrays, checksums, step_files
from lm.checkpoint import manifest as manifests
from lm.checkpoint.arrays import StoredArrays
from lm.checkpoint.manifest import Damaged, Manifest
from lm.checkpoint.step_files import Unreadable
from lm.parallel import sharding
from lm.storage.epaths import StoragePath
from lm.types import PyTree

_CANNOT = "cannot be opened"  # the start of an Unreadable's fault
T = TypeVar("T")
NUM_READERS = 8  # leaves that are read at the same time


def restore(
    folder: StoragePath,
    abstract: dict[str, PyTree],
    *,
    verify: bool,
    partial: bool = False,
) -> tuple[dict[str, PyTree], Manifest]:
    """(the restored tree, the manifest) of a step's folder.

    abstract: {item: abstract arrays with shardings}; of an import, which has only parameters, only
    the item `params` is restored. verify: compare the checksum of every leaf, computed on the
    devices, with the manifest's. partial: leave out the stored leaves that `abstract` lacks.

    Raises:
        ValueError: the checkpoint has other leaves than `abstract`; lists all that differ.
        Damaged: a leaf can't be read or has other bits, in all processes.
        Unreadable: its files cannot be opened, in all processes.
    """
    manifest = read_manifest(folder)
    if manifest.has_only_params:
        abstract = {"params": abstract["params"]}
    expected = manifests.leaves(abstract)
    stored = {
        name: leaf
        for name, leaf in manifest.leaves.items()
        if (name in expected if partial else name.split(".", 1)[0] in abstract)
        and not name.endswith(manifests.CONSTANTS)
    }
    if lines := manifests.differences(stored, expected):
        raise ValueError(
            f"the checkpoint {folder} has other leaves than this run:\n  " + "\n  ".join(lines)
        )
    leaves, structure = jax.tree.flatten(abstract)
    read = functools.partial(_read_leaf, StoredArrays(folder, manifest.leaves))

    def read_all() -> dict[str, PyTree]:
        with concurrent.futures.ThreadPoolExecutor(NUM_READERS) as readers:
            return structure.unflatten(readers.map(read, expected, leaves))

    tree = _together(read_all, folder)
    if verify:
        sums = dict(zip(expected, map(checksums.hexadecimal, device_checksums(tree)), strict=True))
        _together(lambda: manifests.check_bits(stored, sums), folder)
    return tree, manifest


def read_manifest(folder: StoragePath) -> Manifest:
    """The manifest of a step's folder; Unreadable or Damaged in all processes if it is in any."""
    return _together(lambda: step_files.read_manifest(folder), folder)


def _read_leaf(stored: StoredArrays, name: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf in the sharding of `abstract`; each process reads the shards of its own devices.

    Not through Orbax, which has barriers, and which reads files beside the arrays that no checksum
    covers.
    """
    array = stored.open(name)
    shape, layout = abstract.shape, abstract.sharding
    assert layout is not None
    indices = {
        device: tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        for device, index in layout.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    # replicas share one read; all reads of the leaf are under way before the first result
    reads = {str(index): array.start(index) for index in indices.values()}
    shards = [
        jax.device_put(
            np.asarray(arrays.result(reads[str(index)], name)),
            jax.sharding.SingleDeviceSharding(device, memory_kind=layout.memory_kind),
            may_alias=False,
        )
        for device, index in indices.items()
    ]
    return jax.make_array_from_single_device_arrays(shape, layout, shards)


def device_checksums(tree: PyTree) -> np.ndarray:
    """Checksums of all leaves on their devices, in the tree's order: uint32 [leaves, 2]."""
    first = jax.tree.leaves(tree)[0].sharding
    mesh = first.mesh if isinstance(first, jax.sharding.NamedSharding) else None
    return np.asarray(_stacked_checksums(mesh)(tree).addressable_data(0))


@functools.cache
def _stacked_checksums(mesh: jax.sharding.Mesh | None) -> Callable[[PyTree], jax.Array]:
    def stacked(tree: PyTree) -> jax.Array:
        on_device = sharding.on_device(tree)  # arrays in two memories can't be stacked
        return jnp.stack(jax.tree.leaves(checksums.checksums(on_device)))

    if mesh is None:
        return jax.jit(stacked)
    spec = jax.sharding.PartitionSpec()
    return jax.jit(stacked, out_shardings=jax.sharding.NamedSharding(mesh, spec))


def _together(read: Callable[[], T], folder: StoragePath) -> T:
    """The result of `read`; raises its Unreadable or Damaged of any process in all of them."""
    results: list[T] = []
    fault = ""
    try:
        results.append(read())
    except (Unreadable, Damaged) as error:
        fault = f"{_CANNOT}: {error}" if isinstance(error, Unreadable) else str(error)
    faults = _gather(fault)
    if _CANNOT in faults:
        raise Unreadable(f"the checkpoint {folder} {faults}; it is as it was")
    if faults:
        raise Damaged(faults)
    return results[0]


def _gather(fault: str) -> str:
    """The faults of all processes, the same text in all of them."""
    if jax.process_count() == 1:
        return fault
    own = np.frombuffer(fault.encode()[:512].ljust(512, b"\0"), np.uint8)
    texts = [
        bytes(row).rstrip(b"\0").decode(errors="replace")
        for row in multihost_utils.process_allgather(own)
    ]
    return "; ".join(f"process {i}: {text}" for i, text in enumerate(texts) if text)
