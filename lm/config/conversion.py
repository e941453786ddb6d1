"""Conversion of configs: ConfigDict, frozen dataclasses, JSON text, and settings from flags.

`configs/*.py` and the command line work on an `lm.config.tree.ConfigTree`; `resolve` turns it into
the frozen `lm.config.schema.Config` that the code reads.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ml_collections

from lm.config.components import (
    COMPONENTS,
    EVALUATIONS,
    Evaluation,
    Task,
    component,
    components_in,
)
from lm.config.fields import check_values, is_section
from lm.config.schema import Config, OptimizerConfig
from lm.config.suggestions import closest_path
from lm.config.tree import (
    ConfigTree,
    as_int,
    as_tuples,
    hints,
    leaves,
    section,
    to_tree,
    without_none,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Section = TypeVar("Section", bound=DataclassInstance)


_EVALUATION_NAME = re.compile(r"evaluations\.([^.]+)\.name")


def default(
    model: str = "decoder", objective: str = "causal", optimizer: str = "adamw"
) -> ConfigTree:
    """A ConfigDict with every field of every section at its default, for configs to change."""
    tree, chosen = ConfigTree(), {"model": model, "objective": objective, "optimizer": optimizer}
    for key, value in to_tree(Config()).items():
        tree[key] = section(key, chosen[key]) if key in chosen else value
    return tree


def task(name: str, sources: tuple[str, ...], **changes: object) -> dict[str, object]:
    """A section of `config.objective.tasks`: an objective, its fields, and its token stores.

    changes: fields that differ from the objective's defaults.
    """
    tree = to_tree(component(COMPONENTS["objective"], name).Config())
    fields = dict(tree.items(preserve_field_references=True))
    _check_keys(changes, fields, f"task {name}")
    return {"name": name, "sources": sources} | fields | changes


def evaluation(name: str, **changes: object) -> dict[str, object]:
    """A section of `config.evaluations`: a component of `lm.evaluation.kinds` and its fields.

    changes: fields that differ from the component's defaults.
    """
    section = _evaluation(name, "config.evaluations.NAME")
    _check_keys(changes, section.keys() - {"name"}, f"evaluation {name}")
    return section | changes


def _evaluation(name: str, path: str) -> dict[str, object]:
    tree = to_tree(component(EVALUATIONS, name, path).Config())
    return {"name": name, **dict(tree.items(preserve_field_references=True))}


def names(config: ConfigTree) -> dict[str, str]:
    """The component names of a config: {"model": "decoder", "objective": "causal", …}."""
    return {key: config[key]["name"] for key in COMPONENTS}


def is_name(path: str) -> bool:
    """True if a config path, such as "objective.name", names a component."""
    path = path.removeprefix("config.")
    return path in {f"{key}.name" for key in COMPONENTS} or bool(_EVALUATION_NAME.fullmatch(path))


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """The frozen `Config` of a ConfigDict, or of the plain dict that its `to_dict` returns.

    Raises:
        ValueError: an unknown key, a missing section, a value of the wrong type or out of its
        range; with the config path.
    """
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    _check_keys(tree, hints(Config), "config")
    names = {key: _component_name(tree, key) for key in COMPONENTS}
    for key in ("model", "objective"):
        tree[key] = {field: value for field, value in tree[key].items() if field != "name"}
    tree["optimizer"] = tree.get("optimizer", {}) | {"name": names["optimizer"]}
    resolved = _from_dict(_default_config(names), tree, "config")
    check_values(resolved, "config")
    return resolved


def _default_config(names: Mapping[str, str]) -> Config:
    return Config(**{key: component(COMPONENTS[key], name).Config() for key, name in names.items()})


def _component_name(tree: Mapping[str, Any], key: str) -> str:
    fields = tree.get(key, {})
    default = OptimizerConfig().name if key == "optimizer" else None
    name = fields.get("name", default) if isinstance(fields, dict) else None
    if not isinstance(name, str):
        raise ValueError(
            f"config.{key}.name must name a component of {COMPONENTS[key]}, got {name!r}"
        )
    return name


def to_json(config: ConfigTree) -> str:
    """The config as JSON text; `from_json` reads it back to an equal one."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str) -> ConfigTree:
    """The ConfigDict that `to_json` wrote; fields added since get their defaults."""
    tree = json.loads(text)
    if "tensorboard" in (log := tree.get("log", {})):  # of a folder from before log.trackers
        log["trackers"] = ["jsonl", *["tensorboard"] * log.pop("tensorboard")]
    _check_keys(tree, hints(Config), "config")
    config = default(**{key: _component_name(tree, key) for key in COMPONENTS})
    if "tasks" in config.objective:
        tasks = tree["objective"].get("tasks", {})
        config.objective.tasks = {name: task(t["name"], ()) for name, t in tasks.items()}
    for name, own in tree.get("evaluations", {}).items():
        config.evaluations[name] = _evaluation(own["name"], f"config.evaluations.{name}")
    _fill(config, tree, "config")
    return config


def _fill(section: ml_collections.ConfigDict, tree: Mapping[str, object], path: str) -> None:
    """Set the values of `tree`, of whatever type: `resolve` checks those."""
    _check_keys(tree, section.keys(), path)
    for key, value in tree.items():
        inner = section[key]
        if isinstance(value, dict) and isinstance(inner, ml_collections.ConfigDict):
            _fill(inner, value, f"{path}.{key}")
        else:
            with section.ignore_type():
                section[key] = as_tuples(value)


def completed(config: ConfigTree) -> ConfigTree:
    """A copy in which the fields that `config` lacks have their defaults.

    Fields are missing where a component is chosen by its name alone.
    """
    return from_json(to_json(config))


def assign(config: ConfigTree, setting: str) -> None:
    """Set a value from text such as "optimizer.learning_rate=1e-3", as a flag --config.… does.

    "objective.name=prefix" replaces the fields by those of that component, and
    "evaluations.grammar.name=blimp" adds an evaluation. Raises ValueError, with the config path,
    where there is no such key, or the value has another type.
    """
    path, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"{setting!r} is not KEY=VALUE")
    path = path.removeprefix("config.")
    if added := _EVALUATION_NAME.fullmatch(path):
        with config.evaluations.unlocked():
            config.evaluations[added[1]] = _evaluation(text, f"config.evaluations.{added[1]}")
        return
    if is_name(path):
        config[path.removesuffix(".name")].name = text
        return
    *sections, last = path.split(".")
    node, name = config, "config"
    for key in sections:
        _check_keys([key], node.keys(), name)
        node, name = node[key], f"{name}.{key}"
        if not isinstance(node, ml_collections.ConfigDict):
            raise ValueError(f"{name} is a value and has no keys")
    last = f"{last}_" if f"{last}_" in node else last  # init.from_: `from` is a keyword of Python
    _check_keys([last], node.keys(), name)
    kind = node.get_type(last)
    if issubclass(kind, ml_collections.ConfigDict) and not text.startswith("{"):
        raise ValueError(f"config.{path} is a section: set its keys, which --explain lists")
    try:
        node[last] = _parse(text, kind)
    except TypeError:
        raise ValueError(f"config.{path} must be {kind.__name__}, got {text!r}") from None


def _parse(text: str, kind: type) -> object:
    """The value of a flag's text, of type `kind` where the text can be read so."""
    words = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    if kind is str:
        return text
    if kind is bool and text.lower() in words:
        return words[text.lower()]
    try:
        value = as_tuples(ast.literal_eval(text))
    except (SyntaxError, ValueError):
        value = text
    if kind is float and value in ("nan", "inf", "-inf"):
        return float(text)  # for the range to refuse
    if kind is tuple and not isinstance(value, tuple | None):
        return (value,)
    return value


def changed(
    old: ml_collections.ConfigDict, new: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
    """Paths whose values differ, with both values."""
    a, b = dict(leaves(old.to_dict())), dict(leaves(new.to_dict()))
    return {
        path: (a.get(path), b.get(path))
        for path in sorted(a.keys() | b.keys())
        if as_tuples(a.get(path)) != as_tuples(b.get(path))
    }


def explain(config: ConfigTree) -> Iterator[tuple[str, object, object, str]]:
    """(path, value, default, sentence with the valid values) of every key."""
    chosen = names(config)
    usual, own = default(**chosen), {}
    for name, entry in config.evaluations.items():
        usual.evaluations[name] = evaluation(entry.name)
        own[f"evaluations.{name}.name"] = f"A module of {EVALUATIONS}, or a full module name."
        fields = component(EVALUATIONS, entry.name).Config()
        own |= dict(_sentences(fields, f"evaluations.{name}."))
    defaults = dict(leaves(usual.to_dict()))
    sentences = {
        f"{key}.name": f"A module of {package}, or a full module name."
        for key, package in COMPONENTS.items()
    } | {**dict(_sentences(_default_config(chosen))), **own}
    for path, value in leaves(config.to_dict()):
        yield path, value, defaults.get(path), sentences.get(path, "")


def _sentences(config: DataclassInstance, prefix: str = "") -> Iterator[tuple[str, str]]:
    for f in dataclasses.fields(config):
        value, bounds = getattr(config, f.name), f.metadata.get("range")
        if is_section(value):
            yield from _sentences(value, f"{prefix}{f.name}.")
        else:
            sentence, choices = f.metadata["help"], f.metadata.get("choices", ())
            if bounds:
                sentence += f" Must be {bounds}."
            if any(choice not in sentence for choice in choices):
                sentence += f" One of {', '.join(choices)}."
            yield f"{prefix}{f.name}", sentence


def check_paths(paths: Sequence[str], trees: Sequence[ConfigTree], key: str) -> None:
    """Raises ValueError unless the configs `trees`, or some component of lm, have all `paths` of
    keys and sections, which are the value of `key`.
    """
    known = _paths(trees)
    if not known.issuperset(paths):  # maybe of a component that the run had before
        known |= _paths(
            default(**{key: name})
            for key, package in COMPONENTS.items()
            for name in components_in(package)
        )
    for path in paths:
        if path not in known:
            section, _, word = path.rpartition(".")
            meant = closest_path(word, set(), section, sorted(known))
            hint = f"; did you mean {meant!r}?" if meant else " (--explain lists them)"
            raise ValueError(f"{key}: {path!r} is no path of the config{hint}")


def _paths(trees: Iterable[ConfigTree]) -> set[str]:
    """The paths of all keys and sections of configs."""
    keys = [path.split(".") for tree in trees for path, _ in leaves(tree.to_dict())]
    return {path for words in keys for path in itertools.accumulate(words, "{}.{}".format)}


def _check_keys(keys: Collection[str], known: Collection[str], path: str) -> None:
    for key in keys:
        if key not in known:
            everywhere = [f"config.{leaf}" for leaf, _ in leaves(default().to_dict())]
            meant = closest_path(key, set(known), path, everywhere)
            hint = f"did you mean {meant}?" if meant else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"{path}.{key} is not a config key; {hint}")


def _from_dict(default: Section, tree: object, path: str) -> Section:
    """`default`, a frozen config, with the values of `tree`."""
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must be a section with keys, got {tree!r}")
    kinds, values = hints(type(default)), {}
    _check_keys(tree, kinds, path)
    for key, value in tree.items():
        old, inner = getattr(default, key), f"{path}.{key}"
        values[key] = (
            _from_dict(old, value, inner) if is_section(old) else _convert(kinds[key], value, inner)
        )
    return dataclasses.replace(default, **values)


def _to_task(tree: object, path: str) -> Task:
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        raise ValueError(f"{path} must be a section with the name of an objective, got {tree!r}")
    fields = {key: value for key, value in tree.items() if key not in ("name", "sources")}
    sources = _convert(tuple[str, ...], tree.get("sources", ()), f"{path}.sources")
    config = component(COMPONENTS["objective"], tree["name"]).Config()
    return Task(tree["name"], sources, _from_dict(config, fields, path))


def _to_evaluation(tree: object, path: str) -> Evaluation:
    if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
        raise ValueError(f"{path} must be a section with the name of a component, got {tree!r}")
    fields = {key: value for key, value in tree.items() if key != "name"}
    config = component(EVALUATIONS, tree["name"], path).Config()
    return Evaluation(tree["name"], _from_dict(config, fields, path))


def _convert(hint: object, value: object, path: str) -> Any:
    """A value as the type of its field, or an error with its path."""
    kind, optional = without_none(hint)
    if optional and value is None:
        return None
    origin = typing.get_origin(kind) or kind
    if kind == dict[str, Task] and isinstance(value, dict):
        return {name: _to_task(section, f"{path}.{name}") for name, section in value.items()}
    if kind == dict[str, Evaluation] and isinstance(value, dict):
        return {name: _to_evaluation(section, f"{path}.{name}") for name, section in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        kinds = typing.get_args(kind)
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise ValueError(f"{path} must have {len(kinds)} entries, got {value!r}")
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(_convert(kind, v, f"{path}[{i}]") for i, (kind, v) in pairs)
    if kind is Any:
        return as_tuples(value)
    if origin is int:
        value = as_int(value)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"{path} must be {getattr(kind, '__name__', kind)}, got {value!r}")
    return value
