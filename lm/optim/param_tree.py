"""Parameters by name: `layers.mlp.up.weight` is the path of a leaf in a tree of nested dicts."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from lm.types import Params

T = TypeVar("T")


def is_box(x: object) -> bool:
    """True for a parameter with its logical axes."""
    return isinstance(x, nn.Partitioned)


def flatten(tree: Params) -> dict:
    """{name: leaf}; everything but a dict is a leaf, boxes and shardings too."""
    return traverse_util.flatten_dict(dict(tree), sep=".")


def named_leaves(tree: object) -> dict[str, Any]:
    """{name: leaf} of any pytree, in its order; names as those of `flatten`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(leaves: Mapping[str, T]) -> Params:
    """The tree of `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep=".")


def unstack_layers(tree: Params) -> Params:
    """The tree with every stack of layers as its layers: `layers.up` [L, ...] as `layers.0.up`, ...

    A loop over layers reads its weights out of their stack. XLA's CPU compiler copies them for
    that, which takes longer than multiplying one token by them. Memory of a CPU is shared where it
    can be; the arrays must be whole on one device.
    """

    def layer(x: jax.Array | np.ndarray, i: int) -> jax.Array:
        [device] = x.devices() if isinstance(x, jax.Array) else [None]
        return jax.device_put(np.asarray(x)[i], device, may_alias=True)

    leaves: dict[str, Any] = {}
    for name, x in flatten(tree).items():
        before, is_stacked, after = f".{name}".partition(".layers.")
        if is_stacked:
            for i in range(len(jax.tree.leaves(x)[0])):
                one = jax.tree.map(functools.partial(layer, i=i), x)  # of several arrays, too
                leaves[f"{before}.layers.{i}.{after}".lstrip(".")] = one
        else:
            leaves[name] = x
    return unflatten(leaves)


def split(tree: Params, names: Iterable[str]) -> tuple[Params, Params]:
    """(the leaves of these names, the others), each as a tree without empty dicts."""
    chosen = set(names)
    if not chosen:
        return {}, dict(tree)
    inside, outside = {}, {}
    for name, leaf in flatten(tree).items():
        (inside if name in chosen else outside)[name] = leaf
    return unflatten(inside), unflatten(outside)


def join(*trees: Params) -> Params:
    """One tree of the leaves of several, in the order of their names."""
    trees = tuple(tree for tree in trees if tree)
    if len(trees) == 1:
        return dict(trees[0])
    leaves = [leaf for tree in trees for leaf in flatten(tree).items()]
    return unflatten(dict(sorted(leaves, key=lambda leaf: leaf[0])))


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
