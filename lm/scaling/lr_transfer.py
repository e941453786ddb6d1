"""Transfer of the best learning rate across widths: short runs over widths, learning rates and
seeds, with one compiled step for each width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.config.tree import ConfigTree
from lm.scaling.coord_check import sized_experiment
from lm.scaling.powers import parabola_minimum
from lm.telemetry import jsonl
from lm.telemetry.figures import make_figure, shades
from lm.training import train_step
from lm.training.experiment import Experiment
from lm.types import Batch, Device, TrainState

Step: TypeAlias = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class TrainedPoint:
    """One run's result; `loss` is the mean over the last quarter of its steps, each on a batch that
    it had not seen, and None where an update was not finite.
    """

    parametrization: str
    width: int
    learning_rate: float
    seed: int
    loss: float | None
    seconds: float

    @property
    def key(self) -> tuple[str, int, float, int]:
        return self.parametrization, self.width, self.learning_rate, self.seed


def sweep(
    config: ConfigTree,
    devices: Sequence[Device],
    path: Path,
    *,
    parametrizations: Sequence[str],
    widths: Sequence[int],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> list[TrainedPoint]:
    """Do all runs that the file has not, and append each when it is done."""
    found = [TrainedPoint(**record) for record in jsonl.read(path)]
    done = {run.key for run in found}
    with contextlib.closing(jsonl.Writer(path, map(dataclasses.asdict, found))) as file:
        for name, width in itertools.product(parametrizations, widths):
            advance: Step | None = None
            for seed in seeds:
                rest = [rate for rate in rates if (name, width, rate, seed) not in done]
                if not rest:
                    continue
                changes = {"model.parametrization": name, "seed": seed}
                changes |= {"optimizer.learning_rate": 1.0}
                experiment = sized_experiment(config, devices, "width", width, changes)
                first = experiment.init_state()
                advance = advance or _make_step(experiment, first)
                for rate in rest:
                    start = time.monotonic()
                    loss = _train(experiment, advance, first, rate)
                    seconds = time.monotonic() - start
                    found.append(TrainedPoint(name, width, rate, seed, loss, seconds))
                    file.append(dataclasses.asdict(found[-1]))
                    shown = "diverged" if loss is None else f"{loss:.4f}"
                    power = f"2^{math.log2(rate):g}"
                    print(f"{name} {width}: rate {power}, seed {seed}: {shown} ({seconds:.1f} s)")
    return found


def _train(experiment: Experiment, advance: Step, first: TrainState, rate: float) -> float | None:
    """The loss of a run as of a TrainedPoint."""
    state, losses, bad = jax.tree.map(jnp.copy, first), [], []
    for at in range(experiment.num_steps):
        batch = experiment.train_data.batch_at(at, experiment.rows)
        batch = experiment.make_global_batch(batch)
        state, loss, was_bad = advance(state, batch, jnp.float32(rate))
        losses.append(loss)
        bad.append(was_bad)
    last = np.asarray(losses[-max(1, len(losses) // 4) :])
    return None if np.any(bad) else float(np.mean(last))


def _make_step(experiment: Experiment, like: TrainState) -> Step:
    """(state, batch, learning rate) -> (state, mean loss of the batch, True for a bad update).

    The rate is an argument, so that all rates are one program: steps of an optimizer are
    proportional to it.
    """
    tx = experiment.tx

    def advance(
        state: TrainState, batch: Batch, rate: jax.Array
    ) -> tuple[TrainState, jax.Array, jax.Array]:
        def update(
            updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
        ) -> tuple[optax.Updates, optax.OptState]:
            updates, state = tx.update(updates, state, params)
            return optax.tree.scale(rate, updates), state

        state, sums, info = train_step.update(
            state,
            batch,
            loss_fn=experiment.loss_at(state.step, state.teacher),
            tx=optax.GradientTransformation(tx.init, update),
            rng=jax.random.key(0),
        )
        return state, sums["loss"] / sums["tokens"], info["bad"]

    everywhere = experiment.rules.sharding()
    outputs = (jax.tree.map(lambda x: x.sharding, like), everywhere, everywhere)
    return jax.jit(advance, donate_argnums=0, out_shardings=outputs)


@dataclasses.dataclass(frozen=True)
class Best:
    """The best learning rate of one parametrization and width."""

    parametrization: str
    width: int
    rate: float  # on the grid, by the mean over seeds
    fitted: float  # the minimum of the parabola through it and its neighbours; NaN without both
    loss: float
    of_seeds: tuple[float, ...]  # on the grid, for each seed


def curves(runs: Sequence[TrainedPoint]) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """{(parametrization, width): (rates [R], losses [seeds, R])}, in the order of the runs. Losses
    are infinite where a run diverged, NaN where it is not done.
    """
    found = {}
    for key in dict.fromkeys((r.parametrization, r.width) for r in runs):
        of_width = [r for r in runs if (r.parametrization, r.width) == key]
        rates, columns = np.unique([r.learning_rate for r in of_width], return_inverse=True)
        seeds, rows = np.unique([r.seed for r in of_width], return_inverse=True)
        losses = np.full((len(seeds), len(rates)), np.nan)
        losses[rows, columns] = [np.inf if r.loss is None else r.loss for r in of_width]
        found[key] = rates, losses
    return found


def best(runs: Sequence[TrainedPoint]) -> list[Best]:
    """The best rate of every parametrization and width, in the order of the runs."""
    found = []
    for (name, width), (rates, losses) in curves(runs).items():
        mean = np.nanmean(losses, axis=0)
        i, fitted = int(mean.argmin()), np.nan
        around = slice(max(0, i - 1), i + 2)
        if np.isfinite(mean[around]).all():
            fitted, _ = parabola_minimum(rates[around], mean[around])
        of_seeds = tuple(rates[np.nanargmin(losses, axis=1)].tolist())
        found.append(Best(name, width, float(rates[i]), fitted, float(mean[i]), of_seeds))
    return found


def table(found: Sequence[Best]) -> str:
    """The best rates as a table in Markdown, and their distance from that of the first width."""
    lines = [
        "| parametrization | width | best rate (grid) | of each seed | parabola | moved by 2^ "
        "| loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for b in found:
        first = next(f for f in found if f.parametrization == b.parametrization)
        shift = math.log2(b.fitted / first.fitted)
        moved = "?" if math.isnan(shift) else f"{shift:+.2f}"
        fitted = "outside" if math.isnan(b.fitted) else f"2^{math.log2(b.fitted):.2f}"
        seeds = " ".join(f"2^{math.log2(r):g}" for r in b.of_seeds)
        lines.append(
            f"| {b.parametrization} | {b.width} | 2^{math.log2(b.rate):g} | {seeds} | {fitted} | "
            f"{moved} | {b.loss:.3f} |"
        )
    return "\n".join(lines)


def draw(runs: Sequence[TrainedPoint], path: str) -> None:
    """Write a picture: loss against learning rate, a panel for each parametrization and a line for
    each width, with a star at its minimum and a dot for each seed.
    """
    names = list(dict.fromkeys(r.parametrization for r in runs))
    figure, [axes] = make_figure(columns=len(names), size=(5.5, 4.2))
    found, widths = curves(runs), sorted({r.width for r in runs})
    drawn = sorted(r.loss for r in runs if r.loss is not None)
    top = drawn[int(0.95 * (len(drawn) - 1))]
    for name, axis in zip(names, axes, strict=True):
        for width, color in zip(widths, shades(len(widths)), strict=True):
            if (name, width) not in found:
                continue
            rates, losses = found[name, width]
            mean = np.nanmean(losses, axis=0)
            if (shown := np.isfinite(mean)).any():
                axis.plot(rates[shown], mean[shown], color=color, label=width, zorder=2)
                low = mean.argmin()
                axis.scatter(rates[low], mean[low], color=color, s=70, marker="*", zorder=3)
            axis.plot(rates, losses.T, ".", color=color, alpha=0.5)
        axis.set_xscale("log", base=2)
        axis.set(title=name, xlabel="learning rate of the base")
        axis.set_ylim(drawn[0] - 0.05 * (top - drawn[0]), top)
    axes[0].set_ylabel("loss at the end (nats per token)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="width", frameon=False)
    figure.savefig(path, dpi=120)
