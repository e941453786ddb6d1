"""Lower bounds of the time of collectives, by the bandwidth between the devices of a group.

A TPU slice is a torus. In each dimension that a group fills it has a ring (both directions of a
link count) where the torus closes, or a line (one) where it doesn't; a group of every k-th chip
shares its line with k - 1 others. In a gather or a sum the dimensions share the bytes, so their
bandwidths add up. In an all-to-all every byte crosses each dimension that its source and target
differ in, and the slowest dimension decides. Between slices, and between nodes of GPUs, there is
the data centre's network; GPUs of a node share a switch. See
https://jax-ml.github.io/scaling-book/sharding for the model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from jax.sharding import Mesh

from lm.planning.topology import Topology
from lm.planning.traffic import Collective


@dataclasses.dataclass(frozen=True)
class ChipCoord:
    """The coordinates of a device: its slice or node, its chip in that, its number on the chip."""

    slice_or_node: int
    chip: tuple[int, ...]
    core: int = 0


@dataclasses.dataclass(frozen=True)
class Path:
    """The connection of a group of devices: the network or links, and bytes/s of a device."""

    network: bool
    bandwidth: float | None  # of a gather or a sum; None: not published
    exchange: float | None  # of an all-to-all


@dataclasses.dataclass(frozen=True)
class Transfer:
    """All collectives of one kind over the same mesh axes."""

    kind: str
    axis: str
    size: int  # devices of a group
    count: float  # in a step
    bytes: float  # that a device sends in a step
    seconds: float | None  # lower bound; None where bandwidth is not published
    network: bool  # leaves the slice or the node
    source: str  # of the largest


def chip_coords(topology: Topology, mesh: Mesh) -> list[ChipCoord]:
    """The coordinates of the devices of a mesh, in its order."""
    devices, platform = mesh.devices.flat, topology.chip.platform
    if platform == "tpu":
        return [
            ChipCoord(getattr(d, "slice_index", None) or 0, tuple(d.coords), d.core_on_chip)
            for d in devices
        ]
    if platform == "gpu":
        nodes = (divmod(d.id, topology.shape[1]) for d in devices)
        return [ChipCoord(node, (number,)) for node, number in nodes]
    return [ChipCoord(0, (i,)) for i in range(mesh.size)]


def path(topology: Topology, members: Sequence[ChipCoord]) -> Path:
    """The connection of the members of one group."""
    chip = topology.chip
    groups = {m.slice_or_node for m in members}
    if len(groups) > 1:
        if chip.network is None:
            return Path(True, None, None)
        # members of one slice or node drive its ports together
        rate = chip.network * (len(members) / len(groups)) / chip.devices
        rate = min(rate, chip.link) if chip.platform == "gpu" else rate
        return Path(True, rate, rate)
    if chip.platform != "tpu":
        return Path(False, chip.link or None, chip.link or None)
    chips = len({m.chip for m in members})
    links, slowest = 0.0, 0.0
    for dimension, length in enumerate(topology.shape):
        at = sorted({m.chip[dimension] for m in members})
        n = len(at)
        if n < 2:
            continue
        stride = min(b - a for a, b in itertools.pairwise(at))
        here = 2.0 if n == length and topology.closes(dimension) else 1.0 / stride
        links += here
        # Of what a chip sends to all, itself included, the fullest link of the dimension passes
        # n / 4 (n odd: (n^2 - 1) / 4n) in the direction of a line, half of that in each of a ring.
        passed = (n * n // 4) / n * chips / (chips - 1)
        slowest = max(slowest, passed / here)
    if not links:  # two cores of one chip: inside of the package, faster than any link
        inside = chip.link * 2 * chip.dims
        return Path(False, inside, inside)
    # cores in different groups share the chip's links; those of one group take in the same bytes,
    # except in an all-to-all
    shared = chip.devices / len({m.core for m in members})
    return Path(False, chip.link * links / shared, chip.link / slowest / chip.devices)


def transfer_seconds(collective: Collective, path: Path) -> float | None:
    """Lower bound of a collective over a whole step; None where bandwidth is not published."""
    rate = path.exchange if collective.kind.endswith("all-to-all") else path.bandwidth
    return None if rate is None else collective.bytes / rate


def transfers(
    collectives: Sequence[Collective], topology: Topology, coords: Sequence[ChipCoord]
) -> tuple[Transfer, ...]:
    """The transfers of a step, the largest first.

    coords: those of the devices in the order of the mesh.
    """
    groups: dict[tuple[str, str, bool], list[tuple[Collective, float | None]]] = {}
    for collective in collectives:
        found = path(topology, [coords[i] for i in collective.group])
        key = (collective.kind, collective.axis, found.network)
        pair = (collective, transfer_seconds(collective, found))
        groups.setdefault(key, []).append(pair)
    result = []
    for (kind, axis, network), pairs in groups.items():
        members, times = zip(*pairs, strict=True)
        result.append(
            Transfer(
                kind=kind,
                axis=axis,
                size=members[0].size,
                count=sum(c.times for c in members),
                bytes=sum(c.bytes for c in members),
                seconds=None if None in times else sum(times),
                network=network,
                source=max(members, key=lambda c: c.bytes).source,
            )
        )
    return tuple(sorted(result, key=lambda t: -t.bytes))
