"""The parametric law L(N, D) = E + A / N^alpha + B / D^beta and its fit.

Chinchilla's third approach (arXiv:2203.15556, section 3.3). N are parameters, D tokens, L nats per
token. With repeated data D counts for less (arXiv:2305.16264): of U distinct tokens, seen 1 + R
times, D' = U + U R* (1 - exp(-R / R*)) are worth as much as new ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
from scipy.optimize import least_squares, nnls

from lm.scaling.table import FLOPS_PER_PARAMETER_TOKEN, Table

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

HUBER_DELTA = 1e-3  # of the logarithm of the loss, as in the paper
COARSE_DELTA, MIDDLE_DELTA = 0.1, 0.01  # descents before: nearly least squares has few minima
NUM_COARSE, NUM_FINE = 8, 3  # starts of a grid that descend at COARSE_DELTA, and to the end
NAMES = ("E", "A", "alpha", "B", "beta", "repeats")
SMALLEST_EXPONENT, LARGEST_EXPONENT = 1e-3, 5.0
SMALLEST_FLOOR = 1e-4  # E as a part of the least loss, below which it is zero

Constant = np.ndarray | float


@dataclasses.dataclass(frozen=True)
class Law:
    """The constants, each a number or, for many fits at once, an array [R]."""

    E: Constant
    A: Constant
    alpha: Constant
    B: Constant
    beta: Constant
    repeats: Constant = np.inf  # R*; infinite: seen again is as good as new

    @classmethod
    def stack(cls, laws: Sequence[Law]) -> Self:
        """One Law with arrays [R] of R laws with numbers."""
        return cls(*np.array([dataclasses.astuple(law) for law in laws]).T)

    def unstack(self) -> list[Law]:
        """The R laws with numbers of one with arrays [R]."""
        columns = np.broadcast_arrays(*(getattr(self, name) for name in NAMES))
        return [Law(*row) for row in np.stack(columns, axis=1).tolist()]

    def loss(
        self, parameters: Constant, tokens: Constant, unique_tokens: Constant | None = None
    ) -> np.ndarray:
        """Nats per token, shape [..., n] of constants [...] and n runs."""
        E, A, alpha, B, beta, R = (np.asarray(getattr(self, n))[..., None] for n in NAMES)
        unique = tokens if unique_tokens is None else np.minimum(unique_tokens, tokens)
        D = np.atleast_1d(unique) * (1 + repeat_decay(np.atleast_1d(tokens / unique - 1), R))
        # by logarithms: A and N^alpha alone can be larger than any float64
        N_term = np.exp(np.log(A) - alpha * np.log(np.atleast_1d(parameters)))
        return E + N_term + np.exp(np.log(B) - beta * np.log(D))

    @property
    def parameters_exponent(self) -> Constant:
        """a of N_opt proportional to C^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def tokens_exponent(self) -> Constant:
        """b of D_opt proportional to C^b."""
        return self.alpha / (self.alpha + self.beta)

    def optimum(
        self, flops: float, factor: float = FLOPS_PER_PARAMETER_TOKEN
    ) -> tuple[np.ndarray, np.ndarray]:
        """(parameters, tokens) of least loss with factor * N * D = flops, every token new."""
        alpha, beta = np.asarray(self.alpha), np.asarray(self.beta)
        log_G = (np.log(alpha * self.A) - np.log(beta * self.B)) / (alpha + beta)
        log_C = np.log(flops / factor)
        return (
            np.exp(log_G + self.parameters_exponent * log_C),
            np.exp(-log_G + self.tokens_exponent * log_C),
        )


@dataclasses.dataclass(frozen=True)
class Fit:
    """The law of least Huber loss for a table of n runs."""

    law: Law
    objective: float  # the sum of Huber losses
    residuals: np.ndarray  # float64 [n]: log loss minus the law's
    at_bound: bool  # E is zero for these runs, or an exponent ended at its bound
    num_starts: int


def starts_grid() -> np.ndarray:
    """Starts [S, 3]: (share of the least loss that is E, alpha, beta); A and B follow."""
    shares, exponents = (0.0, 0.3, 0.6, 0.9), (0.1, 0.3, 0.6, 1.2)
    return np.array(list(itertools.product(shares, exponents, exponents)))


def fit(
    table: Table,
    *,
    repeats: float | None = None,
    delta: float = HUBER_DELTA,
    starts: np.ndarray | Law | None = None,
) -> Fit:
    """Fit the law with the least sum of Huber losses of the residuals of log L.

    The residual is r = logsumexp(log E, log A - alpha log N, log B - beta log D') - log L. The
    minimum is that of the paper's L-BFGS runs, reached by `scipy.optimize.least_squares` with
    delta coming down from nearly least squares.

    repeats: R* of the law; None fits it where the table has unique_tokens, and takes every token
    as new where it has not. starts: a grid like `starts_grid`'s, or a Law near the minimum.
    """
    problem = _Problem(table, repeats)
    if isinstance(starts, Law):
        num_starts, thetas = 1, [problem.encode(starts)]
    else:
        grid = starts_grid() if starts is None else starts
        lowest = sorted(problem.starts(grid), key=problem.squared_error)[:NUM_COARSE]
        coarse = [problem.descend(theta, max(COARSE_DELTA, delta), ftol=1e-6) for theta in lowest]
        coarse.sort(key=lambda end: end.cost)
        num_starts, thetas = len(grid), [end.x for end in coarse[:NUM_FINE]]
    if delta < MIDDLE_DELTA:
        thetas = [problem.descend(theta, MIDDLE_DELTA, ftol=1e-4).x for theta in thetas]
    best = min((problem.descend(theta, delta) for theta in thetas), key=lambda end: end.cost)
    law = problem.decode(best.x)
    at_bound = best.active_mask.any() or float(law.E) < SMALLEST_FLOOR * table.loss.min()
    residuals = -problem.residuals_and_jacobian(best.x)[0]
    return Fit(law, float(best.cost), residuals, bool(at_bound), num_starts)


def repeat_decay(repeated: np.ndarray, R: np.ndarray) -> np.ndarray:
    """Fresh passes that `repeated` passes over the same tokens are worth: R* (1 - exp(-R / R*))."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(R), repeated, -R * np.expm1(-repeated / R))


class _Problem:
    """The least squares problem in theta [P] = (log E, log A', log B', alpha, beta[, log R*]).

    A' and B' belong to parameters and tokens in units of their geometric mean: A and alpha are then
    nearly independent, and a step in one needs no step in the other.
    """

    def __init__(self, table: Table, repeats: float | None) -> None:
        """repeats: R*; None: the last entry of theta."""
        log_N, log_D = np.log(table.parameters), np.log(table.tokens)
        unique = table.tokens
        if table.unique_tokens is not None:
            unique = np.minimum(table.unique_tokens, table.tokens)
        self.repeats = np.inf if table.unique_tokens is None else repeats
        self.again = table.tokens / unique - 1  # [n] times that tokens are seen again
        self.x_mean, self.y_mean = float(log_N.mean()), float(log_D.mean())
        self.x = log_N - self.x_mean  # [n]
        self.y = log_D - np.log1p(self.again) - self.y_mean  # [n], of distinct tokens
        self.log_loss = np.log(table.loss)  # [n]
        least, exponents = self.log_loss.min(), (SMALLEST_EXPONENT, LARGEST_EXPONENT)
        terms = (least - 30, least + 10)
        bounds = [(least - 14, least + 5), terms, terms, exponents, exponents]
        if self.repeats is None:
            bounds.append((np.log(1e-2), np.log(1e4)))
        self.low, self.high = np.array(bounds).T  # [P]

    def encode(self, law: Law) -> np.ndarray:
        """theta [P] of a law."""
        theta = [
            np.log(max(float(law.E), 1e-300)),
            np.log(law.A) - law.alpha * self.x_mean,
            np.log(law.B) - law.beta * self.y_mean,
            law.alpha,
            law.beta,
        ]
        theta += [np.log(law.repeats)] * (self.repeats is None)
        return np.clip(theta, self.low, self.high)

    def decode(self, theta: np.ndarray) -> Law:
        e, a, b, alpha, beta = (float(value) for value in theta[:5])
        repeats = float(np.exp(theta[5])) if self.repeats is None else self.repeats
        A, B = np.exp([a + alpha * self.x_mean, b + beta * self.y_mean]).tolist()
        return Law(float(np.exp(e)), A, alpha, B, beta, repeats)

    def starts(self, grid: np.ndarray) -> list[np.ndarray]:
        """theta [P] of each point of a grid [S, 3], with A' and B' by least squares on the loss."""
        loss = np.exp(self.log_loss)
        least, fresh, found = loss.min(), self.y + np.log1p(self.again), []
        for share, alpha, beta in grid:
            terms = np.stack([np.exp(-alpha * self.x), np.exp(-beta * fresh)], axis=1)
            A, B = np.maximum(nnls(terms, loss - share * least)[0], 1e-3 * least)
            theta = [np.log(max(share, 1e-3) * least), np.log(A), np.log(B), alpha, beta]
            theta += [np.log(10.0)] * (self.repeats is None)
            found.append(np.clip(theta, self.low, self.high))
        return found

    def residuals_and_jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log loss of the law minus that of the runs [n], its derivatives [n, P])."""
        e, a, b, alpha, beta = theta[:5]
        R = np.exp(theta[5]) if self.repeats is None else np.asarray(self.repeats)
        decay = repeat_decay(self.again, R)
        y = self.y + np.log1p(decay)
        z = np.stack(np.broadcast_arrays(e, a - alpha * self.x, b - beta * y))
        log_loss = np.logaddexp.reduce(z)
        p = np.exp(z - log_loss)  # the terms as parts of the loss
        columns = [p[0], p[1], p[2], -p[1] * self.x, -p[2] * y]
        if self.repeats is None:
            q = self.again / R
            d_decay = R * (1 - np.exp(-q) * (1 + q))  # by log R*
            columns.append(-p[2] * beta * d_decay / (1 + decay))
        return log_loss - self.log_loss, np.stack(columns, axis=-1)

    def squared_error(self, theta: np.ndarray) -> float:
        return float(np.square(self.residuals_and_jacobian(theta)[0]).sum())

    def descend(self, theta: np.ndarray, delta: float, ftol: float = 1e-11) -> OptimizeResult:
        """The minimum near theta: `x` [P], the sum of Huber losses `cost`, `active_mask` [P]."""
        return least_squares(
            lambda at: self.residuals_and_jacobian(at)[0],
            theta,
            jac=lambda at: self.residuals_and_jacobian(at)[1],  # pyright: ignore[reportArgumentType]
            bounds=(self.low, self.high),
            x_scale="jac",
            loss="huber",
            f_scale=delta,
            ftol=ftol,
            xtol=1e-11,
            gtol=1e-14,
        )
