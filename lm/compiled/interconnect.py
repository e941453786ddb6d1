"""Lower bounds of the time of collectives, by the bandwidth between the devices of a group.

A TPU slice is a torus. In each dimension that a group fills it has a ring (both directions of a
link count) where the torus closes, or a line (one) where it doesn't; a group of every k-th chip
shares its line or ring with k - 1 others. In a gather or a sum the dimensions share the bytes, so
their bandwidths add up. In an all-to-all every byte crosses each dimension that its source and
target differ in, and the slowest dimension decides. In a permutation the fullest link decides,
whose load is known pair by pair. Between slices, and between nodes of GPUs, there is the data
centre's network; GPUs of a node share a switch. See https://jax-ml.github.io/scaling-book/sharding
for the model, also of latency: a byte takes a microsecond or more for each chip that it passes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence

from jax.sharding import Mesh

from lm.compiled.topology import Topology
from lm.compiled.traffic import Collective

HOP_SECONDS = 1e-6  # of a TPU's link, at least (scaling book, above)


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
    latency: float = 0.0  # seconds from one end of the group to the other


@dataclasses.dataclass(frozen=True)
class PricedCollective:
    """A collective with the lower bound of its time over a whole step."""

    collective: Collective
    seconds: float | None  # None: where bandwidth is not published
    network: bool  # leaves the slice or the node


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
    links, slowest, hops = 0.0, 0.0, 0
    for dimension, length in enumerate(topology.shape):
        at = sorted({m.chip[dimension] for m in members})
        n = len(at)
        if n < 2:
            continue
        stride = min(b - a for a, b in itertools.pairwise(at))
        closes = n * stride == length and topology.closes(dimension)
        here = (2.0 if closes else 1.0) / stride
        links += here
        hops += length // 2 if closes else at[-1] - at[0]
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
    rates = chip.link * links / shared, chip.link / slowest / chip.devices
    return Path(False, *rates, hops * HOP_SECONDS)


def transfer_seconds(collective: Collective, path: Path) -> float | None:
    """Lower bound of a collective over a whole step; None where bandwidth is not published."""
    rate = path.exchange if collective.kind.endswith("all-to-all") else path.bandwidth
    if rate is None:
        return None
    passes = 2 if collective.kind == "all-reduce" else 1  # there and back
    return max(collective.bytes / rate, passes * path.latency * collective.times)


def permutation_seconds(
    collective: Collective, topology: Topology, coords: Sequence[ChipCoord]
) -> float:
    """Lower bound of a permutation within a slice, over a whole step: bytes go along one dimension
    after another, the short way, half of them each way where both are as short.

    Both directions of a link count, as libtpu permutes in both at once.
    """
    load: dict[tuple[tuple[int, ...], int], float] = defaultdict(float)
    longest = 0
    for source, target in collective.pairs:
        at, end, steps = list(coords[source].chip), coords[target].chip, 0
        for dimension, length in enumerate(topology.shape):
            ahead = (end[dimension] - at[dimension]) % length
            ways = [(1, ahead), (-1, length - ahead)]
            if not topology.closes(dimension):
                ways = [w for w in ways if 0 <= at[dimension] + w[0] * w[1] < length]
            least = min(count for _, count in ways)
            ways = [direction for direction, count in ways if count == least]
            for direction, k in itertools.product(ways, range(least)):
                chip = list(at)  # the chip whose link to the next one up is passed
                chip[dimension] = (at[dimension] + direction * k - (direction < 0)) % length
                load[tuple(chip), dimension] += 1 / len(ways)
            at[dimension], steps = end[dimension], steps + least
        longest = max(longest, steps)
    fullest = max(load.values(), default=0.0) / 2
    return collective.times * max(
        fullest * collective.payload / topology.chip.link, longest * HOP_SECONDS
    )


def price(
    collectives: Sequence[Collective], topology: Topology, coords: Sequence[ChipCoord]
) -> list[PricedCollective]:
    """The collectives with their times. coords: those of the devices in the order of the mesh."""
    priced = []
    for collective in collectives:
        found = path(topology, [coords[i] for i in collective.group])
        if collective.pairs and topology.chip.platform == "tpu" and not found.network:
            seconds: float | None = permutation_seconds(collective, topology, coords)
        else:
            seconds = transfer_seconds(collective, found)
        priced.append(PricedCollective(collective, seconds, found.network))
    return priced


def transfers(collectives: Sequence[PricedCollective]) -> tuple[Transfer, ...]:
    """The transfers of a step, the largest first."""
    groups: dict[tuple[str, str, bool], list[tuple[Collective, float | None]]] = {}
    for priced in collectives:
        key = (priced.collective.kind, priced.collective.axis, priced.network)
        groups.setdefault(key, []).append((priced.collective, priced.seconds))
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
