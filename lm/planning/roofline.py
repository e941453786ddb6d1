"""Bounds of the time of a step: products, HBM traffic and transfers, each over a published peak.

A real step takes longer. The compiler and the hardware decide how much of them overlaps; the step
lies between the longest of them, if all overlap, and their sum, if none do.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from lm.planning.costs import Work
from lm.planning.interconnect import Transfer
from lm.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class StepTimeBounds:
    """Seconds of a step. None: a peak that isn't published."""

    compute: float | None
    hbm: float | None
    links: dict[str, float]  # by mesh axis, ICI or NVLink
    network: float | None  # between slices or nodes
    unknown: tuple[str, ...]  # left out, as their figures are not known

    def parts(self) -> dict[str, float]:
        """Every time that is known, by name."""
        links = {f"links, {axis}": t for axis, t in self.links.items()}
        named = {"compute": self.compute, "HBM": self.hbm, **links, "network": self.network}
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
    def midpoint_s(self) -> float:
        """The middle between the bounds, by which plans are compared."""
        return (self.lower_bound_s + self.upper_bound_s) / 2

    @property
    def bottleneck(self) -> str:
        """The name of the longest."""
        parts = self.parts()
        return max(parts, key=lambda name: parts[name], default="")


def times(
    topology: Topology, work: Work, transfers: Sequence[Transfer], dtype: str
) -> StepTimeBounds:
    """The bounds of a step by the published peaks of a topology's chips."""
    chip = topology.chip
    peak = chip.peak_flops(dtype)
    links: dict[str, float] = defaultdict(float)
    network, unknown = 0.0, []
    if peak is None:
        unknown.append(f"peak FLOP/s of {chip.name} in {dtype}{chip.dtype_with_peak()}")
    if work.unknown:
        unknown.append(f"FLOPs of {len(work.unknown)} kernels that declare none")
    if work.loops:
        unknown.append(f"length of {len(work.loops)} loops, which count once: {work.loops[0]}")
    for transfer in transfers:
        if transfer.seconds is None:
            kind = "network" if transfer.network else "links"
            unknown.append(f"bandwidth of {chip.name}'s {kind}")
        elif transfer.network:
            network += transfer.seconds
        else:
            links[transfer.axis] += transfer.seconds
    return StepTimeBounds(
        compute=work.flops / peak if peak else None,
        hbm=work.hbm_bytes / chip.hbm_bandwidth if chip.hbm_bandwidth else None,
        links=dict(links),
        network=network or None,
        unknown=tuple(dict.fromkeys(unknown)),
    )
