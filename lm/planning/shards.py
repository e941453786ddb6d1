"""Shards of abstract parameters: mesh axes and bytes of a device."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
from jax.sharding import NamedSharding

from lm.parallel.sharding import mesh_axes


def sharded_axes(leaf: jax.ShapeDtypeStruct) -> list[str]:
    """The mesh axes that shard any dimension of an array."""
    assert isinstance(leaf.sharding, NamedSharding)
    return [axis for entry in leaf.sharding.spec for axis in mesh_axes(entry)]


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def bytes_on_device(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    """The bytes of arrays in a device's own memory."""
    return sum(shard_bytes(x) for x in leaves if x.sharding.memory_kind != "pinned_host")
