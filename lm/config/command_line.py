"""Flags of a script that name a config, --config=FILE, and change it, --config.KEY=VALUE."""

from __future__ import annotations

import json
import os
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path

from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.storage.epaths import StoragePath
from lm.storage.paths import expand_path

# errors of Python in a config file with a mistake
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the other arguments, KEY=VALUE of every --config.KEY=VALUE).

    --config.KEY VALUE is read too; --config.KEY and --noconfig.KEY mean True and False.
    """
    rest, settings, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            return [*rest, word, *words], settings
        found = re.fullmatch(r"--?(no)?config\.([^=]*)(=.*)?", word, re.DOTALL)
        if found is None:
            rest.append(word)
            continue
        negated, path, value = found.groups()
        if value is None and negated:
            value = "=False"
        elif value is None:
            value = f"={words.pop(0)}" if words and not words[0].startswith("-") else "=True"
        settings.append(path + value)
    return rest, settings


def read(name: str, settings: Sequence[str]) -> ConfigTree:
    """The locked config of `load` with `settings` applied, KEY=VALUE each; of several settings of a
    key the last one counts. Raises ValueError where the file, a key or a value is wrong.
    """
    config = load(name)
    # components first: their names decide which fields there are
    for setting in sorted(settings, key=lambda s: not conversion.is_name(s.partition("=")[0])):
        conversion.assign(config, setting)
    config.lock()
    return config


def load(name: str) -> ConfigTree:
    """The config of FILE.py or FILE.py:ARG, or of the config.json that a run has in its folder.
    Raises ValueError where there is no such file, or a mistake in it, with the file and its line.
    """
    if name.endswith(".json"):
        return _from_json_file(name)
    path, colon, arg = name.partition(":")
    path = expand_path(path, "--config")
    if not os.path.exists(path):
        raise ValueError(f"--config={path}: no such file")
    if os.path.isdir(path):
        inside = Path(path) / "config.json"
        hint = f"; did you mean --config={inside}?" if inside.exists() else ""
        raise ValueError(f"--config={path} is a folder{hint}")
    if not path.endswith(".py"):
        raise ValueError(f"--config={path} is neither a Python file (.py) nor a run's config.json")
    try:
        names = runpy.run_path(os.path.abspath(path))
        if "get_config" not in names:
            raise ValueError("it has no function get_config")
        config = names["get_config"](*([arg] if colon else []))
    except MISTAKES as error:
        raise ValueError(f"--config={_describe(error, path)}") from error
    if not isinstance(config, ConfigTree):
        raise ValueError(
            f"--config={path}: get_config returns {type(config).__name__}, and must return the "
            "config that lm.config.conversion.default made"
        )
    return config


def _from_json_file(name: str) -> ConfigTree:
    path = StoragePath(expand_path(name, "--config"))
    if not path.exists():
        raise ValueError(f"--config={name}: no such file")
    try:
        return conversion.from_json(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--config={name}, line {error.lineno}: no JSON: {error.msg}") from None
    except ValueError as error:
        raise ValueError(f"--config={name}: {error}") from None


def _describe(error: BaseException, path: str) -> str:
    """An error in the config file `path` as one line: file, line number and message."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if f.filename == os.path.abspath(path)]
    if isinstance(error, SyntaxError) and error.filename == os.path.abspath(path):
        lines, text = [error.lineno], error.msg
    else:
        text = str(error)
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    where = f"{path}, line {lines[-1]}" if lines else path
    return f"{where}: {kind}{' '.join(text.split())}"
