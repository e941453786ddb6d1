"""The artefact of a fit: data, method, constants and intervals, as one JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lm.scaling import intervals, parametric
from lm.scaling.intervals import Estimate
from lm.scaling.parametric import Constant, Law
from lm.scaling.powers import Power
from lm.scaling.table import Source

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 1
# The bootstrap behind the intervals of the constants.
BOOTSTRAPS = {
    "cases": "runs drawn with replacement",
    "noise": "Gaussian noise drawn around the law",  # of artefacts that do not name theirs
}
FEW_BUDGETS = 4  # below which a power law through minima rests on single ones
# Interval of an exponent that tells little: of N_opt by 2.5 times in 100 times the FLOPs.
WIDE = 0.2
NUM_DIGITS = 7  # of what is written for each replicate and point

JsonTree: TypeAlias = "dict[str, JsonTree] | list[JsonTree] | str | float | None"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an analysis."""

    delta: float = parametric.HUBER_DELTA
    repeats: float | None = None  # R* of repeated data; None: seen again is as good as new
    fits_repeats: bool = False  # R* is a constant of the fit
    level: float = 0.9  # of the intervals
    num_replicates: int = 400
    seed: int = 0
    variable: str = "flops"  # of the laws of learning rate and batch size


@dataclasses.dataclass(frozen=True)
class LawEstimate:
    """A power law, with the coefficient and exponent of every replicate."""

    coefficient: Estimate
    exponent: Estimate
    replicates: list[list[float]]  # [R][2]; NaN where a replicate had none

    def at(self, x: float, level: float) -> Estimate:
        """The law's value at x with its interval."""
        value = Power(self.coefficient.value, self.exponent.value).at(x)
        replicates = Power(*np.array(self.replicates).T).at(x)
        return intervals.estimate(float(value), np.asarray(replicates), level)


@dataclasses.dataclass(frozen=True)
class FrontierEstimate:
    """Approach 1 or 2: the best runs of each budget, and N_opt and D_opt as powers of FLOPs."""

    points: dict[str, list[float]]  # flops, parameters, tokens, loss
    parameters: LawEstimate
    tokens: LawEstimate


@dataclasses.dataclass(frozen=True)
class Setting:
    """The law of the best learning rate or batch size."""

    kind: str  # see settings.Optima
    variable: str
    points: dict[str, list[float]]  # x, best
    at_edge: int
    law: LawEstimate


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The runs of the largest size, predicted by the law of all smaller ones."""

    parameters: float
    flops_distance: float  # most FLOPs held out, as a multiple of the most that were fitted
    tokens: list[float]
    measured: list[float]
    predicted: list[Estimate]  # of one run, with the noise of runs
    mean_error: float  # mean of predicted / measured - 1
    largest_error: float  # the one farthest from 0
    num_inside: int  # measured losses within their interval


@dataclasses.dataclass(frozen=True)
class Data(Source):
    """The fitted runs: where they are from, and their sizes, token counts and extremes."""

    num_fitted: int
    num_other_settings: int  # runs at other than the best setting of their size and tokens
    parameters: list[float]  # ascending
    tokens: list[float]  # ascending
    flops: list[float]  # [least, most], as the two below
    loss: list[float]
    flops_per_parameter_token: list[float]


@dataclasses.dataclass(frozen=True)
class Result:
    """The artefact. `counting` says what N counts; losses are in nats per token."""

    counting: str
    options: Options
    data: Data
    constants: dict[str, Estimate]
    exponents: dict[str, Estimate]  # a and b of N_opt ~ C^a and D_opt ~ C^b
    replicates: list[list[float]]  # [R][constants]
    noise: float  # standard deviation of log loss around the law
    objective: float
    num_starts: int
    warnings: list[str]
    envelope: FrontierEstimate
    isoflop: FrontierEstimate
    settings: dict[str, Setting]
    held_out: HeldOut | None
    bootstrap: str = "cases"  # a key of BOOTSTRAPS
    format: int = FORMAT
    loss_unit: str = "nats per token"

    @property
    def law(self) -> Law:
        return self._law({name: e.value for name, e in self.constants.items()})

    @property
    def laws(self) -> Law:
        """The constants of all replicates, [R]."""
        return self._law(dict(zip(self.constants, np.array(self.replicates).T, strict=True)))

    @property
    def approaches(self) -> dict[str, FrontierEstimate]:
        return {"envelope": self.envelope, "isoflop": self.isoflop}

    @property
    def factor(self) -> float:
        """FLOPs for each parameter and token in the table: the geometric mean of the extremes."""
        least, most = self.data.flops_per_parameter_token
        return math.sqrt(least * most)

    def optimum(self, flops: float) -> tuple[Estimate, Estimate]:
        """The law's best parameters and tokens of a budget, every token new."""
        values, replicates = (law.optimum(flops, self.factor) for law in (self.law, self.laws))
        size, tokens = (
            intervals.estimate(float(value), each, self.options.level)
            for value, each in zip(values, replicates, strict=True)
        )
        return size, tokens

    def _law(self, constants: Mapping[str, Constant]) -> Law:
        fixed = np.inf if self.options.repeats is None else self.options.repeats
        return Law(**{"repeats": fixed, **constants})


def disagreement(found: Mapping[str, FrontierEstimate], law: Estimate) -> list[str]:
    """Sentences about approaches whose exponent of N_opt rests on little, or is not the law's."""
    warnings = []
    for name, approach in found.items():
        a, budgets = approach.parameters.exponent, len(approach.points["flops"])
        if not np.isfinite(a.value):
            continue  # the page says so
        said = f"{name}: N_opt ~ C^{a.value:.3f}"
        if budgets < FEW_BUDGETS:
            warnings.append(
                f"{said} rests on {budgets} budgets: one run more or less may change it"
            )
        if not np.isfinite(a.low):
            warnings.append(f"{said} has no interval: most replicates tell no exponent")
        elif a.high - a.low > WIDE:
            warnings.append(f"{said} may be {a.low:.3f} to {a.high:.3f}: it tells little")
        elif a.high < law.low or law.high < a.low:
            warnings.append(
                f"{said} [{a.low:.3f}, {a.high:.3f}], but the law says {law.value:.3f} "
                f"[{law.low:.3f}, {law.high:.3f}]: the two disagree about the best size"
            )
    return warnings


def to_json(value: DataclassInstance, indent: int | None = None) -> str:
    """JSON of a result or a plan, with null for what JSON has no number for."""
    tree = _with_nulls(dataclasses.asdict(value))
    return json.dumps(tree, indent=indent, allow_nan=False) + "\n"


def from_json(text: str, name: str = "the file") -> Result:
    """The Result that `to_json` wrote; ValueError if it is something else, or of another format."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    if not isinstance(tree, dict) or "constants" not in tree or tree["format"] != FORMAT:
        raise ValueError(f"{name} is no artefact of scripts/fit_scaling_law.py, format {FORMAT}")
    return _from_tree(Result, {"bootstrap": "noise", **tree})


def _from_tree(kind: Any, tree: Any) -> Any:
    """A tree of JSON as a value of a type: a dataclass, a list, a dict, a number or a text."""
    if kind is float:
        return np.nan if tree is None else tree
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{key: _from_tree(hints[key], value) for key, value in tree.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return [_from_tree(args[0], value) for value in tree]
    if origin is dict:
        return {key: _from_tree(args[1], value) for key, value in tree.items()}
    if origin is types.UnionType and tree is not None:  # T | None
        return _from_tree(args[0], tree)
    return tree


def rounded(values: np.ndarray) -> list:
    """Nested lists of numbers with NUM_DIGITS significant digits."""
    return np.vectorize(lambda x: float(f"{x:.{NUM_DIGITS}g}"), otypes=[float])(values).tolist()


def _with_nulls(tree: JsonTree) -> JsonTree:
    if isinstance(tree, dict):
        return {key: _with_nulls(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_with_nulls(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
