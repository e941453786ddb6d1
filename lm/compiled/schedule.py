"""Time of a step by its compiled schedule: operations in their order, with the transfers and copies
that the compiler starts before them and waits for after them.

One device runs the operations of a scheduled program one after the other. A collective between its
start and its done, and a copy between HBM and the chip, run behind the operations in between; each
mesh axis and HBM is a queue of them, served in order at its bandwidth. The device waits at a done
for what is left, and for all of a collective without a start of its own: that time is exposed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from lm.compiled import costs, hlo
from lm.compiled.hlo import Computation, Instruction
from lm.compiled.interconnect import PricedCollective

HBM, NETWORK = "HBM", "network"
_COLLECTIVE_START, _COLLECTIVE_DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
_RENDEZVOUS = "_xla_host_transfer_rendezvous"  # of a send between slices and its recv


@dataclasses.dataclass(frozen=True)
class ScheduleTime:
    """Seconds of a step, and of those the ones in which the device waits, by what it waits for."""

    seconds: float
    exposed: dict[str, float]


def simulate(
    module: hlo.Module,
    collectives: Sequence[PricedCollective],
    *,
    peak_flops: float | None,
    hbm_bandwidth: float,
    speedup: Callable[[str], float],
    overlapped: bool,
) -> ScheduleTime:
    """The time of a step at these rates.

    speedup: of products of a `costs.narrow_type`.
    overlapped: an operation takes the longer of its products and its HBM traffic, else their sum.
    """
    rates = peak_flops, hbm_bandwidth, speedup
    timeline = _Timeline(module, collectives, rates, overlapped)
    timeline.run(module.entry, 1.0)
    return ScheduleTime(timeline.now, dict(timeline.exposed))


def queue_name(priced: PricedCollective) -> str:
    """The queue of a collective: of its mesh axes, or of the network between slices or nodes."""
    return NETWORK if priced.network else f"links, {priced.collective.axis}"


class _Timeline:
    """The clock of a device, and what runs behind its operations."""

    def __init__(
        self,
        module: hlo.Module,
        collectives: Sequence[PricedCollective],
        rates: tuple[float | None, float, Callable[[str], float]],
        overlapped: bool,
    ) -> None:
        self.now, self.exposed = 0.0, Counter[str]()
        self._rates, self._overlapped = rates, overlapped
        self._cache: dict[Instruction, tuple[float, float]] = {}
        # by the instruction or the fusion that starts it: (queue, seconds of one run)
        self._transfers: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for priced in collectives:
            one = (priced.seconds or 0.0) / priced.collective.times
            self._transfers[priced.collective.instruction].append((queue_name(priced), one))
        self._queues: dict[str, dict[Hashable, float]] = defaultdict(dict)
        self._sends = {
            i.attributes[_RENDEZVOUS]: i
            for i in module.instructions.values()
            if i.opcode == "send" and _RENDEZVOUS in i.attributes
        }

    def run(self, computation: Computation, share: float) -> None:
        """Run a computation; share: of its time that counts, for one of several branches."""
        for instruction in computation.instructions:
            opcode = instruction.opcode
            if opcode == "while":
                self._loop(instruction, share)
            elif opcode in ("conditional", "call"):
                for called in instruction.called:
                    self.run(called, share / len(instruction.called))
            elif opcode.endswith("-done"):
                self._wait(self._started_by(instruction))
            elif opcode.endswith("-start") or opcode in ("send", "recv"):
                self._start(instruction, share)
            elif opcode == "fusion":
                self._fusion(instruction, share)
            elif instruction.name in self._transfers:  # a collective that nothing runs beside
                self._start(instruction, share)
                self._wait(instruction)
            else:
                self._operation(instruction, share)

    def _loop(self, loop: Instruction, share: float) -> None:
        """Run a loop: two iterations, the second of which stands for the rest."""
        count = hlo.trip_count(loop)
        count = 1 if count is None else count
        for iteration in range(min(count, 2)):
            began, waited = self.now, self.exposed.copy()
            pending = {name: dict(queue) for name, queue in self._queues.items()}
            for called in loop.called:
                self.run(called, share)
            if iteration:
                more = count - 2
                self.now += more * (self.now - began)
                for name in self.exposed:
                    self.exposed[name] += more * (self.exposed[name] - waited[name])
                for name, before in pending.items():
                    self._serve(name, more * _served(before, self._queues[name]))

    def _start(self, instruction: Instruction, share: float) -> None:
        """Queue a collective with its traffic, or a copy."""
        parts = [instruction]
        if instruction.opcode == "async-start":
            parts = [i for called in instruction.called for i in called.instructions]
        for part in parts:
            for name, seconds in self._transfers.get(part.name, ()):
                self._queue(name, instruction, seconds * share)
        moved = sum(costs.hbm_traffic(part) for part in parts)
        self._queue(HBM, instruction, self._hbm_seconds(moved) * share)

    def _fusion(self, fusion: Instruction, share: float) -> None:
        """Run a fusion. One of libtpu's may start a collective, or wait for its end, that others
        between go on with while they multiply: a chain.
        """
        inside = fusion.called[0].instructions
        targets = {i.target for i in inside if i.target}
        chains = {i.attributes["chain_id"] for i in inside if "chain_id" in i.attributes}
        transfers = self._transfers.get(fusion.name, ())
        if chains and _COLLECTIVE_START in targets:
            for name, seconds in transfers:
                self._queue(name, min(chains), seconds * share)
            transfers = ()
        self._operation(fusion, share)
        for name, seconds in transfers:
            self._queue(name, fusion, seconds * share)
        self._wait(fusion)
        if _COLLECTIVE_DONE in targets:
            for chain in chains:
                self._wait(chain)

    def _operation(self, instruction: Instruction, share: float) -> None:
        computing, moving = self._seconds(instruction)
        both = max(computing, moving) if self._overlapped else computing + moving
        self._advance(both * share, moving * share)

    def _seconds(self, instruction: Instruction) -> tuple[float, float]:
        """(seconds of an operation's products, of its HBM traffic)."""
        if instruction not in self._cache:
            peak, _, speedup = self._rates
            products = sum(
                (costs.flops(i) or 0.0) / speedup(costs.narrow_type(i))
                for i in _with_inside(instruction)
            )
            moving = self._hbm_seconds(costs.hbm_traffic(instruction))
            self._cache[instruction] = (products / peak if peak else 0.0, moving)
        return self._cache[instruction]

    def _started_by(self, done: Instruction) -> Hashable:
        """The start that a done waits for; for a recv, the send of the other slices."""
        start = done
        while start.opcode.endswith(("-done", "-update")):
            start = start.operands[0]
        return self._sends.get(start.attributes.get(_RENDEZVOUS, ""), start)

    def _hbm_seconds(self, size: float) -> float:
        bandwidth = self._rates[1]
        return size / bandwidth if bandwidth else 0.0

    def _queue(self, name: str, key: Hashable, seconds: float) -> None:
        if seconds:
            queue = self._queues[name]
            queue[key] = queue.get(key, 0.0) + seconds

    def _wait(self, key: Hashable) -> None:
        """Advance until everything that `key` names is through, and what is queued before it."""
        left = {}
        for name, queue in self._queues.items():
            if key in queue:
                keys = list(queue)
                left[name] = sum(queue[k] for k in keys[: keys.index(key) + 1])
        if not left:
            return
        longest = max(left, key=lambda name: left[name])
        self.exposed[longest] += left[longest]
        self._advance(left[longest], 0.0)
        for name in left:
            self._queues[name].pop(key, None)

    def _advance(self, seconds: float, hbm_seconds: float) -> None:
        """Let time pass, in which an operation of its own keeps HBM busy for a part."""
        self.now += seconds
        for name in self._queues:
            self._serve(name, seconds - (hbm_seconds if name == HBM else 0.0))

    def _serve(self, name: str, seconds: float) -> None:
        queue = self._queues[name]
        for key in list(queue):
            if queue[key] > seconds:
                queue[key] -= max(0.0, seconds)
                return
            seconds -= queue.pop(key)


def _with_inside(instruction: Instruction) -> Iterator[Instruction]:
    """An instruction, and for a fusion those inside of it."""
    yield instruction
    if instruction.opcode == "fusion":
        for called in instruction.called:
            for inner in called.instructions:
                yield from _with_inside(inner)


def _served(before: Mapping[Hashable, float], after: Mapping[Hashable, float]) -> float:
    """Seconds of what was queued before that are no longer queued after."""
    return sum(max(0.0, seconds - after.get(key, 0.0)) for key, seconds in before.items())
