"""Fields of config sections: default, sentence of --explain, and the values that they take."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from lm.config.components import Evaluation, Task
from lm.config.suggestions import suggestion

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of finite numbers, and the values `also`, which have meanings of their own."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    also: tuple[float, ...] = ()

    def __contains__(self, x: float) -> bool:
        return x in self.also or (
            math.isfinite(x)
            and (self.ge is None or x >= self.ge)
            and (self.gt is None or x > self.gt)
            and (self.le is None or x <= self.le)
            and (self.lt is None or x < self.lt)
        )

    def __str__(self) -> str:
        """The end of a sentence: "at least 1, or -1", "in [0, 1)"."""
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if low is None and high is None:
            return "finite"
        if self.ge is not None and self.ge == self.le:
            text = f"{low}"
        elif high is None:
            text = f"{'above' if self.ge is None else 'at least'} {low}"
        elif low is None:
            text = f"{'below' if self.le is None else 'at most'} {high}"
        else:
            brackets = ("(" if self.ge is None else "["), (")" if self.le is None else "]")
            text = f"in {brackets[0]}{low}, {high}{brackets[1]}"
        return ", or ".join([text, *map(str, self.also)])


def field(
    default: Any,
    sentence: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    also: tuple[float, ...] = (),
    choices: Iterable[str] = (),
) -> Any:
    """A dataclass field with the sentence that `--explain` prints and its valid values.

    ge, gt, le, lt, also: the `Range` of every number in it; gt=-math.inf: any finite number.
    choices: the valid texts; none: any.
    """
    metadata = {"help": sentence, "choices": tuple(choices)}
    if (ge, gt, le, lt) != (None, None, None, None):
        if gt == -math.inf:
            gt = None
        metadata["range"] = Range(ge, gt, le, lt, also)
    if isinstance(default, dict):
        make = functools.partial(dict, default)
        return dataclasses.field(default_factory=make, metadata=metadata, hash=False)
    return dataclasses.field(default=default, metadata=metadata)


def is_section(value: object) -> TypeGuard[DataclassInstance]:
    """True for a frozen config."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def check_values(config: DataclassInstance, path: str) -> None:
    """Raises ValueError, with its path below `path`, for a number of a frozen config or its
    sections that is outside of its range, NaN or infinite, and for a text that is no choice.
    """
    for f in dataclasses.fields(config):
        check_value(getattr(config, f.name), f.metadata, f"{path}.{f.name}")


def check_value(value: object, metadata: Mapping[str, Any], path: str) -> None:
    """Check one field's value, as `check_values` does."""
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, Task | Evaluation):
        check_values(value.config, path)
    elif is_section(value):
        check_values(value, path)
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_value(inner, metadata, f"{path}.{key}")
    elif isinstance(value, tuple):
        for i, inner in enumerate(value):
            check_value(inner, metadata, f"{path}[{i}]")
    elif isinstance(value, int | float) and value not in (bounds := metadata.get("range", Range())):
        raise ValueError(f"{path} ({value}) must be {bounds}")
    elif isinstance(value, str) and value not in (choices := metadata.get("choices") or (value,)):
        known = f"{', '.join(choices)}{suggestion(value, choices)}"
        raise ValueError(f"{path} ({value!r}) must be one of {known}")
