"""Configs as `ml_collections.ConfigDict`, as `configs/*.py` and the command line change them."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections import config_dict

from lm.config.components import COMPONENTS, component
from lm.config.fields import is_section

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class ConfigTree(ml_collections.ConfigDict):
    """A config, or a section of one, in which a whole number may be written as a float: 1e9."""

    if TYPE_CHECKING:

        def __getattr__(self, attribute: str) -> Any: ...
        def __getitem__(self, key: str) -> Any: ...
        def copy_and_resolve_references(self, visit_map: dict | None = None) -> ConfigTree: ...

    def __setitem__(self, key: str, value: Any) -> None:
        kind = self.get_type(key) if key in self else None
        if kind is int:
            value = as_int(value)
        tree = _TREES.get(key)
        is_dict = isinstance(value, dict | ml_collections.ConfigDict)
        if tree is not None and kind is tree and is_dict and not isinstance(value, tree):
            value = tree(value)
        super().__setitem__(key, value)


class ComponentTree(ConfigTree):
    """The section of a component, whose fields change with its `name`.

    Fields that the new component has too, and that differ from the defaults of the old one, keep
    their values.
    """

    key = ""  # of COMPONENTS

    def __setitem__(self, key: str, value: object) -> None:
        if key != "name" or "name" not in self or value in (self["name"], None):
            return super().__setitem__(key, value)
        new, was_locked = section(self.key, str(value)), self.is_locked
        defaults = dict(leaves(section(self.key, self["name"]).to_dict()))
        known = dict(leaves(new.to_dict())).keys() - {"name"}
        kept = {
            path: kept
            for path, kept in leaves(self.to_dict())
            if path in known
            and (path not in defaults or as_tuples(defaults[path]) != as_tuples(kept))
        }
        with new.ignore_type():
            new.update_from_flattened_dict(kept)
        self.unlock()
        for field in list(self):
            del self[field]
        for field, kept in new.items(preserve_field_references=True):
            super().__setitem__(field, kept)
        if was_locked:
            self.lock()

    def update_from_flattened_dict(
        self, flattened_dict: Mapping[str, Any], strip_prefix: str = ""
    ) -> None:
        """As of a ConfigDict; the name counts before the fields, wherever it stands."""
        if (name := f"{strip_prefix}name") in flattened_dict:
            self.name = flattened_dict[name]
        super().update_from_flattened_dict(flattened_dict, strip_prefix)


_TREES: dict[str, Any] = {
    name: type(f"{name.title()}Tree", (ComponentTree,), {"key": name}) for name in COMPONENTS
}


def section(key: str, name: str) -> ComponentTree:
    """The section `key` of a config for its component `name`, at the defaults of that."""
    tree = _TREES[key]()
    tree["name"] = name
    defaults = to_tree(component(COMPONENTS[key], name).Config())
    for field, value in defaults.items(preserve_field_references=True):
        if field != "name":
            tree[field] = value
    return tree


def to_tree(config: DataclassInstance) -> ConfigTree:
    """The section with the values of a frozen config."""
    tree = ConfigTree()
    for f in dataclasses.fields(config):
        value, (hint, optional) = getattr(config, f.name), without_none(hints(type(config))[f.name])
        if is_section(value):
            tree[f.name] = to_tree(value)
        elif optional and value is None:
            tree[f.name] = config_dict.placeholder(hint)  # a type for a value that is set later
        else:
            tree[f.name] = value
    return tree


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every key, in order."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_tuples(value: Any) -> Any:
    """`value` with tuples in place of lists, at every depth."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def as_int(value: object) -> object:
    """`value`, as an int where it is a float without a fraction, such as 1e9."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@functools.cache  # a search resolves thousands of configs, and this is most of the time it takes
def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(cls)


def without_none(hint: object) -> tuple[Any, bool]:
    """(X, True) for `X | None`, else (hint, False)."""
    args = typing.get_args(hint)
    if isinstance(hint, types.UnionType) and type(None) in args:
        return next(a for a in args if a is not type(None)), True
    return hint, False
