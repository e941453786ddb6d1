"""Small arrays of one step in a single array, so that the host fetches one and not a dozen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

_BITS = np.dtype(np.uint32)


@flax.struct.dataclass
class Scalars(Mapping[str, Any]):
    """A mapping of names to small arrays, jax or numpy ones as `bits` is.

    bits: uint32 [n]. layout: (name, dtype, shape) of each, in their order in `bits`.
    """

    bits: jax.Array | np.ndarray
    layout: tuple[tuple[str, str, tuple[int, ...]], ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def pack(cls, arrays: Mapping[str, jax.Array]) -> Scalars:
        """Pack arrays of 4-byte types and of bool; a bool takes a whole entry."""
        layout = tuple((name, x.dtype.name, x.shape) for name, x in sorted(arrays.items()))
        parts = [_to_bits(arrays[name]).ravel() for name, _, _ in layout]
        return cls(jnp.concatenate(parts), layout)

    def __getitem__(self, name: str) -> Any:
        start = 0
        for other, dtype, shape in self.layout:
            stop = start + math.prod(shape)
            if other == name:
                part = self.bits[start:stop].reshape(shape)
                return part.astype(bool) if dtype == "bool" else part.view(dtype)
            start = stop
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(name == other for other, _, _ in self.layout)  # of abstract arrays, too

    def __iter__(self) -> Iterator[str]:
        return (name for name, _, _ in self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def _to_bits(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        return x.astype(_BITS)
    if x.dtype.itemsize != _BITS.itemsize:
        raise TypeError(f"an array of {x.dtype} is not of 4 bytes an entry")
    return jax.lax.bitcast_convert_type(x, _BITS)
