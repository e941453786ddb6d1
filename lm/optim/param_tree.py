"""Parameters by name: `layers.mlp.up.weight` is the path of a leaf in a tree of nested dicts."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{name: leaf}; whatever is no dict is a leaf, boxes and shardings too."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def unstack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with every stack of layers as its layers: `layers.up` [L, ...] as `layers.0.up`, ...

    A loop over layers reads its weights out of their stack. XLA's CPU compiler copies them for
    that, which takes longer than multiplying one token by them. Memory of a CPU is shared where it
    can be; the arrays must be whole on one device.
    """

    def layer(x: Any, i: int) -> jax.Array:
        [where] = x.devices() if isinstance(x, jax.Array) else [None]
        return jax.device_put(np.asarray(x)[i], where, may_alias=True)

    def one(key: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if key != "layers":
            return unstack_layers(value)
        leaves = flatten(value)
        [count] = {x.shape[0] for x in leaves.values()}
        return {
            str(i): unflatten({name: layer(x, i) for name, x in leaves.items()})
            for i in range(count)
        }

    return {key: one(key, value) for key, value in tree.items()}


def split(tree: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the leaves of these names, the others), each as a tree without empty dicts."""
    chosen = set(names)
    if not chosen:
        return {}, dict(tree)
    leaves = flatten(tree)
    parts = (
        unflatten({n: x for n, x in leaves.items() if (n in chosen) == inside})
        for inside in (True, False)
    )
    return next(parts), next(parts)


def join(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """One tree of the leaves of several, in the order of their names."""
    trees = tuple(tree for tree in trees if tree)
    if len(trees) == 1:
        return dict(trees[0])
    leaves = [leaf for tree in trees for leaf in flatten(tree).items()]
    return unflatten(dict(sorted(leaves)))


def matching(path: str, patterns: Sequence[str], names: Iterable[str]) -> frozenset[str]:
    """The names that any of the patterns of config path `path` match, as `fnmatch` does; a * goes
    over dots.

    Raises:
        ValueError: a pattern matches none.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(
                f"{path}: {pattern!r} matches none of the parameters\n  " + "\n  ".join(names)
            )
        found.update(matched)
    return frozenset(found)
