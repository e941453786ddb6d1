"""The analysis of a table of runs, from the fit of each law to the artefact.

table, source = read("docs/ladder.csv", counting="total")
result = analyse(table, source)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lm.scaling import frontier, intervals, parametric, settings
from lm.scaling.artefact import (
    Data,
    FrontierEstimate,
    HeldOut,
    LawEstimate,
    Options,
    Result,
    Setting,
    disagreement,
    rounded,
)
from lm.scaling.parametric import NAMES, Fit, Law
from lm.scaling.powers import Power, fit_power
from lm.scaling.table import Points, Source, Table, check, groups, means

NATS_PER_BIT = math.log(2)
OUTLYING = 6  # times the spread of runs, beyond which a run is no noise
MISFIT = 0.03  # noise in log loss above which the law hardly describes the table


def analyse(table: Table, source: Source, options: Options | None = None) -> Result:
    """Fit all laws to a table that `read` has checked.

    Raises:
        ValueError: the rows cannot tell the constants, or their losses are in two units.
    """
    o = options or Options()
    names = NAMES[: 6 if o.fits_repeats else 5]
    best = table.best()
    _check(best, o)
    rng = np.random.default_rng(o.seed)
    fit, replicates, noise = _fit(best, o, rng)
    laws = Law.stack([each.law for each in replicates])
    estimates = {
        name: intervals.estimate(getattr(fit.law, name), getattr(laws, name), o.level)
        for name in (*names, "parameters_exponent", "tokens_exponent")
    }
    tables = [best, *intervals.wild(best, fit, o.num_replicates, rng)]
    envelope = _frontier([frontier.envelope(each) for each in tables], o.level)
    isoflop = _frontier([frontier.isoflop(each, fit.law) for each in tables], o.level)
    exponents = {"a": estimates["parameters_exponent"], "b": estimates["tokens_exponent"]}
    return Result(
        counting=table.counting,
        options=o,
        data=_describe(table, best, source),
        constants={name: estimates[name] for name in names},
        exponents=exponents,
        replicates=rounded(np.stack([getattr(laws, n) for n in names], axis=1)),
        noise=noise,
        objective=fit.objective,
        num_starts=fit.num_starts,
        warnings=[
            *_warnings(best, fit, replicates, noise),
            *disagreement({"envelope": envelope, "isoflop": isoflop}, exponents["a"]),
        ],
        envelope=envelope,
        isoflop=isoflop,
        settings=_settings(table, noise, o, rng),
        held_out=_hold_out(best, o, rng),
    )


def _check(table: Table, o: Options) -> None:
    check(table, num_constants=6 if o.fits_repeats else 5)
    repeated = table.unique_tokens is not None and (table.tokens > table.unique_tokens).any()
    if (o.fits_repeats or o.repeats is not None) and not repeated:
        raise ValueError(
            f"none of {len(table)} rows has fewer unique_tokens than tokens: there is no repeated "
            "data to correct for"
        )


def _fit(table: Table, o: Options, rng: np.random.Generator) -> tuple[Fit, list[Fit], float]:
    """(the fit, those of all replicates, the noise)."""
    repeats = None if o.fits_repeats else (np.inf if o.repeats is None else o.repeats)
    fit = parametric.fit(table, repeats=repeats, delta=o.delta)
    _check_units(table, fit)
    return fit, *intervals.bootstrap(
        table, fit, repeats=repeats, delta=o.delta, num=o.num_replicates, rng=rng
    )


def _hold_out(table: Table, o: Options, rng: np.random.Generator) -> HeldOut | None:
    """The largest size by the law of the others; None where these are too few."""
    largest = table.sizes() == table.sizes().max()
    rest, held = table.take(~largest), table.take(largest)
    try:
        _check(rest, o)
    except ValueError:
        return None
    fit, replicates, noise = _fit(rest, o, rng)
    runs = (held.parameters, held.tokens, held.unique_tokens)
    middle = fit.law.loss(*runs)  # [n]
    around = Law.stack([each.law for each in replicates]).loss(*runs)  # [R, n]
    around = around * np.exp(noise * rng.standard_normal(around.shape))
    predicted = [intervals.estimate(m, around[:, i], o.level) for i, m in enumerate(middle)]
    errors = middle / held.loss - 1
    return HeldOut(
        parameters=float(held.parameters[0]),
        flops_distance=float(held.flops.max() / rest.flops.max()),
        tokens=held.tokens.tolist(),
        measured=held.loss.tolist(),
        predicted=predicted,
        mean_error=float(errors.mean()),
        largest_error=float(errors[np.argmax(np.abs(errors))]),
        num_inside=sum(
            bool(p.low <= v <= p.high) for p, v in zip(predicted, held.loss, strict=True)
        ),
    )


def _frontier(found: Sequence[Points], level: float) -> FrontierEstimate:
    columns = ("flops", "parameters", "tokens", "loss")
    return FrontierEstimate(
        points={name: rounded(getattr(found[0], name)) for name in columns},
        parameters=_law([fit_power(f.flops, f.parameters) for f in found], level),
        tokens=_law([fit_power(f.flops, f.tokens) for f in found], level),
    )


def _settings(
    table: Table, noise: float, o: Options, rng: np.random.Generator
) -> dict[str, Setting]:
    tables = [table, *intervals.draw(table, noise, o.num_replicates, rng)]
    result = {}
    for name in ("learning_rate", "batch_size"):
        if getattr(table, name) is not None:
            found = [settings.optima(each, name, o.variable) for each in tables]
            result[name] = Setting(
                kind=found[0].kind,
                variable=o.variable,
                points={"x": rounded(found[0].x), "best": rounded(found[0].best)},
                at_edge=found[0].at_edge,
                law=_law([fit_power(f.x, f.best) for f in found], o.level),
            )
    return result


def _law(found: Sequence[Power], level: float) -> LawEstimate:
    """The first of the laws, with intervals by the others."""
    pairs = np.array(found)  # [1 + R, 2]
    coefficient, exponent = (intervals.estimate(x[0], x[1:], level) for x in pairs.T)
    return LawEstimate(coefficient, exponent, rounded(pairs[1:]))


def _check_units(table: Table, fit: Fit) -> None:
    """Raise ValueError where some losses are off by the factor between bits and nats."""
    size = np.abs(fit.residuals)
    off = np.abs(size + math.log(NATS_PER_BIT)) < 0.1
    if np.median(size) < 0.1 and off.any():
        i = int(np.flatnonzero(off)[0])
        factor = math.exp(fit.residuals[i])
        raise ValueError(
            f"the loss of row {table.rows[i]} ({table.loss[i]:.4g}) is {factor:.3f} times what the "
            f"other rows say ({table.loss[i] / factor:.4g}), as {int(off.sum())} of {len(table)} "
            f"rows: a bit is {NATS_PER_BIT:.4f} nats, a factor of {1 / NATS_PER_BIT:.3f} or "
            f"{NATS_PER_BIT:.3f}; losses must all be nats per token"
        )


def _warnings(table: Table, fit: Fit, replicates: Sequence[Fit], noise: float) -> list[str]:
    found = []
    at_bound = np.mean([each.at_bound for each in replicates])
    if fit.at_bound:
        found.append(
            "a constant ended at its bound: these runs do not tell E from 0, or an exponent from "
            "its limits"
        )
    elif at_bound > 0.05:
        found.append(
            f"in {at_bound:.0%} of the replicates a constant ended at its bound: these runs hardly "
            "tell E from 0, and single constants mean little"
        )
    if noise > MISFIT:
        found.append(
            f"runs lie {noise:.1%} around the law: it does not describe them well, and the "
            "intervals do not include what it leaves out"
        )
    found += _outliers(table, fit.residuals)
    ratio = table.flops_ratio()
    if ratio.max() > 1.5 * ratio.min():
        found.append(
            f"FLOPs are {ratio.min():.2f} to {ratio.max():.2f} x parameters x tokens: the size of "
            "least loss depends on how FLOPs are counted"
        )
    return found


def _outliers(table: Table, residuals: np.ndarray) -> list[str]:
    """A sentence about the run that is too far from the law to be noise, if there is one.

    The spread of the others is 1.48 times the median of absolute residuals, a robust estimate of
    the standard deviation of Gaussian noise.
    """
    size = np.abs(residuals)
    spread = 1.4826 * float(np.median(size))
    i = int(size.argmax())
    if size[i] <= max(OUTLYING * spread, 1e-3):
        return []
    many = int((size > OUTLYING * spread).sum())
    others = f"; {many} runs in all lie further out than {OUTLYING}" if many > 1 else ""
    return [
        f"row {table.rows[i]} ({table.parameters[i]:.3g} parameters, "
        f"{table.tokens[i]:.3g} tokens) lies {np.expm1(residuals[i]):+.1%} from the law, "
        f"{size[i] / spread:.0f} times the spread of runs{others}: look at it, the law "
        "describes only what the runs have in common"
    ]


def _describe(table: Table, best: Table, source: Source) -> Data:
    def extremes(values: np.ndarray) -> list[float]:
        return [float(values.min()), float(values.max())]

    return Data(
        **dataclasses.asdict(source),
        num_fitted=len(best),
        num_other_settings=len(table) - len(best),
        parameters=means(best.parameters, best.sizes()).tolist(),
        tokens=means(best.tokens, groups(best.tokens)).tolist(),
        flops=extremes(best.flops),
        loss=extremes(best.loss),
        flops_per_parameter_token=extremes(best.flops_ratio()),
    )
