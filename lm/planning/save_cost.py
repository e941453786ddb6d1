"""The cost of a checkpoint: bytes of a host, by the shardings of the state, before compression."""

from __future__ import annotations

import collections
import dataclasses
import math

import jax

from lm.checkpoint import chunk_readers
from lm.checkpoint.manager import CHUNK_BYTES
from lm.types import TrainState


@dataclasses.dataclass(frozen=True)
class SaveCost:
    """Bytes of a save, and of reading it back."""

    num_hosts: int
    total: int
    written: int  # by the host that writes most
    read_back: int  # by a host, at most

    @property
    def host_memory(self) -> int:
        """Bytes of the copy beside which training goes on, and of its compressed form until that is
        stored; reading back comes afterwards.
        """
        return max(2 * self.written, 3 * min(self.read_back, chunk_readers.MAX_BYTES))


def measure(state: TrainState) -> SaveCost:
    """The cost of saving an abstract state with shardings."""
    tree = {"params": state.params, "opt_state": state.opt_state}
    written: dict[int, int] = collections.Counter()
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += math.prod(leaf.shape) * leaf.dtype.itemsize
        for host, size in bytes_by_host(leaf).items():
            written[host] += size
    return SaveCost(
        num_hosts=len(written),
        total=total,
        written=max(written.values()),
        read_back=min(total, -(-total // len(written)) + CHUNK_BYTES),
    )


def bytes_by_host(leaf: jax.ShapeDtypeStruct) -> dict[int, int]:
    """The bytes of an array that each host writes: replicas of a shard write equal parts of it
    along its first dimension that they divide, else the first of them writes it whole.
    """
    assert leaf.sharding is not None
    replicas: dict[str, list[int]] = collections.defaultdict(list)  # hosts of each shard, by index
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        replicas[str(index)].append(device.process_index)
    shard = leaf.sharding.shard_shape(leaf.shape)
    size = math.prod(shard) * leaf.dtype.itemsize
    count = len(next(iter(replicas.values())))
    in_parts = any(n % count == 0 for n in shard)
    written = dict.fromkeys({host for hosts in replicas.values() for host in hosts}, 0)
    for hosts in replicas.values():
        for host in hosts if in_parts else hosts[:1]:
            written[host] += size // (count if in_parts else 1)
    return written
