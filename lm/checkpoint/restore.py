"""One checkpoint from its files to the devices, checked; and what processes agree on about it.

No process may leave the others in a collective or a barrier because it met a damaged file. So
each of them first tries for itself, and all hear of every fault before the next collective.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lm.checkpoint import manifest as manifests
from lm.checkpoint import step_files
from lm.checkpoint.manifest import Damaged, Manifest
from lm.checkpoint.step_files import Unreadable
from lm.parallel import sharding

_CANNOT = "cannot be opened"  # how the fault of an Unreadable begins
NUM_READERS = 8  # leaves that are read at the same time


def restore(
    folder: epath.Path,
    wanted: dict[str, Any],
    *,
    verify: bool,
    leave_out: Collection[str] = (),
) -> tuple[str, dict[str, Any], Manifest | None]:
    """(what is wrong or "", the restored tree, the manifest) of a step's folder.

    wanted: {item: abstract arrays with shardings}. verify: compare the checksum of every leaf,
    taken on the devices, with the manifest's. leave_out: names of stored leaves that aren't wanted.
    A checkpoint of parameters alone (an import) gives these alone.

    Raises:
        ValueError: the checkpoint has other leaves than `wanted`; the message lists them.
        Unreadable: its files cannot be opened.
    """
    tree, fault = {}, ""
    try:
        manifest = manifest_of(folder)
    except Damaged as error:
        return str(error), tree, None
    if all(name.startswith("params.") for name in manifest.leaves):
        wanted = {"params": wanted["params"]}
    there = {
        n: x
        for n, x in manifest.leaves.items()
        if n.split(".", 1)[0] in wanted and n not in leave_out
    }
    if lines := manifests.differences(there, manifests.leaves(wanted)):
        raise ValueError(
            f"the checkpoint {folder} has other leaves than this run:\n  " + "\n  ".join(lines)
        )
    leaves, structure = jax.tree.flatten(wanted)
    read = functools.partial(_read, folder, manifest)
    try:
        with concurrent.futures.ThreadPoolExecutor(NUM_READERS) as readers:
            tree = structure.unflatten(readers.map(read, manifests.leaves(wanted), leaves))
    except (Damaged, Unreadable) as error:
        fault = _fault(error)
    if (fault := _agree(fault, folder)) or not verify:
        return fault, tree, manifest
    found = manifests.leaves(tree, sums(tree))
    wrong = [name for name in there if found[name].checksum != there[name].checksum]
    if wrong:
        name, others = wrong[0], f" and {len(wrong) - 1} other leaves" if wrong[1:] else ""
        fault = (
            f"{name}{others}: checksum {found[name].checksum}, the manifest says "
            f"{there[name].checksum}"
        )
    return _agree(fault, folder), tree, manifest


def manifest_of(folder: epath.Path) -> Manifest:
    """The manifest of a step's folder, which all processes read together.

    Raises:
        Unreadable, Damaged: in all of them, if any can't open or read it.
    """
    manifest, fault = None, ""
    try:
        manifest = step_files.read_manifest(folder)
    except (Damaged, Unreadable) as error:
        fault = _fault(error)
    if (fault := _agree(fault, folder)) or manifest is None:
        raise Damaged(fault)
    return manifest


def _read(folder: epath.Path, manifest: Manifest, name: str, wanted: Any) -> jax.Array:
    """A leaf in the sharding of `wanted`; each process reads what its own devices hold.

    Not through Orbax, which has barriers, and which reads files beside the arrays that no checksum
    covers.
    """
    array = step_files.open_leaf(folder, name, manifest.leaves[name])
    indices = {
        device: tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, wanted.shape, strict=True))
        for device, index in wanted.sharding.addressable_devices_indices_map(wanted.shape).items()
    }
    # replicas share what is read once; all reads of the leaf are under way before the first result
    reading = {str(index): array[index].read() for index in indices.values()}
    kind = wanted.sharding.memory_kind
    shards = [
        jax.device_put(
            np.asarray(step_files.result(reading[str(index)], name)),
            jax.sharding.SingleDeviceSharding(device, memory_kind=kind),
            may_alias=False,
        )
        for device, index in indices.items()
    ]
    return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, shards)


@functools.cache
def _make_sums(mesh: Any) -> Callable[[Any], jax.Array]:
    """Tree -> checksums of its leaves, uint32 [leaves, 2], on every device of `mesh`."""

    def stacked(tree: Any) -> jax.Array:
        on_device = sharding.on_device(tree)  # arrays in two memories are no operands of one stack
        return jnp.stack(jax.tree.leaves(manifests.checksums(on_device)))

    if mesh is None:
        return jax.jit(stacked)
    spec = jax.sharding.PartitionSpec()
    return jax.jit(stacked, out_shardings=jax.sharding.NamedSharding(mesh, spec))


def sums(tree: Any) -> np.ndarray:
    """The checksum of every leaf, in the tree's order: uint32 [leaves, 2]."""
    first = jax.tree.leaves(tree)[0].sharding
    mesh = first.mesh if isinstance(first, jax.sharding.NamedSharding) else None
    return np.asarray(_make_sums(mesh)(tree).addressable_data(0))


def from_lead(value: int) -> int:
    """The value that the lead process has."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def _fault(error: Exception) -> str:
    return f"{_CANNOT}: {error}" if isinstance(error, Unreadable) else str(error)


def _agree(fault: str, folder: epath.Path) -> str:
    """Faults that any process found, the same text in all of them; "" if none did.

    Raises:
        Unreadable: a process cannot open the files, in all of them.
    """
    found = _gather(fault)
    if _CANNOT in found:
        raise Unreadable(f"the checkpoint {folder} {found}; it is as it was")
    return found


def _gather(fault: str) -> str:
    if jax.process_count() == 1:
        return fault
    mine = np.zeros(512, np.uint8)
    text = fault.encode()[: mine.size]
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    found = [
        f"process {i}: {bytes(row).rstrip(bytes(1)).decode(errors='replace')}"
        for i, row in enumerate(multihost_utils.process_allgather(mine))
        if row.any()
    ]
    return "; ".join(found)
