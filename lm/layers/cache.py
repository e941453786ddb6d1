"""Keys and values of the tokens seen so far: an argument and a result, never state.

One entry per kind of layer. A layer without a window holds `length` slots; one with a window holds
a ring of at most `window` slots. Slots carry the segment and position of their token, so masks come
from data and prompts may be padded on the left.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.parallel.sharding import Rules
from lm.types import Array, Tokens


def init(
    windows: tuple[int | None, ...],
    num_layers: tuple[int, ...],
    *,
    batch_size: int,
    length: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
    rules: Rules,
) -> dict[str, Any]:
    """An empty cache: `index` int32 [] counts tokens; per kind, key and value [L, B, K, S, H],
    segments and positions [B, S].
    """
    entries, marks = [], []
    for window, layers in zip(windows, num_layers, strict=True):
        slots = length if window is None else min(window, length)
        shape = (layers, batch_size, num_kv_heads, slots, head_dim)
        axes = (None, "batch", "kv_heads", None, "head_dim")
        entries.append(
            {name: rules.constrain(jnp.zeros(shape, dtype), *axes) for name in ("key", "value")}
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


def mark(
    cache: dict[str, Any], inputs: Tokens
) -> tuple[tuple[dict[str, Array], ...], tuple[dict[str, Array], ...]]:
    """(marks after adding `inputs`, marks of the keys that `append` will return), per kind."""
    after, seen = [], []
    for marks in cache["marks"]:
        new = {"segments": inputs.segments, "positions": inputs.positions}
        updated = {n: _write(marks[n], new[n], cache["index"], 1) for n in marks}
        after.append(updated)
        if inputs.ids.shape[1] == 1:
            seen.append(updated)
        else:
            seen.append({n: jnp.concatenate([marks[n], new[n]], axis=1) for n in marks})
    return tuple(after), tuple(seen)


def append(
    entry: dict[str, Array], key: Array, value: Array, layer: Array, index: Array
) -> tuple[jax.Array, jax.Array, dict[str, Array]]:
    """(keys, values [B, K, S, H] to attend to, updated entry) after adding key, value: [B, K, T, H]
    of one layer.

    One token attends to the slots after its write: a ring then has dropped exactly the one that
    left the window. A longer piece attends to the slots before it and to itself, since its later
    tokens may overwrite what its first ones need.
    """
    news = {"key": key, "value": value}
    if key.shape[2] == 1:
        updated = {
            name: jax.lax.dynamic_update_slice(
                old, news[name][None].astype(old.dtype), (layer, 0, 0, index % old.shape[3], 0)
            )
            for name, old in entry.items()
        }
        return updated["key"][layer], updated["value"][layer], updated
    keys, updated = {}, {}
    for name, old in entry.items():
        new = news[name].astype(old.dtype)
        keys[name] = jnp.concatenate([old[layer], new], axis=2)
        updated[name] = old.at[layer].set(_write(old[layer], new, index, 2))
    return keys["key"], keys["value"], updated
