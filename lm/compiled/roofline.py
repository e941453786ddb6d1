"""Bounds of the time of a step: products, HBM traffic and transfers, each over a published peak, in
the order of the compiled schedule (lm/compiled/schedule.py).

What the bounds leave open is how much of its HBM traffic an operation hides behind its products:
all, or nothing. A real step takes longer where kernels stay below the peaks.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from lm.compiled import hlo, schedule
from lm.compiled.costs import Work
from lm.compiled.interconnect import PricedCollective
from lm.compiled.topology import Topology


@dataclasses.dataclass(frozen=True)
class StepTimeBounds:
    """Seconds of a step. None: a peak that isn't published."""

    compute: float | None
    hbm: float | None
    links: dict[str, float]  # by mesh axis, ICI or NVLink
    network: float | None  # between slices or nodes
    exposed: dict[str, float]  # waited for at the lower bound, by the same names
    lower_bound_s: float
    upper_bound_s: float
    unknown: tuple[str, ...]  # left out, as their figures are not known

    def parts(self) -> dict[str, float]:
        """Every time that is known, by name."""
        links = {f"links, {axis}": t for axis, t in self.links.items()}
        named = {"compute": self.compute, "HBM": self.hbm, **links, "network": self.network}
        return {name: t for name, t in named.items() if t}

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
    topology: Topology,
    module: hlo.Module,
    work: Work,
    collectives: Sequence[PricedCollective],
    dtype: str,
) -> StepTimeBounds:
    """The bounds of a step by the published peaks of a topology's chips."""
    chip = topology.chip
    peak = chip.peak_flops(dtype)
    sent: dict[str, float] = defaultdict(float)
    unknown = []
    if peak is None:
        unknown.append(f"peak FLOP/s of {chip.name} in {dtype}{chip.dtype_with_peak()}")
    if work.unknown:
        unknown.append(f"FLOPs of {len(work.unknown)} kernels that declare none")
    if work.loops:
        unknown.append(f"length of {len(work.loops)} loops, which count once: {work.loops[0]}")
    for priced in collectives:
        if priced.seconds is None:
            kind = "network" if priced.network else "links"
            unknown.append(f"bandwidth of {chip.name}'s {kind}")
        else:
            sent[schedule.NETWORK if priced.network else priced.collective.axis] += priced.seconds
    lower, upper = (
        schedule.simulate(
            module,
            collectives,
            peak_flops=peak,
            hbm_bandwidth=chip.hbm_bandwidth,
            speedup=chip.speedup,
            overlapped=overlapped,
        )
        for overlapped in (True, False)
    )
    spared = sum(n * (1 - 1 / chip.speedup(kind)) for kind, n in work.narrow_flops.items())
    return StepTimeBounds(
        compute=(work.flops - spared) / peak if peak else None,
        hbm=work.hbm_bytes / chip.hbm_bandwidth if chip.hbm_bandwidth else None,
        network=sent.pop(schedule.NETWORK, None),
        links=dict(sent),
        exposed=lower.exposed,
        lower_bound_s=lower.seconds,
        upper_bound_s=upper.seconds,
        unknown=tuple(dict.fromkeys(unknown)),
    )
