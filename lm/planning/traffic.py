"""Collectives of a compiled program: their mesh axes, and the bytes that a device sends in a step.

A device sends, with S bytes of the whole array over n devices: S (n - 1) / n in an all-gather,
reduce-scatter or all-to-all, twice that in an all-reduce, and its S in a permutation: lower bounds
for any algorithm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.unknown_fields import UnknownFieldSet

from lm.planning import hlo

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_TRANSFER = "_xla_megascale_transfer_type"


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
        """Bytes that a device sends in a step."""
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
    that libtpu overlaps with products is in the fusions of its start, its end and each of those
    products, and counts in the first.

    The outermost axis of the mesh crosses its `slices`; a collective between those is a transfer of
    hosts, which libtpu (megascale) writes as a send.
    """
    found = []
    for visit in module.walk():
        instruction = visit.instruction
        kind = instruction.opcode.removesuffix("-start")
        between = kind == "send" and _TRANSFER in instruction.attributes
        if between:
            kind = instruction.attributes[_TRANSFER].lower().replace("_", "-")
        if kind not in KINDS or not visit.times or _is_continuation(visit):
            continue
        inputs = [
            sum(s.bytes for s in visit.computation.instructions[o].shapes)
            for o in instruction.operands
            if o in visit.computation.instructions
        ]
        if between:  # a host sends for its chips to their counterparts in the other slices
            group = tuple(range(0, math.prod(axis_sizes), math.prod(axis_sizes) // slices))
            payload = inputs[0] * (slices if kind == "all-gather" else 1)
        elif kind == "collective-permute":
            pairs = instruction.proto.source_target_pairs
            group = _longest_cycle({pair.source: pair.target for pair in pairs})
            payload = inputs[0]
        else:
            group = _first_group(instruction.proto, math.prod(axis_sizes))
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


def _is_continuation(visit: hlo.Visit) -> bool:
    """True if a collective of a chain has started in another fusion."""
    if "chain_id" not in visit.instruction.attributes:
        return False
    targets = [i.target for i in visit.computation.instructions.values()]
    return visit.outer is not None and "AsyncCollectiveStart" not in targets


def _keeps_a_slice(computation: hlo.Computation) -> bool:
    root = computation.root
    while root.opcode in ("bitcast", "copy", "convert", "reshape"):
        root = computation.operand(root)
    return root.opcode == "dynamic-slice"


def _pads(visit: hlo.Visit, module: hlo.Module) -> bool:
    """True if an all-reduce adds shards padded with zeros."""
    for name in visit.instruction.operands:
        operand = visit.computation.instructions.get(name)
        while operand is not None and operand.opcode in ("copy-done", "copy-start", "bitcast"):
            operand = visit.computation.operand(operand)
        if operand is not None and operand.opcode == "fusion":
            operand = module.computations[operand.called[0]].root
        if operand is None or operand.opcode != "dynamic-update-slice":
            return False
    return bool(visit.instruction.operands)


def _longest_cycle(following: dict[int, int]) -> tuple[int, ...]:
    """The devices that a permutation links to the source of its first pair."""
    at, seen = next(iter(following), None), []
    while at is not None and at not in seen:
        seen.append(at)
        at = following.get(at)
    return tuple(sorted(seen))


def _first_group(proto: Any, num_devices: int) -> tuple[int, ...]:
    """Positions of the first of an instruction's replica groups, in any of the forms that they
    have: lists, an iota that is reshaped and transposed, or axes of a mesh.
    """
    listed = proto.collective_device_list.replica_groups or proto.replica_groups
    if listed and listed[0].replica_ids:
        return tuple(listed[0].replica_ids)
    if proto.HasField("mesh_axes_replica_group_list"):
        return _mesh_group(proto.mesh_axes_replica_group_list)
    iota = proto.iota_collective_device_list
    if not iota.iota_reshape_dims:  # where they were before
        iota = proto.collective_device_list.iota_replica_group_list
    if iota.iota_reshape_dims:
        ids = _iota(iota.iota_reshape_dims, iota.iota_transpose_perm)
        return tuple(ids[: iota.num_devices_per_group].tolist())
    return tuple(range(num_devices))


def _iota(dims: Sequence[int], order: Sequence[int]) -> np.ndarray:
    """All numbers, as an array of these dimensions has them when it is transposed."""
    ids = np.arange(math.prod(dims)).reshape(tuple(dims))
    return (ids.transpose(tuple(order)) if order else ids).reshape(-1)


def _mesh_group(groups: Any) -> tuple[int, ...]:
    assert not len(UnknownFieldSet(groups.mesh)), "a MeshProto with other fields than those read"
    sizes = [axis.size for axis in groups.mesh.axes]
    order = groups.mesh.iota
    if groups.mesh.device_ids:
        ids = np.array(groups.mesh.device_ids)
    else:
        ids = _iota(order.reshape_dims or sizes, order.transpose_perm)
    ids = ids.reshape(sizes)
    index: list[slice | int] = [0] * len(sizes)
    for axis in groups.axes:
        size = sizes[axis.mesh_axis_index]
        step, count = 1, size
        if axis.HasField("sub_axis_info"):  # the digit of weight size / (before * count)
            count = axis.sub_axis_info.size
            step = size // (axis.sub_axis_info.pre_size * count)
        index[axis.mesh_axis_index] = slice(0, step * count, step)
    return tuple(ids[tuple(index)].reshape(-1).tolist())


def _axes(
    group: tuple[int, ...], names: Sequence[str], sizes: Sequence[int], kind: str
) -> tuple[tuple[str, ...], bool]:
    """(mesh axes along which a group's positions differ, True if the group spans them whole)."""
    coords = np.array(np.unravel_index(np.array(group), tuple(sizes)))  # [axes, group]
    differ = [i for i in range(len(names)) if len(set(coords[i].tolist())) > 1]
    whole = math.prod(sizes[i] for i in differ) == len(group) or kind == "collective-permute"
    return tuple(names[i] for i in differ), whole
