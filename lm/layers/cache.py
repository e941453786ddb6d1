"""Keys and values of the tokens seen so far: an argument and a result, never state.

One entry per kind of layer. A layer without a window holds `length` slots; one with a window holds
a ring of at most `window` slots. Slots carry the segment and position of their token, so masks come
from data and prompts may be padded on the left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp

from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Tokens

if TYPE_CHECKING:
    from lm.layers.block_config import BlockConfig

Marks: TypeAlias = tuple[dict[str, Array], ...]  # segments and positions [B, S] of each kind


def init(config: BlockConfig, rules: Rules, batch_size: int, length: int) -> Cache:
    """An empty cache: `index` int32 [] counts tokens; per kind, key and value [L, B, K, S, H],
    segments and positions [B, S].
    """
    entries, marks = [], []
    for kind, window in zip(config.kinds, config.windows, strict=True):
        slots = length if window is None else min(window, length)
        layers = config.layer_kinds.count(kind)
        shape = (layers, batch_size, config.kv_heads, slots, config.head_size)
        axes = (None, "batch", "kv_heads", None, "head_dim")
        entries.append(
            {n: rules.constrain(jnp.zeros(shape, config.dtype), *axes) for n in ("key", "value")}
        )
        marks.append(
            {n: jnp.zeros((batch_size, slots), jnp.int32) for n in ("segments", "positions")}
        )
    return {"index": jnp.zeros((), jnp.int32), "layers": tuple(entries), "marks": tuple(marks)}


def _write(old: Array, new: Array, index: Array, axis: int) -> jax.Array:
    """`old` with `new` at slots index, index + 1, ... (modulo its size) along `axis`."""
    slots, count = old.shape[axis], new.shape[axis]
    if count == 1:
        return jax.lax.dynamic_update_slice_in_dim(old, new, index % slots, axis)
    if count > slots:  # only the last tokens of a long piece stay in a ring
        new = jax.lax.slice_in_dim(new, count - slots, count, axis=axis)
        index = index + count - slots
        count = slots
    where = (index + jnp.arange(count)) % slots
    return old.at[(slice(None),) * axis + (where,)].set(new)


def mark(marks: Marks, inputs: Tokens, index: Array) -> tuple[Marks, Marks]:
    """(marks after adding `inputs`, marks of the keys that `append` will return)."""
    new = {"segments": inputs.segments, "positions": inputs.positions}
    after = tuple({n: _write(old[n], new[n], index, 1) for n in new} for old in marks)
    if inputs.ids.shape[1] == 1:
        return after, after
    return after, tuple(
        {n: jnp.concatenate([old[n], new[n]], axis=1) for n in new} for old in marks
    )


def append(
    entry: dict[str, Array], key: Array, value: Array, layer: Array, index: Array
) -> tuple[jax.Array, jax.Array, dict[str, Array]]:
    """(keys, values [B, K, S, H] to attend to, updated entry) after adding key, value: [B, K, T, H]
    of one layer.

    One token attends to the slots after its write: a ring then has dropped exactly the one that
    left the window. A longer piece attends to the slots before it and to itself, since its later
    tokens may overwrite what its first ones need.
    """

    def one(old: Array, new: Array) -> tuple[jax.Array, jax.Array]:
        new = new.astype(old.dtype)
        if new.shape[2] == 1:
            start = (layer, 0, 0, index % old.shape[3], 0)
            updated = jax.lax.dynamic_update_slice(old, new[None], start)
            return updated[layer], updated
        seen = jnp.concatenate([old[layer], new], axis=2)
        return seen, old.at[layer].set(_write(old[layer], new, index, 2))

    keys, key = one(entry["key"], key)
    values, value = one(entry["value"], value)
    return keys, values, {"key": key, "value": value}
