"""A plan from a fit and a budget: parameters, tokens, learning rate, batch, loss, cost."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import minimize_scalar

from lm.scaling import intervals
from lm.scaling.artefact import Result, disagreement
from lm.scaling.intervals import Estimate
from lm.scaling.parametric import Law
from lm.scaling.table import FLOPS_PER_PARAMETER_TOKEN

SECONDS_PER_DAY = 86400.0
MAX_EXTRAPOLATION = 100.0  # times the largest FLOPs of the table
FAR = 10.0  # the distance from which on a plan warns of it


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that a run is planned for."""

    num_chips: int
    peak_flops: float  # FLOP/s of all of them
    mfu: tuple[float, float]  # model FLOPs as a part of the peak: lower and upper bound

    def flops(self, days: float) -> float:
        """Lower bound of the FLOPs in so many days."""
        return self.peak_flops * self.mfu[0] * days * SECONDS_PER_DAY

    def days(self, flops: float) -> tuple[float, float]:
        """Lower and upper bound of the days that so many FLOPs take."""
        slow, fast = (flops / (self.peak_flops * mfu * SECONDS_PER_DAY) for mfu in self.mfu)
        return fast, slow


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The run to train with a budget, by a fit."""

    flops: float
    distance: float  # flops, as a multiple of the most in the table
    parameters: Estimate
    tokens: Estimate
    epochs: float  # over the distinct tokens, if there are fewer than `tokens`
    loss: Estimate  # of one run of these parameters and tokens, with the noise of runs
    settings: dict[str, Estimate]  # learning_rate and batch_size, where the table gives a law
    other: dict[str, tuple[Estimate, Estimate]]  # parameters and tokens by approaches 1 and 2
    warnings: list[str]


def plan(
    result: Result,
    flops: float,
    *,
    unique_tokens: float | None = None,
    factor: float = FLOPS_PER_PARAMETER_TOKEN,
    max_extrapolation: float = MAX_EXTRAPOLATION,
) -> RunPlan:
    """The run of least loss with factor * parameters * tokens = flops.

    unique_tokens: the number of distinct tokens at hand; the law's R* gives the value of repeats.

    Raises:
        ValueError: the budget is more than `max_extrapolation` times the largest of the table, or
            data repeat and the fit has no R* of repeats.
    """
    most = result.data.flops[1]
    distance = flops / most
    if not np.isfinite(flops) or flops <= 0:
        raise ValueError(f"a budget of {flops:g} FLOPs: it must be finite and above 0")
    if distance > max_extrapolation:
        raise ValueError(
            f"{flops:.3g} FLOPs are {distance:.3g} times the largest run of the table "
            f"({most:.3g}), beyond --max-extrapolation={max_extrapolation:g}: nothing measured "
            f"says that the law holds there; --max-extrapolation={_above(distance):g} plans it "
            "all the same"
        )
    size, tokens = _best(result.law, flops, factor, unique_tokens)
    repeats = unique_tokens is not None and tokens > unique_tokens
    if repeats and not np.isfinite(result.law.repeats):
        raise ValueError(
            f"{tokens:.3g} tokens are best, of {unique_tokens:.3g} distinct ones, but this fit "
            "takes repeated tokens as new: fit with --repeats=fit or --repeats=15.4"
        )
    laws, level = result.laws, result.options.level
    each = [_best(law, flops, factor, unique_tokens) for law in laws.unstack()]
    sizes, counts = np.array(each).T
    losses = laws.loss(size, tokens, unique_tokens)[:, 0]
    noise = np.random.default_rng(0).standard_normal(len(losses))
    losses = losses * np.exp(result.noise * noise)
    at = {"flops": flops, "parameters": size, "tokens": tokens}
    return RunPlan(
        flops=flops,
        distance=distance,
        parameters=intervals.estimate(size, sizes, level),
        tokens=intervals.estimate(tokens, counts, level),
        epochs=tokens / unique_tokens if repeats and unique_tokens else 1.0,
        loss=intervals.estimate(result.law.loss(size, tokens, unique_tokens)[0], losses, level),
        settings={n: s.law.at(at[s.variable], level) for n, s in result.settings.items()},
        other={
            name: (found.parameters.at(flops, level), found.tokens.at(flops, level))
            for name, found in result.approaches.items()
        },
        warnings=_warnings(result, distance, size, tokens, factor),
    )


def _best(
    law: Law, flops: float, factor: float, unique_tokens: float | None
) -> tuple[float, float]:
    """(parameters, tokens) of least loss; constants are numbers."""
    size, tokens = (float(v) for v in law.optimum(flops, factor))
    if unique_tokens is None or tokens <= unique_tokens or np.isinf(law.repeats):
        return size, tokens

    def loss(log_size: float) -> float:
        n = float(np.exp(log_size))
        return float(law.loss(n, flops / factor / n, unique_tokens)[0])

    # repeated tokens are worth less than new ones, so the best size is larger, and never so large
    # that no token would be repeated
    high = np.log(flops / factor / unique_tokens)
    found = minimize_scalar(loss, bounds=(np.log(size), high), method="bounded")
    size = float(np.exp(found.x))  # pyright: ignore[reportAttributeAccessIssue]
    return size, flops / factor / size


def _warnings(
    result: Result, distance: float, size: float, tokens: float, factor: float
) -> list[str]:
    found = []
    data = result.data
    least, most = data.flops_per_parameter_token
    if not 0.8 * factor < least <= most < 1.25 * factor:
        found.append(
            f"planned with FLOPs = {factor:g} x parameters x tokens; in the table they are "
            f"{least:.2f} to {most:.2f} x, as approaches 1 and 2 see them "
            "(--flops-per-parameter-token)"
        )
    if distance > FAR:
        found.append(
            f"{distance:.3g} times the FLOPs of the largest run: intervals say what noise does to "
            "the constants, not whether the law holds so far out"
        )
    for name, value in (("parameters", size), ("tokens", tokens)):
        low, high = getattr(data, name)[0], getattr(data, name)[-1]
        if not low <= value <= high:
            by = value / high if value > high else low / value
            end = "largest" if value > high else "smallest"
            found.append(
                f"{name}: {by:.3g} times beyond the {end} of the table ({low:.3g} to {high:.3g})"
            )
    for name, setting in result.settings.items():
        if setting.kind == "as run":
            found.append(f"{name}: no sweep behind it, this is how the table's runs were set")
    # an artefact made before there were warnings of approaches does not hold them
    of_approaches = disagreement(result.approaches, result.exponents["a"])
    return list(dict.fromkeys([*found, *result.warnings, *of_approaches]))


def _above(value: float) -> float:
    """The next of 1, 2, 5, 10, ... above a value."""
    power = 10.0 ** np.floor(np.log10(value))
    return next(float(power * m) for m in (1, 2, 5, 10) if power * m >= value)
