"""Conversion of configs: ConfigDict, frozen dataclasses, JSON text, and settings from flags.

`configs/*.py` and the command line work on a `ml_collections.ConfigDict`; `resolve` turns it into
the frozen `lm.config.schema.Config` that the code reads.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import itertools
import json
import pkgutil
import types
import typing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
from ml_collections import config_dict

from lm.config.schema import (
    COMPONENTS,
    Config,
    OptimizerConfig,
    Range,
    Task,
    check_values,
    component,
)


class ConfigTree(ml_collections.ConfigDict):
    """A config, or a section of one, where a whole number may be written as a float: 1e9."""

    if TYPE_CHECKING:

        def __getattr__(self, attribute: str) -> Any: ...
        def __getitem__(self, key: str) -> Any: ...
        def copy_and_resolve_references(self, visit_map: Any = None) -> ConfigTree: ...

    def __setitem__(self, key: Any, value: Any) -> None:
        kind = self.get_type(key) if key in self else None
        if kind is int:
            value = _whole(value)
        tree = _TREES.get(key)
        is_section = isinstance(value, dict | ml_collections.ConfigDict)
        if tree is not None and kind is tree and is_section and not isinstance(value, tree):
            value = tree(value)
        super().__setitem__(key, value)


class ComponentTree(ConfigTree):
    """The section of a component. Another `name` brings the fields of that component; those that
    both have, and that differ from the defaults of the one before, keep their values.
    """

    key = ""  # of COMPONENTS

    def __setitem__(self, key: Any, value: Any) -> None:
        if key != "name" or "name" not in self or value in (self["name"], None):
            return super().__setitem__(key, value)
        new, was_locked = _section(self.key, value), self.is_locked
        usual = dict(_leaves(_section(self.key, self["name"]).to_dict()))
        for path, kept in _leaves(self.to_dict()):
            node, last = _find(new, path)
            changed_ = path not in usual or _tuples(usual[path]) != _tuples(kept)
            if path != "name" and node is not None and changed_:
                with node.ignore_type():
                    node[last] = kept
        self.unlock()
        for field in list(self):
            del self[field]
        for field, kept in new.items(preserve_field_references=True):
            super().__setitem__(field, kept)
        if was_locked:
            self.lock()


_TREES: dict[str, Any] = {
    name: type(f"{name.title()}Tree", (ComponentTree,), {"key": name}) for name in COMPONENTS
}


def default(
    model: str = "decoder", objective: str = "causal", optimizer: str = "adamw"
) -> ConfigTree:
    """A ConfigDict with every field of every section at its default, for configs to change."""
    tree = ConfigTree()
    chosen = {"model": model, "objective": objective, "optimizer": optimizer}
    for f in dataclasses.fields(Config):
        if f.name in COMPONENTS:
            tree[f.name] = _section(f.name, chosen[f.name])
        else:
            tree[f.name] = f.default if f.name == "seed" else _to_tree(f.default)
    return tree


def _section(key: str, name: str) -> ConfigTree:
    """The section `key` of a config for its component `name`, at the defaults of that."""
    section = _TREES[key]()
    section["name"] = name
    for field, value in _to_tree(component(COMPONENTS[key], name).Config()).items(
        preserve_field_references=True
    ):
        if field != "name":
            section[field] = value
    return section


def task(name: str, sources: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    """A section of `config.objective.tasks`: an objective, its fields at their defaults or
    `changes`, and the stores that it is for.
    """
    tree = _to_tree(component(COMPONENTS["objective"], name).Config())
    fields = dict(tree.items(preserve_field_references=True))
    _check_keys(changes, set(fields), f"task {name}")
    return {"name": name, "sources": sources} | fields | changes


def resolve(config: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """The frozen `Config` of a ConfigDict (or of the plain dict that `to_dict` made of one).

    Raises:
        ValueError: a key that nothing reads, a missing section, a value of the wrong type or out
        of its range; with the config path.
    """
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    _check_keys(tree, {f.name for f in dataclasses.fields(Config)}, "config")
    values: dict[str, Any] = {}
    for f in dataclasses.fields(Config):
        path, section = f"config.{f.name}", tree.get(f.name, {})
        if f.name in COMPONENTS:
            name = _name_in(tree, f.name)
            usual = component(COMPONENTS[f.name], name).Config()
            own_name = {"name": name} if f.name == "optimizer" else {}
            section = {key: value for key, value in section.items() if key != "name"} | own_name
            values[f.name] = _from_dict(usual, section, path)
        elif f.name == "seed":
            values[f.name] = _convert(int, tree.get("seed", f.default), path)
        else:
            values[f.name] = _from_dict(f.default, section, path)
    resolved = Config(**values)
    check_values(resolved, "config")
    return resolved


def _name_in(tree: dict[str, Any], key: str) -> str:
    section = tree.get(key, {})
    usual = OptimizerConfig().name if key == "optimizer" else None
    name = section.get("name", usual) if isinstance(section, dict) else None
    if not isinstance(name, str):
        raise ValueError(
            f"config.{key}.name must name a component of {COMPONENTS[key]}, got {name!r}"
        )
    return name


def names(config: ConfigTree) -> dict[str, str]:
    """The component names of a config: {"model": "decoder", "objective": "causal", …}."""
    return {key: config[key]["name"] for key in COMPONENTS}  # pyright: ignore


def to_json(config: ConfigTree) -> str:
    """The config as JSON text; `from_json` reads it back to an equal one."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str) -> ConfigTree:
    """The ConfigDict that `to_json` wrote; fields added since get their defaults."""
    tree = json.loads(text)
    _check_keys(tree, {f.name for f in dataclasses.fields(Config)}, "config")
    config = default(**{key: _name_in(tree, key) for key in COMPONENTS})
    if "tasks" in config.objective:
        of = tree["objective"].get("tasks", {})
        config.objective.tasks = {name: task(t["name"], ()) for name, t in of.items()}
    for path, value in _leaves(tree):
        *sections, last = path.split(".")
        node: Any = config
        for key in sections:
            node = node[key]
        _check_keys({last: value}, set(node.keys()), ".".join(["config", *sections]))
        with node.ignore_type():
            node[last] = _tuples(value)
    return config


def completed(config: ConfigTree) -> ConfigTree:
    """A copy with every field of every section and component, those that `config` lacks at their
    defaults, as where an objective is chosen by its name alone.
    """
    return from_json(to_json(config))


def is_name(path: str) -> bool:
    """True if a config path, such as "objective.name", names a component."""
    return path.removeprefix("config.") in {f"{key}.name" for key in COMPONENTS}


def _find(config: Any, path: str) -> tuple[Any, str]:
    """(the section of a config that holds the key of `path`, or None, and the key)."""
    *sections, last = path.split(".")
    for key in sections:
        config = config.get(key) if isinstance(config, ml_collections.ConfigDict) else None
    known = isinstance(config, ml_collections.ConfigDict) and last in config
    return config if known else None, last


def assign(config: Any, setting: str) -> None:
    """Sets a value from text such as "optimizer.learning_rate=1e-3", as a flag --config.… does;
    "objective.name=prefix" brings the fields of that component.

    Raises:
        ValueError: no such key, or a value of another type; with the config path.
    """
    path, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"{setting!r} is not KEY=VALUE")
    path = path.removeprefix("config.")
    if is_name(path):
        config[path.removesuffix(".name")].name = text
        return
    *sections, last = path.split(".")
    node: Any = config
    for depth, key in enumerate([*sections, last]):
        if not isinstance(node, ml_collections.ConfigDict):
            raise ValueError(f"config.{'.'.join(sections[:depth])} is a value and has no keys")
        if f"{key}_" in node:  # init.from_: Python keeps the word
            key = last = f"{key}_"
        _check_keys({key: None}, set(node.keys()), ".".join(["config", *sections[:depth]]))
        node = node[key] if depth < len(sections) else node
    kind = node.get_type(last)
    if issubclass(kind, ml_collections.ConfigDict) and not text.startswith("{"):
        raise ValueError(f"config.{path} is a section: set its keys, which --explain lists")
    try:
        node[last] = _parse(text, kind)
    except TypeError:
        raise ValueError(f"config.{path} must be {kind.__name__}, got {text!r}") from None


def _parse(text: str, kind: type) -> Any:
    """The value of a flag's text, of type `kind` where the text can be read so."""
    words = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    if kind is str:
        return text
    if kind is bool and text.lower() in words:
        return words[text.lower()]
    try:
        value = _tuples(ast.literal_eval(text))
    except (SyntaxError, ValueError):
        value = text
    if kind is float and value in ("nan", "inf", "-inf"):
        return float(text)  # for the range to refuse
    if kind is tuple and not isinstance(value, tuple | None):
        return (value,)
    return value


def check_paths(paths: Sequence[str], trees: Sequence[ConfigTree], key: str) -> None:
    """Checks the paths of keys and sections that the value of `key` lists.

    Raises:
        ValueError: neither the configs `trees` nor any component of lm have such a path.
    """
    known = {path for tree in trees for path in _prefixes(tree)}
    if not known.issuperset(paths):  # of a component that the run had before, maybe
        known.update(path for tree in _of_all_components() for path in _prefixes(tree))
    for path in paths:
        if path not in known:
            last = path.rsplit(".")[-1]
            close = difflib.get_close_matches(path, sorted(known), n=1, cutoff=0.7)
            close += sorted(k for k in known if k.rsplit(".")[-1] == last)
            hint = f"; did you mean {close[0]!r}?" if close else " (--explain lists them)"
            raise ValueError(f"{key}: {path!r} is no path of the config{hint}")


def _prefixes(tree: ConfigTree) -> Iterator[str]:
    """The paths of all keys and sections of a config."""
    for leaf, _ in _leaves(tree.to_dict()):
        parts = leaf.split(".")
        yield from (".".join(parts[: n + 1]) for n in range(len(parts)))


def _of_all_components() -> Iterator[ConfigTree]:
    for key, package in COMPONENTS.items():
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if hasattr(importlib.import_module(f"{package}.{module.name}"), "Config"):
                yield default(**{key: module.name})


def changed(
    old: ml_collections.ConfigDict, new: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
    """Paths whose values differ, with both values."""
    a, b = dict(_leaves(old.to_dict())), dict(_leaves(new.to_dict()))
    return {
        path: (a.get(path), b.get(path))
        for path in sorted(a.keys() | b.keys())
        if _tuples(a.get(path)) != _tuples(b.get(path))
    }


def explain(config: ConfigTree) -> Iterator[tuple[str, Any, Any, str]]:
    """(path, value, default, sentence with the range of numbers) of every key."""
    base = default(**names(config))
    defaults = dict(_leaves(base.to_dict()))
    sentences = {"seed": _sentence(Config, "seed")}
    for f in dataclasses.fields(Config):
        if f.name in COMPONENTS:
            package = COMPONENTS[f.name]
            cls = component(package, names(config)[f.name]).Config
            sentences[f"{f.name}.name"] = f"A module of {package}, or a full module name."
        else:
            cls = _hints(Config)[f.name]
        if dataclasses.is_dataclass(cls):
            sentences |= dict(_sentences(cls, f.name))
    for path, value in _leaves(config.to_dict()):
        yield path, value, defaults.get(path), sentences.get(path, "")


def _sentence(cls: Any, name: str) -> str:
    return next(_describe(f) for f in dataclasses.fields(cls) if f.name == name)


def _describe(f: dataclasses.Field) -> str:
    bounds: Range | None = f.metadata.get("range")
    return f.metadata["help"] + (f" Must be {bounds}." if bounds else "")


def _sentences(cls: Any, prefix: str) -> Iterator[tuple[str, str]]:
    hints = _hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _sentences(hints[f.name], f"{prefix}.{f.name}")
        else:
            yield f"{prefix}.{f.name}", _describe(f)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


@functools.cache  # a search resolves thousands of configs, and this is most of the time it takes
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _whole(value: Any) -> Any:
    """`value`, as an int where it is a float without a fraction, such as 1e9."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _optional(hint: Any) -> tuple[Any, bool]:
    """(X, True) for `X | None`, else (hint, False)."""
    args = typing.get_args(hint)
    if isinstance(hint, types.UnionType) and type(None) in args:
        return next(a for a in args if a is not type(None)), True
    return hint, False


def _to_tree(config: Any) -> ConfigTree:
    """The section of a frozen config, its own fields' values in it."""
    tree = ConfigTree()
    for f in dataclasses.fields(config):
        value, (hint, optional) = getattr(config, f.name), _optional(_hints(type(config))[f.name])
        if dataclasses.is_dataclass(value):
            tree[f.name] = _to_tree(value)
        elif optional and value is None:
            tree[f.name] = config_dict.placeholder(hint)  # a type for what is set later
        else:
            tree[f.name] = value
    return tree


def _check_keys(tree: dict[str, Any], known: set[str], path: str) -> None:
    for key in tree:
        if key not in known:
            meant = _meant(key, known, path)
            hint = f"did you mean {meant}?" if meant else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"{path}.{key} is not a config key; {hint}")


_ALIASES = {"name": {"kind"}, "kind": {"name"}}  # components have names, other choices kinds


def _shared(a: str, b: str) -> int:
    """The number of sections that two paths begin with."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _meant(key: str, known: set[str], path: str) -> str | None:
    """The path of the config that is most likely meant by `key` in the section `path`: one of the
    same section, else one of those that share most sections with it.
    """
    if close := difflib.get_close_matches(key, known, n=1) or known & _ALIASES.get(key, set()):
        return f"{path}.{next(iter(close))}"
    everywhere: dict[str, str] = {}
    leaves = [leaf for leaf, _ in _leaves(default().to_dict())]
    for leaf in sorted(leaves, key=lambda leaf: -_shared(f"config.{leaf}", path)):
        last = leaf.rsplit(".", 1)[-1]
        initials = "".join(word[:1] for word in last.split("_"))
        everywhere.setdefault(last, f"config.{leaf}")
        if len(initials) > 1:
            everywhere.setdefault(initials, f"config.{leaf}")
    close = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.8)
    meant = everywhere[close[0]] if close else None
    return None if meant == f"{path}.{key}" else meant  # a key of another component


def _from_dict(default: Any, tree: dict[str, Any], path: str) -> Any:
    """`default`, a frozen config, with the values of `tree`."""
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must be a section with keys, got {tree!r}")
    hints = _hints(type(default))
    _check_keys(tree, set(hints), path)
    values = {}
    for key, value in tree.items():
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _from_dict(getattr(default, key), value, f"{path}.{key}")
        else:
            values[key] = _convert(hints[key], value, f"{path}.{key}")
    return dataclasses.replace(default, **values)


def _to_task(section: Any, path: str) -> Task:
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise ValueError(f"{path} must be a section with the name of an objective, got {section!r}")
    fields = {key: value for key, value in section.items() if key not in ("name", "sources")}
    sources = _convert(tuple[str, ...], section.get("sources", ()), f"{path}.sources")
    config = component(COMPONENTS["objective"], section["name"]).Config()
    return Task(section["name"], sources, _from_dict(config, fields, path))


def _convert(hint: Any, value: Any, path: str) -> Any:
    kind, optional = _optional(hint)
    if optional and value is None:
        return None
    origin = typing.get_origin(kind) or kind
    if kind == dict[str, Task]:
        return {name: _to_task(section, f"{path}.{name}") for name, section in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        hints = typing.get_args(kind)
        if hints[-1] is ...:
            hints = hints[:1] * len(value)
        if len(hints) != len(value):
            raise ValueError(f"{path} must have {len(hints)} entries, got {value!r}")
        pairs = enumerate(zip(hints, value, strict=True))
        return tuple(_convert(hint, v, f"{path}[{i}]") for i, (hint, v) in pairs)
    if kind is Any:
        return _tuples(value)
    if origin is int:
        value = _whole(value)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"{path} must be {getattr(kind, '__name__', kind)}, got {value!r}")
    return value
