"""The space of a sweep: axes of config keys, their grid, and random points.

optimizer.learning_rate=1e-3,2e-3,4e-3      these
optimizer.learning_rate=1e-4..1e-2:log      a range, uniform in the logarithm
model.num_layers=2..8                       a range of whole numbers
config=configs/ladder.py:2,configs/ladder.py:3   the key `config` is the file itself
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from lm.config import command_line, conversion
from lm.telemetry.metrics import short_names

LONGEST = 200  # bytes of a folder's name: file systems take 255, and a search puts a number first
CONFIG = "config"  # the axis that is no key of a config, but the config's file

Point: TypeAlias = dict[str, object]  # the values of a run's keys


@dataclasses.dataclass(frozen=True)
class Choice:
    """A key and the values that it may have."""

    key: str
    values: tuple[object, ...]

    def sample(self, rng: np.random.Generator) -> object:
        return self.values[int(rng.integers(len(self.values)))]


@dataclasses.dataclass(frozen=True)
class Range:
    """A key and its least and largest value, whole numbers if both are.

    The points of a random sweep are not stored but drawn again from its seed: `sample` must not
    depend on a library's version.
    """

    key: str
    low: float
    high: float
    log: bool

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def values(self) -> tuple[float, float]:
        """The ends."""
        return self.low, self.high

    def sample(self, rng: np.random.Generator) -> float:
        if self.is_whole and not self.log:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if not self.log:
            return round_to_4_significant(float(rng.uniform(self.low, self.high)))
        # each whole number has the part of the logarithm that rounds to it
        margin = 0.5 if self.is_whole else 0.0
        x = math.exp(rng.uniform(math.log(self.low - margin), math.log(self.high + margin)))
        if self.is_whole:
            return round(min(max(x, self.low), self.high))
        return round_to_4_significant(x)


Axis: TypeAlias = Choice | Range


def round_to_4_significant(x: float) -> float:
    """Round to four digits, which are enough to tell runs apart and short enough for a name."""
    return float(f"{x:.4g}")


def parse(text: str) -> Axis:
    """The axis that KEY=VALUES names; ValueError if it names none."""
    key, equals, values = text.partition("=")
    key = key if key == CONFIG else key.removeprefix("config.")
    if not (key and equals and values):
        raise ValueError(f"{text!r} is not KEY=VALUE,VALUE or KEY=LOW..HIGH[:log]")
    span, _, scale = values.partition(":")
    low, dots, high = span.partition("..")
    if dots and key != CONFIG:
        low, high = _value(low), _value(high)
        if not (isinstance(low, int | float) and isinstance(high, int | float) and low < high):
            raise ValueError(f"{text!r}: a range is LOW..HIGH, numbers, the lower one first")
        if scale not in ("", "log"):
            raise ValueError(f"{text!r}: a range is uniform, or :log; not {scale!r}")
        if scale == "log" and low <= 0:
            raise ValueError(f"{text!r}: the logarithm needs a positive LOW, got {low}")
        return Range(key, low, high, log=scale == "log")
    found = tuple(_value(part) if key != CONFIG else part for part in _split(values))
    if len(set(map(str, found))) < len(found):  # a flag is a text
        raise ValueError(f"{text!r} has a value twice")
    return Choice(key, found)


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _split(text: str) -> list[str]:
    """Parts between the commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def check_config(config: str, axes: Sequence[Axis], settings: Sequence[str]) -> None:
    """Set every value of every axis in the configs of the sweep, before any run starts.

    A key may be one of a component that only some runs have: one config that has it is enough.

    Raises:
        ValueError: two axes have the same key, a config can't be read, or values can't be set, with
            all of them.
    """
    for key, count in Counter(axis.key for axis in axes).items():
        if count > 1:
            raise ValueError(f"two axes are of the key {key}")
    named = [a for a in axes if a.key == CONFIG or conversion.is_name(a.key)]
    values = [(a.key, value) for a in axes if a not in named for value in a.values]
    faults: list[dict[str, str]] = []  # of each config, by setting
    for point in grid(named):
        given = [s.removeprefix("--config.").replace("{fold}", "0") for s in settings]
        given += [f"{key}={value}" for key, value in point.items() if key != CONFIG]
        tree = command_line.read(str(point.get(CONFIG, config)), given)
        faults.append({})
        for key, value in values:
            try:
                conversion.assign(tree, f"{key}={value}")
            except ValueError as error:
                faults[-1].setdefault(f"{key}={value}", str(error))
    always = [fault for text, fault in faults[0].items() if all(text in found for found in faults)]
    if always:
        lines = "\n  ".join(dict.fromkeys(always))
        raise ValueError(f"no run can have these values of axes:\n  {lines}")


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Every combination of the values, one empty point without axes; ValueError for a range."""
    for axis in axes:
        if isinstance(axis, Range):
            raise ValueError(f"a grid needs the values of {axis.key}, not a range")
    keys = [axis.key for axis in axes]
    values = [axis.values for axis in axes if isinstance(axis, Choice)]
    return [dict(zip(keys, point, strict=True)) for point in itertools.product(*values)]


def random_points(axes: Sequence[Axis], count: int, seed: int) -> list[Point]:
    """`count` different points, the first n the same for every larger count; ValueError where there
    are not so many.
    """
    points: list[Point] = []
    for index in range(100 * count):
        rng = np.random.default_rng([seed, index])
        point = {axis.key: axis.sample(rng) for axis in axes}
        if point not in points:
            points.append(point)
        if len(points) == count:
            return points
    raise ValueError(f"only {len(points)} of {count} random points differ: give a larger space")


def with_seeds_and_folds(points: Sequence[Point], seeds: int, folds: int) -> list[Point]:
    """Every point with each seed and fold (keys `seed` and `fold`), where there are several."""
    counts = {"fold": folds, "seed": seeds}
    axes = [Choice(key, tuple(range(count))) for key, count in counts.items() if count > 1]
    return [point | more for point in points for more in grid(axes)]


def name(point: Mapping[str, object]) -> str:
    """The name of a point's folder, that of no other point."""
    short = short_names(list(point), ".")
    text = ",".join(f"{short[key]}={value}" for key, value in point.items()) or "run"
    return folder_name(text, repr(list(point.items())))


def folder_name(text: str, identity: str = "") -> str:
    """A legal folder name of at most LONGEST bytes for `text`.

    Where letters are replaced or cut, it ends with a hash of `identity`, by default the text.
    """
    kept = "".join(c if c.isalnum() or c in "=,.-_+" else "_" for c in text)
    if kept == text and len(text.encode()) <= LONGEST:
        return text
    digest = hashlib.blake2b((identity or text).encode(), digest_size=4).hexdigest()
    cut = kept.encode()[: LONGEST - len(digest) - 1].decode(errors="ignore")
    return f"{cut}-{digest}"


def arguments(config: str, point: Mapping[str, object], settings: Sequence[str]) -> list[str]:
    """The flags of scripts/train.py for a point; `{fold}` in the settings becomes its fold."""
    fold = point.get("fold")
    given = [s if fold is None else s.replace("{fold}", str(fold)) for s in settings]
    own = [f"--config.{k}={v}" for k, v in point.items() if k not in (CONFIG, "fold")]
    return [f"--config={point.get(CONFIG, config)}", *given, *own]
