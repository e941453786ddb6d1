"""The least time of a step by what it needs: products, HBM, wires. And what that makes of MFU.

Each time is work over a published peak, so a real step takes longer. How much of them overlaps
the compiler decides and the hardware shows; the step lies between all of them at once (the longest
alone) and one after the other (their sum).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lm.planning import interconnect
from lm.planning.costs import Work
from lm.planning.interconnect import ChipCoord
from lm.planning.topology import Topology
from lm.planning.traffic import Collective


@dataclasses.dataclass(frozen=True)
class StepTimeBounds:
    """Seconds of a step. None: a peak that isn't published."""

    compute: float | None
    hbm: float | None
    links: dict[str, float]  # by mesh axis, ICI or NVLink
    network: float | None  # between slices or nodes
    unknown: tuple[str, ...]  # what is left out because nobody says how much it is

    def parts(self) -> dict[str, float]:
        """Every time that is known, by name."""
        named = {"compute": self.compute, "HBM": self.hbm}
        named |= {f"links, {axis}": t for axis, t in self.links.items()}
        named["network"] = self.network
        return {name: t for name, t in named.items() if t}

    @property
    def lower_bound_s(self) -> float:
        """All overlapped."""
        return max(self.parts().values(), default=0.0)

    @property
    def upper_bound_s(self) -> float:
        """None overlapped."""
        return sum(self.parts().values())

    @property
    def bottleneck(self) -> str:
        """The name of the longest."""
        parts = self.parts()
        return max(parts, key=lambda name: parts[name]) if parts else ""


def times(
    topology: Topology,
    work: Work,
    collectives: Sequence[Collective],
    places: Sequence[ChipCoord],
    dtype: str,
) -> StepTimeBounds:
    """places: of the devices in the order of the mesh."""
    chip = topology.chip
    peak = chip.peak_flops(dtype)
    unknown = []
    if peak is None:
        unknown.append(f"peak FLOP/s of {chip.name} in {dtype}{chip.dtype_with_peak()}")
    if work.unknown:
        unknown.append(f"FLOPs of {len(work.unknown)} kernels that declare none")
    if work.loops:
        unknown.append(f"length of {len(work.loops)} loops, which count once: {work.loops[0]}")
    links: dict[str, float] = {}
    network = 0.0
    for collective in collectives:
        path = interconnect.path(topology, [places[i] for i in collective.group])
        t = interconnect.transfer_seconds(collective, path)
        if t is None:
            missing = f"bandwidth of {chip.name}'s {'network' if path.network else 'links'}"
            unknown += [missing] if missing not in unknown else []
        elif path.network:
            network += t
        else:
            links[collective.axis] = links.get(collective.axis, 0.0) + t
    return StepTimeBounds(
        compute=work.flops / peak if peak else None,
        hbm=work.hbm_bytes / chip.hbm_bandwidth if chip.hbm_bandwidth else None,
        links=links,
        network=network or None,
        unknown=tuple(unknown),
    )
