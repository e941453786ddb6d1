"""The parametric law L(N, D) = E + A / N^alpha + B / D^beta: its meaning and its fit.

Chinchilla's third approach (arXiv:2203.15556, section 3.3). N are parameters, D tokens, L nats per
token. With repeated data D counts for less (arXiv:2305.16264): of U distinct tokens, seen 1 + R
times, D' = U + U R* (1 - exp(-R / R*)) are worth as much as new ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from lm.scaling.table import FLOPS_PER_PARAMETER_TOKEN, Table

HUBER_DELTA = 1e-3  # of the logarithm of the loss, as in the paper
DESCENTS = (0.1, 0.01)  # deltas to go through first: nearly least squares has few minima
KEPT = 8  # starts that go on after the first of them
NAMES = ("E", "A", "alpha", "B", "beta", "repeats")
LARGEST_EXPONENT = 5.0
SMALLEST_EXPONENT = 1e-3


@dataclasses.dataclass(frozen=True)
class Law:
    """The constants, each a number or, for many fits at once, an array [R]."""

    E: np.ndarray | float
    A: np.ndarray | float
    alpha: np.ndarray | float
    B: np.ndarray | float
    beta: np.ndarray | float
    repeats: np.ndarray | float = np.inf  # R*; infinite: seen again is as good as new

    def loss(
        self,
        parameters: np.ndarray | float,
        tokens: np.ndarray | float,
        unique_tokens: np.ndarray | float | None = None,
    ) -> np.ndarray:
        """Nats per token, shape [..., n] of constants [...] and n runs."""
        E, A, alpha, B, beta, R = (np.asarray(getattr(self, n))[..., None] for n in NAMES)
        unique = tokens if unique_tokens is None else np.minimum(unique_tokens, tokens)
        D = np.atleast_1d(unique) * (1 + _worth(np.atleast_1d(tokens / unique - 1), R))
        # by logarithms: A and N^alpha alone can be larger than any float64
        N_term = np.exp(np.log(A) - alpha * np.log(np.atleast_1d(parameters)))
        return E + N_term + np.exp(np.log(B) - beta * np.log(D))

    @property
    def parameters_exponent(self) -> np.ndarray | float:
        """a of N_opt proportional to C^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def tokens_exponent(self) -> np.ndarray | float:
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
    """Fits of the law to R vectors of losses for the same runs."""

    law: Law  # constants [R]
    objective: np.ndarray  # float64 [R]: the sum of Huber losses
    residuals: np.ndarray  # float64 [R, n]: log loss minus the law's
    at_bound: np.ndarray  # bool [R]: E is zero for these runs, or an exponent ended at its bound
    num_starts: int

    def one(self, i: int = 0) -> Law:
        """The Law of one of the fits, its constants numbers."""
        return Law(**{n: float(np.asarray(getattr(self.law, n))[i]) for n in NAMES})


def starts_grid() -> np.ndarray:
    """Starts [S, 3]: (share of the least loss that is E, alpha, beta); A and B follow."""
    shares, exponents = (0.0, 0.3, 0.6, 0.9), (0.1, 0.3, 0.6, 1.2)
    return np.array(list(itertools.product(shares, exponents, exponents)))


def fit(
    table: Table,
    *,
    losses: np.ndarray | None = None,
    repeats: float | None = None,
    delta: float = HUBER_DELTA,
    starts: np.ndarray | Law | None = None,
    counts: np.ndarray | None = None,
) -> Fit:
    """The law of least Huber loss on residuals of log L, from many starts at once.

    losses: [R, n] to fit instead of the table's one vector, as bootstraps do; counts: [R, n], how
    often each run counts, once if None. repeats: R* of the law; None fits it where the table has
    unique_tokens, and takes every token as new where it has not. starts: a grid like
    `starts_grid`'s, or a Law near the minimum.

    The residual is r = logsumexp(log E, log A - alpha log N, log B - beta log D') - log L. The
    minimum is that of the paper's L-BFGS runs; what goes down to it is Levenberg's method, on all
    starts and all loss vectors together, with delta coming down from nearly least squares.
    """
    problem = _Problem.of(table, repeats)
    targets = np.log(table.loss[None] if losses is None else losses)  # [R, n]
    counts = np.ones((1, 1)) if counts is None else counts
    targets, counts = np.broadcast_arrays(targets, counts)
    if isinstance(starts, Law):
        theta = np.broadcast_to(problem.encode(starts), (len(targets), problem.size)).copy()
        theta, value = problem.descend_through(DESCENTS[1:], theta, targets, counts, delta)
        return problem.result(theta, value, targets, num_starts=1)
    grid = starts_grid() if starts is None else starts
    found = [_search(problem, t, c, grid, delta) for t, c in zip(targets, counts, strict=True)]
    theta = np.array([f[0] for f in found])
    return problem.result(theta, np.array([f[1] for f in found]), targets, num_starts=len(grid))


def _search(
    problem: _Problem, target: np.ndarray, counts: np.ndarray, grid: np.ndarray, delta: float
) -> tuple[np.ndarray, float]:
    """(theta [P], objective) of the best end of all starts, for target and counts [n]."""
    theta = problem.begin(grid, target)
    shape = (len(theta), len(target))
    targets, counts = np.broadcast_to(target, shape), np.broadcast_to(counts, shape)
    theta, value = problem.descend(theta, targets, counts, max(DESCENTS[0], delta), steps=30)
    kept = np.argsort(value)[:KEPT]
    theta, value = problem.descend_through(
        DESCENTS[1:], theta[kept], targets[kept], counts[kept], delta
    )
    best = int(np.argmin(value))
    return theta[best], float(value[best])


def _worth(repeated: np.ndarray, R: np.ndarray) -> np.ndarray:
    """How many fresh passes `repeated` passes over the same tokens are worth."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(R), repeated, -R * np.expm1(-repeated / R))


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The least squares problem in theta [P] = (log E, log A', log B', alpha, beta[, log R*]).

    A' and B' belong to parameters and tokens in units of their geometric mean: A and alpha are then
    nearly independent, and a step in one needs no step in the other.
    """

    x: np.ndarray  # [n] log N, less its mean
    y: np.ndarray  # [n] log of distinct tokens, less the mean of log D
    again: np.ndarray  # [n] times that they are seen again
    x_mean: float
    y_mean: float
    repeats: float | None  # R*; None: the last entry of theta
    low: np.ndarray  # [P]
    high: np.ndarray  # [P]

    @property
    def size(self) -> int:
        return len(self.low)

    @classmethod
    def of(cls, table: Table, repeats: float | None) -> _Problem:
        log_N, log_D = np.log(table.parameters), np.log(table.tokens)
        again = np.zeros(len(table))
        if table.unique_tokens is None:
            repeats = np.inf
        else:
            unique = np.minimum(table.unique_tokens, table.tokens)
            again = table.tokens / unique - 1
        least = np.log(table.loss.min())
        low = [least - 14, least - 30, least - 30, SMALLEST_EXPONENT, SMALLEST_EXPONENT]
        high = [least + 5, least + 10, least + 10, LARGEST_EXPONENT, LARGEST_EXPONENT]
        if repeats is None:
            low, high = [*low, np.log(1e-2)], [*high, np.log(1e4)]
        return cls(
            x=log_N - log_N.mean(),
            y=log_D - np.log1p(again) - log_D.mean(),
            again=again,
            x_mean=float(log_N.mean()),
            y_mean=float(log_D.mean()),
            repeats=repeats,
            low=np.array(low),
            high=np.array(high),
        )

    def encode(self, law: Law) -> np.ndarray:
        """theta [..., P]."""
        parts = [
            np.log(np.maximum(law.E, 1e-300)),
            np.log(law.A) - np.asarray(law.alpha) * self.x_mean,
            np.log(law.B) - np.asarray(law.beta) * self.y_mean,
            law.alpha,
            law.beta,
        ]
        parts += [np.log(law.repeats)] * (self.repeats is None)
        return np.clip(np.stack(parts, axis=-1), self.low, self.high)

    def decode(self, theta: np.ndarray) -> Law:
        e, a, b, alpha, beta = theta[..., :5].swapaxes(0, -1)
        repeats = np.exp(theta[..., 5]) if self.repeats is None else np.full_like(e, self.repeats)
        A, B = np.exp(a + alpha * self.x_mean), np.exp(b + beta * self.y_mean)
        return Law(np.exp(e), A, alpha, B, beta, repeats)

    def result(
        self, theta: np.ndarray, value: np.ndarray, targets: np.ndarray, num_starts: int
    ) -> Fit:
        at_bound = np.any((theta <= self.low) | (theta >= self.high), axis=-1)
        residuals = targets - self.terms(theta)[0]
        return Fit(self.decode(theta), value, residuals, np.asarray(at_bound), num_starts)

    def begin(self, grid: np.ndarray, target: np.ndarray) -> np.ndarray:
        """theta [S, P] of a grid, with the A' and B' of least squares on the loss itself."""
        loss = np.exp(target)
        share, alpha, beta = grid.T[..., None]  # [S, 1]
        rest = loss - share * loss.min()  # [S, n]
        fresh = self.y + np.log1p(self.again)
        u, v = np.exp(-alpha * self.x), np.exp(-beta * fresh)
        uu, uv, vv = ((p * q).sum(axis=1) for p, q in ((u, u), (u, v), (v, v)))
        ur, vr = ((p * rest).sum(axis=1) for p in (u, v))
        determinant = uu * vv - uv**2
        A, B = (vv * ur - uv * vr) / determinant, (uu * vr - uv * ur) / determinant
        # where one would be negative, the other takes all, and it starts small
        A, B = (
            np.where(B > 0, A, ur / uu).clip(1e-3 * loss.min()),
            np.where(A > 0, B, vr / vv).clip(1e-3 * loss.min()),
        )
        e = np.log(np.maximum(share[:, 0], 1e-3) * loss.min())
        parts = [e, np.log(A), np.log(B), alpha[:, 0], beta[:, 0]]
        parts += [np.full_like(e, np.log(10.0))] * (self.repeats is None)
        return np.clip(np.stack(parts, axis=-1), self.low, self.high)

    def terms(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log loss [R, n], its derivatives [R, n, P]) at theta: [R, P]."""
        e, a, b, alpha, beta = theta[:, :5].T[..., None]  # [R, 1]
        R = np.exp(theta[:, 5:6]) if self.repeats is None else np.array([[self.repeats]])
        worth = _worth(self.again, R)
        y = self.y + np.log1p(worth)
        z = np.stack(np.broadcast_arrays(e, a - alpha * self.x, b - beta * y))
        top = z.max(axis=0)
        parts = np.exp(z - top)
        total = parts.sum(axis=0)
        p = parts / total
        columns = [p[0], p[1], p[2], -p[1] * self.x, -p[2] * y]
        if self.repeats is None:
            q = self.again / R
            d_worth = R * (1 - np.exp(-q) * (1 + q))  # by log R*
            columns.append(-p[2] * beta * d_worth / (1 + worth))
        return top + np.log(total), np.stack(columns, axis=-1)

    def objective(
        self, theta: np.ndarray, targets: np.ndarray, counts: np.ndarray, delta: float
    ) -> np.ndarray:
        """Sums of Huber losses [R]."""
        return (counts * huber(self.terms(theta)[0] - targets, delta)).sum(axis=1)

    def descend_through(
        self,
        deltas: Sequence[float],
        theta: np.ndarray,
        targets: np.ndarray,
        counts: np.ndarray,
        delta: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`descend` with those of `deltas` that are larger, then with delta."""
        for larger in deltas:
            if larger > delta:
                theta, _ = self.descend(theta, targets, counts, larger)
        return self.descend(theta, targets, counts, delta)

    def descend(
        self,
        theta: np.ndarray,
        targets: np.ndarray,
        counts: np.ndarray,
        delta: float,
        *,
        steps: int = 100,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(theta [R, P], objective [R]) at minima near theta; targets and counts: [R, n]."""
        theta = theta.copy()
        value = self.objective(theta, targets, counts, delta)
        damping, active, diagonal = (
            np.full(len(theta), 1e-3),
            np.arange(len(theta)),
            range(self.size),
        )
        for step in range(steps):
            here, wanted, count = theta[active], targets[active], counts[active]
            f, jacobian = self.terms(here)
            r = f - wanted
            # The exact weights, 1 within delta and 0 beyond, converge fast but say nothing of
            # residuals beyond; those of reweighted least squares are safe and slow. In turn.
            safe = np.minimum(1.0, delta / np.maximum(np.abs(r), 1e-300))
            weights = safe if step % 3 == 0 else np.maximum(np.abs(r) <= delta, 0.02 * safe)
            weights = count * weights
            gradient = np.einsum("rn,rnk->rk", count * np.clip(r, -delta, delta), jacobian)
            curvature = np.einsum("rn,rnk,rnl->rkl", weights, jacobian, jacobian)
            size = np.einsum("rkk->rk", curvature)
            size = np.maximum(size, 1e-12 * size.max(axis=1, keepdims=True) + 1e-300)
            curvature[:, diagonal, diagonal] += damping[active, None] * size
            # what stands at its bound and would leave is held there while the others move
            held = ((here <= self.low) & (gradient > 0)) | ((here >= self.high) & (gradient < 0))
            gradient[held] = 0.0
            curvature[held] = 0.0
            curvature[:, diagonal, diagonal] += held
            move = -np.linalg.solve(curvature, gradient[..., None])[..., 0]
            new = np.clip(here + np.clip(move, -2.0, 2.0), self.low, self.high)
            tried = self.objective(new, wanted, count, delta)
            gain = value[active] - tried
            better = gain > 0
            theta[active[better]], value[active[better]] = new[better], tried[better]
            damping[active] = np.clip(damping[active] * np.where(better, 0.2, 5.0), 1e-12, 1e8)
            still = np.where(better, gain > 1e-11 * value[active], damping[active] < 1e6)
            active = active[still]
            if not len(active):
                break
        return theta, value


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2 within delta, and growing by |r| delta beyond."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
