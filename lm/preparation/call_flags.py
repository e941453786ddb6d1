"""Flags that name a function and its arguments: 'NAME KEY=VALUE KEY=VALUE'.

The signature of the function states what there is, and the defaults.
"""

import ast
import inspect
import shlex
from collections.abc import Callable, Collection, Sequence
from typing import Any

from lm.config.suggestions import suggestion


def split(text: str, flag: str) -> tuple[str, list[str]]:
    """Return the name, "" if there is none, and the words after it. Raises ValueError."""
    try:
        words = shlex.split(text)
    except ValueError as error:  # of quotes
        raise ValueError(f"{flag}: {error}") from None
    name = words.pop(0) if words and "=" not in words[0] else ""
    return name, words


def signature(function: Callable[..., Any], hidden: Collection[str] = ()) -> inspect.Signature:
    """Return the signature of a function without parameters that no flag may give."""
    known = inspect.signature(function).parameters.values()
    return inspect.Signature([p for p in known if p.name not in hidden])


def arguments(known: inspect.Signature, words: Sequence[str], flag: str) -> dict[str, Any]:
    """Return the arguments of words KEY=VALUE.

    Raises:
        ValueError: for an unknown key, a value of another type than the default, a missing one.
    """
    given = {}
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in known.parameters.values()):
        raise ValueError(f"{flag}: {known} must name its parameters, and give them defaults")
    for key, is_pair, value in (word.partition("=") for word in words):
        if not is_pair and key in known.parameters:
            raise ValueError(f"{flag}: write {key}=...")
        if not is_pair or key not in known.parameters:
            names = f"{', '.join(known.parameters)}{suggestion(key, known.parameters)}"
            raise ValueError(f"{flag}: {key!r} is no parameter KEY=VALUE; there are: {names}")
        given[key] = _value(value, known.parameters[key], f"{flag}: {key}")
    needed = [key for key, p in known.parameters.items() if p.default is p.empty]
    if missing := [f"{key}=..." for key in needed if key not in given]:
        raise ValueError(f"{flag}: {', '.join(missing)} must be given")
    return given


def _value(text: str, parameter: inspect.Parameter, path: str) -> Any:
    """Return a value of the type of the default; where that is None or missing, as annotated."""
    default, annotation = parameter.default, str(parameter.annotation)
    has_none = default is None or default is parameter.empty
    if has_none and ("list" in annotation or "tuple" in annotation):
        return tuple(text.split(","))
    if isinstance(default, str) or (has_none and "str" in annotation):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if type(value) is int and (isinstance(default, float) or "float" in annotation):
        value = float(value)
    is_float = type(value) is float and "float" in annotation
    wanted = int if has_none else type(default)
    if type(value) is wanted or is_float or (value is None and "None" in annotation):
        return value
    raise ValueError(f"{path}={text} is no {wanted.__name__} such as {8 if has_none else default}")
