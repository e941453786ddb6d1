"""Every collective of a compiled program: its mesh axes, and the bytes that a device sends in a
step.

A device sends, with S bytes of the whole array over n devices: S (n - 1) / n in an all-gather,
reduce-scatter or all-to-all, twice that in an all-reduce, and its S in a permutation. A step waits
for no less, whatever algorithm moves them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from lm.aot import hlo

KINDS = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction and what it sends over a whole step."""

    kind: str
    axes: tuple[str, ...]  # mesh axes that its groups span
    whole: bool  # the groups are all of those axes, not a part of them
    group: tuple[int, ...]  # positions in the mesh of one group
    payload: int  # bytes of the whole array, S above
    times: float  # in a step
    op: str
    source: str
    shape: str
    unsliced: bool = False  # an all-gather that the compiler wrote as an all-reduce of zeros

    @property
    def size(self) -> int:
        return len(self.group)

    @property
    def bytes(self) -> float:
        """That a device sends in a step."""
        share = (self.size - 1) / self.size
        factor = {
            "all-reduce": 2 * share,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(self.kind, share)
        return self.times * self.payload * factor

    @property
    def axis(self) -> str:
        """The mesh axes as one name: "fsdp", "data+fsdp", "part of tensor"."""
        name = "+".join(self.axes)
        return name if self.whole else f"part of {name}"


def collectives(
    module: hlo.Module, axis_names: Sequence[str], axis_sizes: Sequence[int], *, slices: int = 1
) -> list[Collective]:
    """The collectives that a step runs, over a mesh of these axes; starts without their dones. One
    that libtpu spreads over products stands in the fusions of its start, its end and of each of
    those products, and counts in the first.

    The outermost axis of the mesh crosses its `slices`; what goes between those is a transfer of
    hosts, which libtpu (megascale) writes as a send.
    """
    found = []
    for visit in module.walk():
        instruction = visit.instruction
        kind = instruction.opcode.removesuffix("-start")
        between = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        if kind == "send" and between:
            kind = between[1].lower().replace("_", "-")
        else:
            between = None
        if kind not in KINDS or not visit.times or _goes_on(visit):
            continue
        inputs = [
            sum(s.bytes for s in visit.computation.instructions[o].shapes)
            for o in instruction.operands
            if o in visit.computation.instructions
        ]
        if between:  # a host sends for its chips to the same place in every other slice
            group = tuple(range(0, math.prod(axis_sizes), math.prod(axis_sizes) // slices))
            payload = inputs[0] * (slices if kind == "all-gather" else 1)
        elif kind == "collective-permute":
            group = _longest_cycle(_pairs(instruction.attributes))
            payload = inputs[0]
        else:
            group = _first_group(instruction.attributes, math.prod(axis_sizes))
            payload = sum(inputs) * (len(group) if kind == "all-gather" else 1)
        if len(group) < 2:
            continue
        if kind == "all-reduce" and visit.outer and _keeps_a_slice(visit.computation):
            kind = "reduce-scatter"  # how the TPU compiler writes it
        axes, whole = _axes(group, axis_names, axis_sizes, kind)
        found.append(
            Collective(
                kind,
                axes,
                whole,
                group,
                payload,
                visit.times,
                visit.op_name,
                module.source(visit.frame, "/lm/"),
                ", ".join(str(s) for s in instruction.shapes[:2]),
                kind == "all-reduce" and _pads(visit, module),
            )
        )
    return found


def _goes_on(visit: hlo.Visit) -> bool:
    """True if a collective of a chain has started in another fusion."""
    if not re.search(r"\bchain_id=", visit.instruction.attributes):
        return False
    targets = [i.target for i in visit.computation.instructions.values()]
    return visit.outer is not None and "AsyncCollectiveStart" not in targets


def _keeps_a_slice(computation: hlo.Computation) -> bool:
    root = computation.root
    while root.opcode in ("bitcast", "copy", "convert", "reshape"):
        root = computation.operand(root)
    return root.opcode == "dynamic-slice"


def _pads(visit: hlo.Visit, module: hlo.Module) -> bool:
    """Whether an all-reduce adds shards that were put among zeros."""
    for name in visit.instruction.operands:
        operand = visit.computation.instructions.get(name)
        while operand is not None and operand.opcode in ("copy-done", "copy-start", "bitcast"):
            operand = visit.computation.operand(operand)
        if operand is not None and operand.opcode == "fusion":
            operand = module.computations[operand.called("calls")].root
        if operand is None or operand.opcode != "dynamic-update-slice":
            return False
    return bool(visit.instruction.operands)


def _pairs(attributes: str) -> list[tuple[int, int]]:
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else []
    return [(int(a), int(b)) for a, b in pairs]


def _longest_cycle(pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    """The devices that a permutation links to the source of its first pair."""
    following = dict(pairs)
    at, seen = next(iter(following), None), []
    while at is not None and at not in seen:
        seen.append(at)
        at = following.get(at)
    return tuple(sorted(seen))


@functools.lru_cache(maxsize=4096)
def _first_group(attributes: str, num_devices: int) -> tuple[int, ...]:
    """Positions of the first of the replica groups, in any of the forms in which XLA writes them:

    {{0,1},{2,3}}    [2,4]<=[8]    [4,2]<=[2,4]T(1,0)    mesh['a'=2,'b'=4] {'b'}
    mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(int(n) for n in listed[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, dims = _numbers(iota[1]), _numbers(iota[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose(_numbers(iota[3]))
        return tuple(int(i) for i in ids.reshape(shape)[0])
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    )
    if mesh:
        return _mesh_group(mesh[1], mesh[2] or "", mesh[3])
    return tuple(range(num_devices))


def _mesh_group(sizes_text: str, order: str, axes_text: str) -> tuple[int, ...]:
    sizes = {name: int(n) for name, n in re.findall(r"'?([\w.]+)'?=(\d+)", sizes_text)}
    ids = np.arange(math.prod(sizes.values()))
    listed = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if listed and math.prod(_numbers(listed[1])) == len(ids):
        ids = ids.reshape(_numbers(listed[1]))
        ids = ids.transpose(_numbers(listed[2])) if listed[2] else ids
    elif listed:
        ids = np.array(_numbers(listed[1]))
    grid = ids.reshape(tuple(sizes.values()))
    index: list[slice | int] = [0] * len(sizes)
    names = list(sizes)
    for name, before, part in re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", axes_text):
        axis = names.index(name)
        if part:  # a part of an axis: of `size`, the digit of weight size / (before * part)
            step = sizes[name] // (int(before) * int(part))
            index[axis] = slice(0, step * int(part), step)
        else:
            index[axis] = slice(None)
    return tuple(int(i) for i in np.asarray(grid[tuple(index)]).reshape(-1))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _axes(
    group: tuple[int, ...], names: Sequence[str], sizes: Sequence[int], kind: str
) -> tuple[tuple[str, ...], bool]:
    """(mesh axes along which a group's positions differ, whether it is all of them)."""
    places = np.array(np.unravel_index(np.array(group), tuple(sizes)))  # [axes, group]
    differ = [i for i in range(len(names)) if len(set(places[i].tolist())) > 1]
    whole = math.prod(sizes[i] for i in differ) == len(group) or kind == "collective-permute"
    return tuple(names[i] for i in differ), whole


def by_kind_and_axis(found: Sequence[Collective]) -> dict[tuple[str, str], float]:
    """Bytes that a device sends in a step, by (kind, axis)."""
    totals: dict[tuple[str, str], float] = {}
    for c in found:
        totals[c.kind, c.axis] = totals.get((c.kind, c.axis), 0.0) + c.bytes
    return totals
