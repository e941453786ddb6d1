"""Components by name: modules with a `Config` dataclass and a `build` function.

Model, objective and optimizer are components: `config.model.name` names a module of `lm.models`,
and so on. A name with a dot is imported as it is, so that a component may live outside of this
project. So are evaluations inside a run: `config.evaluations.NAME.name` names one of
`lm.evaluation.kinds`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pkgutil
import types
from collections.abc import Iterable
from typing import Any

from lm.config.suggestions import suggestion

COMPONENTS = {
    "model": "lm.models",
    "objective": "lm.objectives",
    "optimizer": "lm.optim.optimizers",
}
EVALUATIONS = "lm.evaluation.kinds"
_KEYS = {package: key for key, package in COMPONENTS.items()} | {EVALUATIONS: "evaluations.NAME"}


@dataclasses.dataclass(frozen=True)
class Task:
    """One of several objectives of a run: its name, config and token stores."""

    name: str
    sources: tuple[str, ...]
    config: Any  # the objective's `Config`


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One of the evaluations inside a run: its component's name, and its config."""

    name: str
    config: Any  # the component's `Config`, an `lm.config.schema.EvaluationConfig`


def component(package: str, name: str, path: str | None = None) -> types.ModuleType:
    """The module `name` of `package`; with a dot in `name`, the module of that full name.
    Raises ValueError, with a list of those that exist, where it has no `Config` and `build`.

    path: of the section that names it; None: of the one that all configs have.
    """
    config_path = f"{path or f'config.{_KEYS[package]}'}.name ({name!r})"
    needed = ["Config", "build", *(["STEPS"] if package == "lm.optim.optimizers" else [])]
    if "." in name:
        return import_component(name, config_path, needed=needed)
    if not name.isidentifier() or importlib.util.find_spec(f"{package}.{name}") is None:
        known = components_in(package)
        raise ValueError(
            f"{config_path} is not in {package}; there are: {', '.join(known)}"
            f"{suggestion(name, known)}"
        )
    return import_component(f"{package}.{name}", config_path, needed=needed)


def names_in(package: str) -> list[str]:
    """The names of a package's modules, sorted."""
    home = importlib.import_module(package)
    return sorted(module.name for module in pkgutil.iter_modules(home.__path__))


def components_in(package: str) -> list[str]:
    """The names of a package's components, sorted: of its modules with a `Config`."""
    modules = {name: importlib.import_module(f"{package}.{name}") for name in names_in(package)}
    return [name for name, module in modules.items() if hasattr(module, "Config")]


def import_component(module: str, asked_by: str, *, needed: Iterable[str]) -> types.ModuleType:
    """The module of a full name; ValueError where there is none, or it lacks an attribute `needed`.

    asked_by: the config path or flag that names the module, for errors.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, and something that it needs does not
        raise ValueError(
            f"{asked_by}: Python finds no module {error.name}; give the folder that holds it as "
            "PYTHONPATH=FOLDER"
        ) from None
    for name in needed:
        if not hasattr(found, name):
            raise ValueError(f"{asked_by} is no component: {module} has no `{name}`")
    return found
