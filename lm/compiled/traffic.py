"""Collectives of a compiled program: their mesh axes, and the bytes that a device sends in a step.

A device sends, with S bytes of the whole array over n devices: S (n - 1) / n in an all-gather,
reduce-scatter or all-to-all, twice that in an all-reduce, and its S in a permutation: lower bounds
for any algorithm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from google.protobuf.unknown_fields import UnknownFieldSet

from lm.compiled import hlo
from lm.compiled.protos import Proto

# The share of S (n - 1) / n that a device sends; None: S itself.
KINDS = {
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-reduce": 2,
    "all-to-all": 1,
    "ragged-all-to-all": 1,
    "collective-permute": None,
    "collective-broadcast": None,
}
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
    source: str
    shape: str
    instruction: str = ""  # or the fusion that it is inside of
    pairs: tuple[tuple[int, int], ...] = ()  # (source, target) of a permutation
    unsliced: bool = False  # an all-gather that the compiler wrote as an all-reduce of zeros

    @property
    def size(self) -> int:
        return len(self.group)

    @property
    def bytes(self) -> float:
        """Bytes that a device sends in a step."""
        factor = KINDS[self.kind]
        share = 1.0 if factor is None else factor * ((self.size - 1) / self.size)
        return self.times * self.payload * share

    @property
    def axis(self) -> str:
        """The mesh axes as one name: "fsdp", "data+fsdp", "part of tensor"."""
        name = "+".join(self.axes)
        return name if self.whole else f"part of {name}"


def collectives(
    module: hlo.Module, mesh: Mapping[str, int], *, slices: int = 1
) -> list[Collective]:
    """The collectives that a step runs, over a mesh {axis: size}; starts without their dones. One
    that libtpu overlaps with products is in the fusions of its start, its end and each of those
    products, and counts in the first.

    The outermost axis of the mesh crosses its `slices`; a collective between those is a transfer of
    hosts, which libtpu (megascale) writes as a send.
    """
    num_devices, found = math.prod(mesh.values()), []
    for visit in hlo.walk(module.entry):
        instruction = visit.instruction
        kind = instruction.opcode.removesuffix("-start")
        between = kind == "send" and _TRANSFER in instruction.attributes
        if between:
            kind = instruction.attributes[_TRANSFER].lower().replace("_", "-")
        if kind not in KINDS or not visit.times or _is_continuation(visit):
            continue
        inputs = [operand.bytes for operand in instruction.operands]
        pairs = ()
        if between:  # a host sends for its chips to their counterparts in the other slices
            group = tuple(range(0, num_devices, num_devices // slices))
            payload = inputs[0] * (slices if kind == "all-gather" else 1)
        elif kind == "collective-permute":
            pairs = tuple((p.source, p.target) for p in instruction.proto.source_target_pairs)
            group = _longest_cycle(dict(pairs))
            payload = inputs[0]
        else:
            group = _first_group(instruction.proto, num_devices)
            payload = sum(inputs) * (len(group) if kind == "all-gather" else 1)
        if len(group) < 2:
            continue
        if kind == "all-reduce" and visit.outer and _keeps_a_slice(instruction.computation):
            kind = "reduce-scatter"  # how the TPU compiler writes it
        axes, whole = _axes(group, mesh)
        whole = whole or kind == "collective-permute"
        source = module.source(visit.frame)
        shape = ", ".join(str(s) for s in instruction.shapes[:2])
        sum_of_zeros = kind == "all-reduce" and all(map(_is_padded, instruction.operands))
        named = source, shape, (visit.outer or instruction).name
        sent = payload, visit.times
        found.append(Collective(kind, axes, whole, group, *sent, *named, pairs, sum_of_zeros))
    return found


def _is_continuation(visit: hlo.Visit) -> bool:
    """True if a collective of a chain has started in another fusion."""
    if visit.outer is None or "chain_id" not in visit.instruction.attributes:
        return False
    targets = [i.target for i in visit.instruction.computation.instructions]
    return "AsyncCollectiveStart" not in targets


def _keeps_a_slice(computation: hlo.Computation) -> bool:
    root = computation.root
    while root.opcode in ("bitcast", "copy", "convert", "reshape"):
        root = root.operands[0]
    return root.opcode == "dynamic-slice"


def _is_padded(operand: hlo.Instruction) -> bool:
    """True for a shard padded with zeros."""
    while operand.opcode in ("copy-done", "copy-start", "bitcast"):
        operand = operand.operands[0]
    if operand.opcode == "fusion":
        operand = operand.called[0].root
    return operand.opcode == "dynamic-update-slice"


def _longest_cycle(following: dict[int, int]) -> tuple[int, ...]:
    """The devices that a permutation links to the source of its first pair."""
    at, seen = next(iter(following), None), []
    while at is not None and at not in seen:
        seen.append(at)
        at = following.get(at)
    return tuple(sorted(seen))


def _first_group(proto: Proto, num_devices: int) -> tuple[int, ...]:
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


def _mesh_group(groups: Proto) -> tuple[int, ...]:
    assert not len(UnknownFieldSet(groups.mesh)), "a MeshProto with other fields than those read"
    sizes = [axis.size for axis in groups.mesh.axes]
    order = groups.mesh.iota
    ids = groups.mesh.device_ids or _iota(order.reshape_dims or sizes, order.transpose_perm)
    index: list[slice | int] = [0] * len(sizes)
    for axis in groups.axes:
        size = sizes[axis.mesh_axis_index]
        step, count = 1, size
        if axis.HasField("sub_axis_info"):  # the digit of weight size / (before * count)
            count = axis.sub_axis_info.size
            step = size // (axis.sub_axis_info.pre_size * count)
        index[axis.mesh_axis_index] = slice(0, step * count, step)
    return tuple(np.reshape(ids, sizes)[tuple(index)].reshape(-1).tolist())


def _axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    """(mesh axes along which a group's positions differ, True if the group spans them whole)."""
    coords = np.unravel_index(np.array(group), tuple(mesh.values()))
    axes = tuple(axis for axis, at in zip(mesh, coords, strict=True) if np.ptp(at))
    return axes, math.prod(mesh[axis] for axis in axes) == len(group)
