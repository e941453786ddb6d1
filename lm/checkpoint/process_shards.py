"""The shards of arrays that each process holds, and their move to another process.

Devices are those of the mesh in its order; every process has as many as the others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

Shards = list[list[np.ndarray]]  # of each leaf, of each device of a process


class ProcessShards:
    """The shards of abstract arrays, which name their sharding over one mesh, by process."""

    def __init__(self, abstract: Sequence[jax.ShapeDtypeStruct]) -> None:
        """Raises ValueError where the processes differ in their number of devices."""
        self._abstract = abstract
        layout: Any = abstract[0].sharding
        self._mesh: jax.sharding.Mesh = layout.mesh
        self._count = jax.process_count()
        self._devices = [
            [i for i, d in enumerate(self._mesh.devices.flat) if d.process_index == process]
            for process in range(self._count)
        ]
        if len(set(map(len, self._devices))) > 1:
            raise ValueError("config.checkpoint.memory_every: the processes differ in devices")

    def __str__(self) -> str:
        """The mesh and the devices of each process, which are equal where shards are read again."""
        return f"{dict(self._mesh.shape)} {self._devices}"

    def __iter__(self) -> Iterator[tuple[int, jax.ShapeDtypeStruct]]:
        return enumerate(self._abstract)

    def num_bytes(self, process: int) -> int:
        """The bytes of the different shards of a process."""
        return sum(len(self.firsts(i, process)) * num_bytes(leaf) for i, leaf in self)

    def replicas(self, i: int, process: int) -> list[int]:
        """For each device of a process, the first one there with the same shard of leaf `i`."""
        leaf, first = self._abstract[i], {}
        where = leaf.sharding.devices_indices_map(leaf.shape)
        devices = self._mesh.devices.flat
        keys = [str(where[devices[flat]]) for flat in self._devices[process]]
        return [first.setdefault(key, j) for j, key in enumerate(keys)]

    def firsts(self, i: int, process: int) -> list[int]:
        """The devices of a process of which each has another shard of leaf `i`."""
        return sorted(set(self.replicas(i, process)))

    def local(self, x: jax.Array) -> list[np.ndarray]:
        """The shards on this process's devices."""
        by_device = {shard.device: shard.data for shard in x.addressable_shards}
        return [np.asarray(by_device[d]) for d in self._mesh.devices.flat if d in by_device]

    def next(self, i: int, x: jax.Array) -> list[np.ndarray]:
        """The shards of leaf `i`, whose value is `x`, that the process before this one has."""
        return self.local(self._shift(i, 1)(in_device_memory(x)))

    def send_back(self, i: int, shards: Sequence[np.ndarray] | None) -> list[np.ndarray]:
        """The shards of leaf `i` that the next process holds of this one; `shards`: those that this
        one holds of the process before it, where they are wanted.
        """
        leaf = self._abstract[i]
        shape = leaf.sharding.shard_shape(leaf.shape)
        if shards is None:
            shards = [np.zeros(shape, leaf.dtype)] * len(self._devices[0])
        return self.local(self._shift(i, -1)(assemble(in_device_memory(leaf), shards)))

    def _shift(self, i: int, by: int) -> Any:
        """A function that moves the shards of an array like leaf `i` by as many processes."""
        pairs = tuple(
            pair
            for process in range(self._count)
            for pair in zip(
                self._devices[process], self._devices[(process + by) % self._count], strict=True
            )
        )
        return _make_shift(self._mesh, self._abstract[i].sharding.spec, pairs)


def num_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """The size of a shard."""
    assert leaf.sharding is not None
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def assemble(abstract: jax.ShapeDtypeStruct, shards: Sequence[np.ndarray]) -> jax.Array:
    """The array whose shards on this process's devices are these, in the order of the mesh."""
    layout: Any = abstract.sharding
    own = [d for d in layout.mesh.devices.flat if d.process_index == jax.process_index()]
    placed = [
        jax.device_put(
            shard,
            jax.sharding.SingleDeviceSharding(device, memory_kind=layout.memory_kind),
            may_alias=False,
        )
        for device, shard in zip(own, shards, strict=True)
    ]
    return jax.make_array_from_single_device_arrays(abstract.shape, layout, placed)


def in_device_memory(x: Any) -> Any:
    """An array, or an abstract one, whose memory is the devices'."""
    if x.sharding.memory_kind != "pinned_host":
        return x
    layout = x.sharding.with_memory_kind("device")
    if isinstance(x, jax.Array):
        return jax.device_put(x, layout)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)


@functools.cache
def _make_shift(
    mesh: jax.sharding.Mesh, spec: jax.sharding.PartitionSpec, pairs: tuple[tuple[int, int], ...]
) -> Any:
    def shift(x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(x, mesh.axis_names, pairs)

    # the shards of a replicated array stay as they are: no result is checked for being equal
    mapped = jax.shard_map(shift, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped)
