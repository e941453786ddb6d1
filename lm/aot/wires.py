"""How long collectives take at least: which wires the devices of a group have between them.

A TPU slice is a torus. In each dimension that a group fills it has a ring (both directions of a
link count) where the torus closes, or a line (one) where it doesn't; a group that takes every k-th
chip shares its line with k - 1 others. Several dimensions work at once. Between slices, and
between nodes of GPUs, there is the data centre's network; GPUs of a node share a switch. See
https://jax-ml.github.io/scaling-book/sharding for the model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from lm.aot.topology import Topology
from lm.aot.traffic import Collective


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device is: its slice or node, its chip in that, its number on the chip."""

    island: int
    chip: tuple[int, ...]
    core: int


@dataclasses.dataclass(frozen=True)
class Path:
    """What a group of devices sends over: `network` or the links, and bytes/s of a device."""

    network: bool
    bandwidth: float | None  # None: not published
    hops: float = 1.0  # of an all-to-all: mean distance on the torus over that of its ring traffic


def places(topology: Topology, devices: Sequence[Any]) -> list[Place]:
    """Of the devices in the order of a mesh."""
    found = []
    for i, device in enumerate(devices):
        if topology.chip.platform == "tpu":
            island = int(getattr(device, "slice_index", None) or 0)
            found.append(Place(island, tuple(device.coords), int(device.core_on_chip)))
        elif topology.chip.platform == "gpu":
            number = int(getattr(device, "id", i))
            per_node = topology.shape[1]
            found.append(Place(number // per_node, (number % per_node,), 0))
        else:
            found.append(Place(0, (i,), 0))
    return found


def path(topology: Topology, members: Sequence[Place]) -> Path:
    """The wires that connect the members of one group."""
    chip = topology.chip
    islands = {m.island for m in members}
    if len(islands) > 1:
        inside = len(members) / len(islands)  # members of an island drive its ports together
        if chip.network is None:
            return Path(True, None)
        rate = chip.network * inside / chip.devices
        if chip.platform == "gpu":
            rate = min(rate, chip.link)
        return Path(True, rate)
    if chip.platform != "tpu":
        return Path(False, chip.link or None)
    links, hops = 0.0, 1.0
    for dimension, length in enumerate(topology.shape):
        at = sorted({m.chip[dimension] for m in members})
        if len(at) < 2:
            continue
        ring = len(at) == length and chip.wraps > 0 and length % chip.wraps == 0
        stride = min(b - a for a, b in itertools.pairwise(at))
        links += 2.0 if ring else 1.0 / stride
        # of an all-to-all, bytes travel a quarter of a ring or a third of a line on average
        hops = max(hops, len(at) / 4 if ring else len(at) / 3)
    cores = len({m.core for m in members})
    if not links:  # two cores of one chip: inside of the package, faster than any link
        return Path(False, chip.link * 2 * chip.dims)
    shared = chip.devices / cores  # cores in different groups share the chip's links
    return Path(False, chip.link * links / shared, hops)


def seconds(collective: Collective, path: Path) -> float | None:
    """The least time of a collective over a whole step; None where bandwidth is not published."""
    if path.bandwidth is None:
        return None
    if collective.kind.endswith("all-to-all"):
        return collective.bytes * path.hops / path.bandwidth
    return collective.bytes / path.bandwidth
