"""Meshes, sharding rules from logical axes to mesh axes, and global batches from host rows.

Devices enter here once and travel as `Rules`, a frozen object that modules hold as a field: it
needs no context manager, and it is part of jit's cache key. Collectives are left to the compiler
(GSPMD, arXiv:2105.04663).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config.schema import Config, MeshConfig
from lm.types import Batch, Device, HostBatch, Params, PyTree, Tree

Out = TypeVar("Out")
Specs: TypeAlias = PyTree  # of PartitionSpec
MeshAxes: TypeAlias = str | tuple[str, ...] | None

AXES = ("data", "fsdp", "expert", "tensor", "sequence", "stage")

# FSDP shards parameters on `embed`; tensor parallelism shards heads, MLP width and vocabulary, and
# between those the length of the residual stream (sequence parallelism of arXiv:2205.05198).
DEFAULT_TABLE: Mapping[str, MeshAxes] = {
    "batch": ("data", "fsdp", "expert"),
    # outside of the pipeline: the embedding and the loss are sharded over stages too
    "act_batch": ("data", "fsdp", "expert", "stage"),
    "length": "sequence",
    "act_length": ("sequence", "tensor"),
    "act_embed": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "gates": None,  # parts of one projection that gate each other
    "taps": None,  # of a convolution
    "channels": None,  # of pixels, and numbers of a code
    "vocab": "tensor",
    "expert": "expert",
    "rank": None,  # of adapters
    "layers": "stage",
}


def mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of an entry of the table or of a partition spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def make_mesh(config: MeshConfig, devices: Sequence[Device]) -> Mesh:
    """A mesh with all of `AXES` over `devices`; one axis may be -1: the devices that others leave.

    With several slices, the outer part of `data` crosses them; every other axis stays inside one.

    Raises:
        ValueError: the product of the axes is not the number of devices, or the config's slices
            are not those of the devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    described = " * ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "1"
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"config.mesh: sizes are positive and at most one is -1, got {described}")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"config.mesh ({described}) must use all devices ({len(devices)})")
    slices = _slices(config, devices)
    if sizes["data"] % len(slices):
        raise ValueError(
            f"config.mesh.data ({sizes['data']}) must be divisible by config.mesh.slices "
            f"({len(slices)}): no other axis crosses the network between slices"
        )
    sizes["data"] //= len(slices)
    grids = [
        mesh_utils.create_device_mesh(tuple(sizes.values()), slice_, allow_split_physical_axes=True)
        for slice_ in slices
    ]
    # Auto: linen's constraints and Explicit axis types (the default of make_mesh) don't mix.
    return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(config: MeshConfig, devices: Sequence[Device]) -> list[list[Device]]:
    """The devices of each slice; those without a slice index (GPU, CPU) in equal parts."""
    groups: dict[int, list[Device]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    n = config.slices
    if n < 1 or (len(groups) > 1 and len(groups) != n) or len(devices) % n:
        raise ValueError(
            f"config.mesh.slices ({n}) must be the slices of the devices ({len(groups)}), or "
            f"divide devices that have none ({len(devices)})"
        )
    if len(groups) == n:
        return list(groups.values())
    size = len(devices) // n
    return [list(devices[i : i + size]) for i in range(0, len(devices), size)]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis. Unknown axes and indivisible dimensions raise ValueError."""

    mesh: Mesh  # an AbstractMesh where nothing is computed
    table: tuple[tuple[str, MeshAxes], ...]
    # devices add up the gradients of matrices in float32, not in the type of the computation
    float32_gradients: bool = False

    @functools.cached_property
    def platform(self) -> str:
        """The platform of the mesh's devices, which need not be the default backend: cpu, gpu or
        tpu. An abstract mesh, without devices, counts as cpu.
        """
        if isinstance(self.mesh, AbstractMesh):
            return "cpu"
        platform = self.mesh.devices.flat[0].platform
        return "gpu" if platform in ("cuda", "rocm") else platform

    def axes(self, logical: str) -> tuple[str, ...]:
        """The mesh axes of one logical axis."""
        table = dict(self.table)
        if logical not in table:
            raise ValueError(f"{logical!r} is not a logical axis; known: {', '.join(table)}")
        return mesh_axes(table[logical])

    def sharded_axes(self, *logical: str) -> tuple[str, ...]:
        """The mesh axes of logical axes that have more than one device."""
        return tuple(a for name in logical for a in self.axes(name) if self.mesh.shape[a] > 1)

    def size(self, logical: str) -> int:
        """Number of shards of a logical axis."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(logical))

    def spec(self, *logical: str | None) -> PartitionSpec:
        """The partition spec of an array with these logical axes (None: replicated)."""
        entries, used = [], set()
        for name in logical:
            axes = () if name is None else self.sharded_axes(name)
            if used & set(axes):
                raise ValueError(f"config.mesh.rules shard two dimensions of {logical} over {axes}")
            used |= set(axes)
            entries.append(axes[0] if len(axes) == 1 else axes or None)
        return PartitionSpec(*entries)

    def sharding(self, *logical: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*logical))

    def constrain(self, x: jax.Array, *logical: str | None) -> jax.Array:
        """`x` with a constraint on its sharding, that of its logical axes."""
        if x.ndim != len(logical):
            raise ValueError(
                f"{len(logical)} logical axes {logical} for an array of shape {x.shape}"
            )
        sharding = self.sharding(*logical)  # checks the names on any mesh
        if self.mesh.size == 1:
            return x
        context = jax.sharding.get_abstract_mesh()
        if context.manual_axes:  # inside shard_map: only the other axes can be constrained
            entries = [
                tuple(axis for axis in mesh_axes(entry) if axis not in context.manual_axes)
                for entry in sharding.spec
            ]
            sharding = NamedSharding(context, PartitionSpec(*(entry or None for entry in entries)))
        return jax.lax.with_sharding_constraint(x, sharding)

    def shard_map(
        self, f: Callable[..., Out], *, in_specs: Specs, out_specs: Specs
    ) -> Callable[..., Out]:
        """`f` of the shards that each device holds, where the compiler's collectives are not good
        enough. Inside another `shard_map` it covers the mesh axes that this one has left.
        """
        context = jax.sharding.get_abstract_mesh()
        taken = set(context.manual_axes)
        return jax.shard_map(
            f,
            mesh=context if taken else self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.mesh.axis_names) - taken,
            check_vma=False,  # kernels don't declare over which axes their results vary
        )

    def collect(self, x: jax.Array, *logical: str | None) -> jax.Array:
        """`x` with its `embed` dimension all-gathered, one mesh axis after the other.

        Only where a config shards `embed` over several: the TPU compiler gathers over an axis of
        32 chips, but adds zeros (twice the bytes) over 64 at once.
        """
        rest = self.sharded_axes("embed")
        if len(rest) < 2:
            return x
        while rest:
            rest = rest[1:]
            table = {**dict(self.table), "embed": rest}
            x = dataclasses.replace(self, table=tuple(table.items())).constrain(x, *logical)
        return x

    def check(self, path: str, shape: Sequence[int], logical: Sequence[str | None]) -> None:
        """Raises ValueError unless all sharded dimensions of the array at `path` divide evenly."""
        for dimension, name in zip(shape, logical, strict=True):
            if name is not None and dimension % self.size(name):
                axes = "*".join(self.axes(name))
                raise ValueError(
                    f"{path}: {name} ({dimension}) must be divisible by mesh {axes} "
                    f"({self.size(name)}); change the size, or replicate it with "
                    f"config.mesh.rules=(('{name}', None),)"
                )

    def shardings(self, boxed: Params) -> Params:
        """Shardings of a tree of boxes of `nn.with_partitioning`; other leaves are replicated."""

        def one(path: jax.tree_util.KeyPath, leaf: object) -> NamedSharding:
            if not isinstance(leaf, nn.Partitioned):
                return NamedSharding(self.mesh, PartitionSpec())
            self.check(jax.tree_util.keystr(path), leaf.value.shape, leaf.names)
            return self.sharding(*leaf.names)

        return jax.tree_util.tree_map_with_path(
            one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
        )


def on_device(tree: Tree) -> Tree:
    """Copies in device memory of arrays in any memory; for use inside jit."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def make_rules(config: MeshConfig, devices: Sequence[Device]) -> Rules:
    """The default table with the rows of `config.mesh.rules` replaced, on a mesh of `devices`."""
    table = dict(DEFAULT_TABLE)
    for row in config.rules:
        if len(row) != 2 or row[0] not in table:
            raise ValueError(f"config.mesh.rules: {row!r} replaces no row of {', '.join(table)}")
        if unknown := set(mesh_axes(row[1])) - set(AXES):
            raise ValueError(f"config.mesh.rules: {sorted(unknown)} are no mesh axes of {AXES}")
        table[row[0]] = row[1]
    return Rules(make_mesh(config, devices), tuple(table.items()))


def replicate_params(config: MeshConfig, rules: Rules) -> Rules:
    """Rules of parameters: those of their optimizer state, in ZeRO-1 (arXiv:1910.02054) without
    fsdp.
    """
    if config.zero == 3:
        return rules
    names = ("batch", "length", "act_length", "act_embed")  # of activations
    kept = {
        name: rules.axes(name) if name in names else tuple(set(rules.axes(name)) - {"fsdp"})
        for name, _ in rules.table
    }
    return dataclasses.replace(rules, table=tuple(kept.items()))


def batch_size(config: Config, rules: Rules, parts: int) -> int:
    """Rows of a global batch; ValueError where devices and micro-batches, of which a pipeline has
    `parts`, don't divide it.
    """
    d, k = config.data, config.train.num_microbatches
    if (d.batch_size is None) == (d.batch_size_per_device is None):
        raise ValueError(
            f"set one of config.data.batch_size ({d.batch_size}) and "
            f"config.data.batch_size_per_device ({d.batch_size_per_device})"
        )
    size = d.batch_size
    if size is None:
        size = (d.batch_size_per_device or 0) * rules.mesh.size
    if config.log.noise_scale and k < 2:
        raise ValueError(
            f"config.log.noise_scale compares micro-batches: config.train.num_microbatches ({k}) "
            "must be at least 2"
        )
    shards, axes = rules.size("batch"), "*".join(rules.axes("batch"))
    if size % (shards * k * parts):
        raise ValueError(
            f"config.data.batch_size ({size}) must be divisible by mesh {axes} ({shards}) * "
            f"config.train.num_microbatches ({k})"
            + (f" * config.model.pipeline.num_microbatches ({parts})" if parts > 1 else "")
        )
    shards, axes = rules.size("act_length"), "*".join(rules.axes("act_length"))
    for name, length in (("length", d.length), ("encoder_length", d.encoder_length or 0)):
        if length % shards or length % rules.size("length"):
            raise ValueError(
                f"config.data.{name} ({length}) must be divisible by mesh {axes} ({shards}), "
                "over which the residual stream is sharded"
            )
    return size


def local_rows(rules: Rules, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, ascending: int64 [rows]."""
    indices = rules.sharding("batch").addressable_devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[index] for index in indices.values() if index is not None]
    return np.unique(np.concatenate(rows))


def row_axes(ndim: int) -> tuple[str | None, ...]:
    """Return the logical axes of an array of a batch: [B], [B, T] or [B, height, width, 3]."""
    return ("batch", "length")[:ndim] if ndim <= 2 else ("batch",) + (None,) * (ndim - 1)


def make_global_batch(rules: Rules, batch: HostBatch, batch_size: int) -> Batch:
    """Global arrays [B, ...] from this process's rows, those of `local_rows`, of all arrays."""
    rows = local_rows(rules, batch_size)

    def one(x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "called for this process's devices only"
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return x[first : first + stop - start][(slice(None), *index[1:])]

        shape = (batch_size, *x.shape[1:])
        return jax.make_array_from_callback(shape, rules.sharding(*row_axes(x.ndim)), shard)

    return jax.tree.map(one, batch)
