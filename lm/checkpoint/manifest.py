"""What a checkpoint says about itself: checksums of all its bits, and where it comes from.

The checksum of an array is a pair of sums over its elements, each element mixed with its position
in the whole array. Integer sums don't depend on their order, so the pair doesn't depend on the
mesh, the shards or who adds them up; a device and a host get the same one. One changed element
always changes both sums. Elements that changed places leave both as they were with a probability
of 2^-64.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FORMAT = 1
U = np.uint32
FACTORS = (U(0x85EBCA6B), U(0xC2B2AE35))
SEEDS = (U(0x9E3779B9), U(0x7F4A7C15))  # of the two sums: 64 bits of the golden ratio
COLUMNS = (U(0x85EBCA77), U(0xC2B2AE3D))  # odd, so that columns below 2^32 stay apart
BLOCK = 1 << 15  # elements that a host mixes at a time, so that they stay in its cache
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Damaged(ValueError):
    """A file of a checkpoint doesn't hold what was written."""


# ---- checksums ----


def _fmix(h: Any) -> Any:
    """A bijection of 32 bits where each input bit moves half of the output (MurmurHash3's
    finalizer).
    """
    h = (h ^ (h >> U(16))) * FACTORS[0]
    h = (h ^ (h >> U(13))) * FACTORS[1]
    return h ^ (h >> U(16))


def _check_dtype(dtype: Any, what: str) -> None:
    if jnp.issubdtype(dtype, jax.dtypes.extended) or np.dtype(dtype).itemsize not in WORDS:
        raise ValueError(f"{what}: no checksum for {dtype}; store it as elements of 1, 2 or 4 byte")


def _checksum(x: jax.Array) -> jax.Array:
    _check_dtype(x.dtype, "checksums")
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        word = WORDS[np.dtype(x.dtype).itemsize]
        bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    bits = bits.reshape(bits.shape or (1,))
    *leading, columns = bits.shape
    # Rows and columns are numbered apart: one number for both overflows 32 bits in a large array.
    row = jnp.zeros((*leading, 1), jnp.uint32)
    for dim in range(len(leading)):
        stride = U(math.prod(leading[dim + 1 :]) % 2**32)
        row += jax.lax.broadcasted_iota(jnp.uint32, row.shape, dim) * stride
    column = jax.lax.iota(jnp.uint32, columns)
    mixed = [
        _fmix(bits + (_fmix(row + seed) ^ (column * odd)))
        for seed, odd in zip(SEEDS, COLUMNS, strict=True)
    ]
    # One reduction of both: XLA's CPU compiler makes a vectorized pass of it, six times as fast as
    # two plain sums.
    sums = jax.lax.reduce(
        mixed,
        [U(0), U(0)],
        lambda a, b: [a[0] + b[0], a[1] + b[1]],
        dimensions=tuple(range(bits.ndim)),
    )
    return jnp.stack(sums)


def checksums(tree: Any) -> Any:
    """The checksum of every leaf, a tree of uint32 [2]; for use inside jit, on arrays in any
    sharding.

    Raises:
        ValueError: a leaf's elements don't have 1, 2 or 4 byte.
    """
    return jax.tree.map(_checksum, tree)


def host_checksums(
    block: np.ndarray, start: Sequence[int] = (), shape: Sequence[int] | None = None
) -> np.ndarray:
    """What `block` adds to the checksum of its array, uint32 [2]; of the whole array without the
    other arguments.

    start: the block's first index in an array of `shape`. The sums of blocks that cover an array
    add up (as uint32) to what `checksums` gives for it.
    """
    _check_dtype(block.dtype, "host_checksums")
    shape = tuple(shape or block.shape) or (1,)
    start = tuple(start) or (0,) * len(shape)
    block = np.ascontiguousarray(block).reshape(block.shape or (1,))
    sums = np.zeros(2, U)
    if not block.size:
        return sums
    bits = block.view(WORDS[block.dtype.itemsize]).reshape(-1, block.shape[-1])

    row = np.zeros(block.shape[:-1], U)
    for dim in range(len(shape) - 1):
        stride = math.prod(shape[dim + 1 : -1])
        at = (np.arange(block.shape[dim], dtype=np.uint64) + start[dim]) * stride % 2**32
        row += at.astype(U).reshape((-1,) + (1,) * (len(shape) - 2 - dim))
    row = row.reshape(-1, 1)
    column = np.arange(block.shape[-1], dtype=U) + U(start[-1])

    wide = min(BLOCK, bits.shape[1])
    high = BLOCK // wide
    for i, (seed, odd) in enumerate(zip(SEEDS, COLUMNS, strict=True)):
        rows, columns = _fmix(row + seed), column * odd
        for r in range(0, bits.shape[0], high):
            for c in range(0, bits.shape[1], wide):
                h = rows[r : r + high] ^ columns[c : c + wide]
                h += bits[r : r + high, c : c + wide]
                sums[i : i + 1] += _fmix_in_place(h).sum(dtype=U)  # an array wraps silently
    return sums


def _fmix_in_place(h: np.ndarray) -> np.ndarray:
    """`_fmix` without fresh memory for each of its steps, which would cost more than they do."""
    spare = np.empty_like(h)
    for shift, factor in ((16, FACTORS[0]), (13, FACTORS[1]), (16, None)):
        np.right_shift(h, U(shift), out=spare)
        h ^= spare
        if factor is not None:
            h *= factor
    return h


def replica_mismatches(tree: Any, shardings: Any) -> Any:
    """Whether devices that should hold the same values of a leaf don't, a tree of bool []; for use
    inside jit.

    Every device takes the checksum of what it holds itself, and compares it with those of its
    replicas: the devices along the mesh axes that don't shard the leaf.

    shardings: the NamedSharding of every leaf, all on one mesh.
    """
    leaves, structure = jax.tree.flatten(tree)
    named = structure.flatten_up_to(shardings)
    mesh = named[0].mesh
    used = [{a for entry in s.spec for a in _axes(entry)} for s in named]
    free = [tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in u) for u in used]

    def compare(*local: jax.Array) -> tuple[jax.Array, ...]:
        found = [jnp.bool_(False)] * len(local)
        for axes in sorted({axes for axes in free if axes}):  # in one order in all processes
            here = [i for i in range(len(local)) if free[i] == axes]
            mine = jnp.stack([_checksum(local[i]) for i in here])
            # Odd weights make one wrong replica visible. They differ by device: a compiler that
            # takes the operand for replicated would drop a plain maximum, and all would be well.
            size = math.prod(mesh.shape[a] for a in axes)
            weights = 2 * np.arange(size, dtype=U) + U(1)
            weight = jnp.asarray(weights)[jax.lax.axis_index(axes)]
            total = jax.lax.psum(mine * weight, axes)
            differs = jnp.any(total != mine * weights.sum(dtype=U), axis=1)
            anywhere = jax.lax.psum(differs.astype(jnp.int32), mesh.axis_names) > 0
            for i, flag in zip(here, anywhere, strict=True):
                found[i] = flag
        return tuple(found)

    replicated = jax.sharding.PartitionSpec()
    flags = jax.shard_map(
        compare,
        mesh=mesh,
        in_specs=tuple(s.spec for s in named),
        out_specs=(replicated,) * len(leaves),
        check_vma=False,
    )(*leaves)
    return structure.unflatten(flags)


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


# ---- the manifest ----


@dataclasses.dataclass(frozen=True)
class Leaf:
    shape: tuple[int, ...]
    dtype: str
    checksum: str = ""  # 16 hex digits; empty for a leaf that is only wanted

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def hexadecimal(sums: np.ndarray) -> str:
    return "".join(f"{int(s):08x}" for s in sums)


def leaves(tree: Any, sums: np.ndarray | None = None) -> dict[str, Leaf]:
    """What describes each leaf of a tree, by its path: "params.layers.mlp.up.weight".

    sums: the checksums of the leaves in the tree's order, uint32 [leaves, 2].
    """
    found = {}
    for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        checksum = "" if sums is None else hexadecimal(sums[i])
        found[name] = Leaf(tuple(x.shape), str(np.dtype(x.dtype)), checksum)
    return found


def differences(stored: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> list[str]:
    """One line for each leaf that only one side has, or that has another shape or dtype there."""
    lines = [f"only in the checkpoint: {n}, {stored[n]}" for n in stored if n not in wanted]
    lines += [f"only in this run: {n}, {wanted[n]}" for n in wanted if n not in stored]
    lines += [
        f"differs: {n}, {stored[n]} in the checkpoint, {wanted[n]} in this run"
        for n in stored
        if n in wanted and str(stored[n]) != str(wanted[n])
    ]
    return lines


def fingerprint(described: Mapping[str, Leaf]) -> str:
    """A hash of the names, shapes and bits of leaves."""
    return _digest({name: dataclasses.asdict(leaf) for name, leaf in described.items()})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is stored beside the arrays of a checkpoint."""

    step: int
    leaves: dict[str, Leaf]
    ledger: dict[str, Any] = dataclasses.field(default_factory=dict)  # totals of the data consumed
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: dict[str, Any] = dataclasses.field(default_factory=dict)  # see code_version
    resolved: dict[str, int] = dataclasses.field(default_factory=dict)  # see training/resume.py
    parent: dict[str, Any] | None = (
        None  # what this run began from, as `ParentCheckpoint.describe` says
    )
    time: float = 0.0  # seconds since 1970
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with a hash over them, so that a change in any is found."""
        tree = dataclasses.asdict(self)
        return {**tree, "sha256": _digest(tree)}

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """The manifest that `to_dict` was written for.

        Raises:
            Damaged: the text is not what was written.
            ValueError: it was written by newer code.
        """
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise Damaged(f"the manifest is no JSON: {error}") from None
        if not isinstance(tree, dict) or tree.pop("sha256", None) != _digest(tree):
            raise Damaged("the manifest's hash is not that of its content")
        if tree["format"] != FORMAT:
            raise ValueError(
                f"the manifest has format {tree['format']}, this code reads {FORMAT}: use the "
                f"code that wrote it ({tree.get('code')})"
            )
        described = {
            name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["checksum"])
            for name, leaf in tree.pop("leaves").items()
        }
        return cls(leaves=described, **tree)


def _digest(tree: Any) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the code ----


@functools.cache
def code_version() -> dict[str, Any]:
    """Which code this is: a hash of lm's files, git's commit where there is one, and versions."""
    package = pathlib.Path(__file__).parents[1]
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(f"{path.relative_to(package).as_posix()}\0".encode())
        source.update(hashlib.sha256(path.read_bytes()).digest())
    # an installed package may lie inside of a repository that isn't its own
    ours = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    changed = _git(package, "status", "--porcelain", "--untracked-files=no") if ours else None
    return {
        "source": source.hexdigest(),
        "commit": _git(package, "rev-parse", "HEAD") if ours else None,
        "dirty": None if changed is None else bool(changed),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _git(folder: pathlib.Path, *arguments: str) -> str | None:
    """What git prints, or None where git, the repository or the answer is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
