"""Transfer of the best learning rate across widths: short runs over widths, learning rates and
seeds, with one compiled step for each width.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.config.tree import ConfigTree
from lm.scaling.coord_check import resized
from lm.scaling.powers import parabola_minimum
from lm.telemetry import jsonl
from lm.telemetry.figures import make_figure
from lm.training import train_step
from lm.training.experiment import Experiment
from lm.types import Batch, TrainState

Key: TypeAlias = tuple[str, int, float, int]  # parametrization, width, learning rate, seed
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
    def key(self) -> Key:
        return self.parametrization, self.width, self.learning_rate, self.seed


def read(path: Path) -> list[TrainedPoint]:
    """The runs of a file, without a last line that a kill has cut."""
    return [TrainedPoint(**record) for record in jsonl.read(path)]


def sweep(
    config: ConfigTree,
    devices: Sequence[Any],
    path: Path,
    *,
    parametrizations: Sequence[str],
    widths: Sequence[int],
    rates: Sequence[float],
    seeds: Sequence[int],
    say: Callable[[str], object] = print,
) -> list[TrainedPoint]:
    """Do all runs that the file has not, and append each when it is done."""
    found = read(path)
    done = {run.key for run in found}
    path.parent.mkdir(parents=True, exist_ok=True)
    with jsonl.reopen(path, map(dataclasses.asdict, found)) as file:
        for name in parametrizations:
            for width in widths:
                keys = [(name, width, r, seed) for seed in seeds for r in rates]
                for run in _runs(config, devices, [key for key in keys if key not in done]):
                    file.write(jsonl.line(dataclasses.asdict(run)))
                    file.flush()
                    found.append(run)
                    loss = "diverged" if run.loss is None else f"{run.loss:.4f}"
                    say(
                        f"{name} {width}: rate 2^{math.log2(run.learning_rate):g}, seed {run.seed}:"
                        f" {loss} ({run.seconds:.1f} s)"
                    )
    return found


def _runs(
    config: ConfigTree, devices: Sequence[Any], keys: Iterable[Key]
) -> Iterator[TrainedPoint]:
    """The runs of one parametrization and width."""
    advance: Step | None = None
    states: dict[int, tuple[Experiment, TrainState]] = {}
    for name, width, rate, seed in keys:
        if seed not in states:
            changes = resized(config, "width", width)
            changes |= {"model.parametrization": name, "seed": seed, "optimizer.learning_rate": 1.0}
            of_width = config.copy_and_resolve_references()
            of_width.update_from_flattened_dict(changes)
            experiment = Experiment(of_width, devices)
            states = {seed: (experiment, experiment.init_state())}
        experiment, first = states[seed]
        advance = advance or _make_step(experiment, first)
        start, state = time.monotonic(), jax.tree.map(jnp.copy, first)
        losses, bad = [], []
        for at in range(experiment.num_steps):
            batch = experiment.train_data.batch_at(at, experiment.rows)
            state, loss, was_bad = advance(
                state, experiment.make_global_batch(batch), jnp.float32(rate)
            )
            losses.append(loss)
            bad.append(was_bad)
        last = np.asarray(losses[-max(1, len(losses) // 4) :])
        loss = None if np.any(bad) else float(np.mean(last))
        yield TrainedPoint(name, width, rate, seed, loss, time.monotonic() - start)


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
            return jax.tree.map(lambda u: rate * u, updates), state

        state, sums, info = train_step.train_step(
            state,
            batch,
            loss_fn=experiment.loss_fn,
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

    @property
    def is_inside(self) -> bool:
        """True if the grid goes on to both sides of it."""
        return not math.isnan(self.fitted)


def best(runs: Sequence[TrainedPoint]) -> list[Best]:
    """The best rate of every parametrization and width, in the order of the runs."""
    found = []
    for name, width in dict.fromkeys((r.parametrization, r.width) for r in runs):
        of_width = [r for r in runs if (r.parametrization, r.width) == (name, width)]
        curve = mean_losses(of_width)
        rates, losses = (np.array(values) for values in (list(curve), list(curve.values())))
        i = int(losses.argmin())
        around = slice(max(0, i - 1), i + 2)
        fitted = np.nan
        if np.isfinite(losses[around]).all():
            fitted, _ = parabola_minimum(rates[around], losses[around])
        of_seeds = tuple(
            min((r for r in of_width if r.seed == seed), key=_loss).learning_rate
            for seed in sorted({r.seed for r in of_width})
        )
        found.append(Best(name, width, float(rates[i]), fitted, float(losses[i]), of_seeds))
    return found


def _loss(run: TrainedPoint) -> float:
    return math.inf if run.loss is None else run.loss


def mean_losses(runs: Sequence[TrainedPoint]) -> dict[float, float]:
    """{learning rate: mean over seeds}, ascending, infinite where one diverged."""
    rates = sorted({r.learning_rate for r in runs})
    return {
        rate: float(np.mean([_loss(r) for r in runs if r.learning_rate == rate])) for rate in rates
    }


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
        fitted = f"2^{math.log2(b.fitted):.2f}" if b.is_inside else "outside"
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
    from matplotlib import colormaps

    names = list(dict.fromkeys(r.parametrization for r in runs))
    figure, [axes] = make_figure(columns=len(names), size=(5.5, 4.2))
    widths = sorted({r.width for r in runs})
    losses = sorted(r.loss for r in runs if r.loss is not None)
    top = losses[int(0.95 * (len(losses) - 1))]
    for name, axis in zip(names, axes, strict=True):
        for i, width in enumerate(widths):
            of_width = [r for r in runs if (r.parametrization, r.width) == (name, width)]
            color = colormaps["viridis"](i / max(1, len(widths) - 1) * 0.9)
            curve = {r: loss for r, loss in mean_losses(of_width).items() if math.isfinite(loss)}
            if curve:
                axis.plot(list(curve), list(curve.values()), color=color, label=width, zorder=2)
                low = min(curve, key=lambda r: curve[r])
                axis.scatter([low], [curve[low]], color=color, s=70, marker="*", zorder=3)
            dots = [(r.learning_rate, _loss(r)) for r in of_width]
            axis.plot(*np.array(dots).reshape(-1, 2).T, ".", color=color, alpha=0.5)
        axis.set_xscale("log", base=2)
        axis.set(title=name, xlabel="learning rate of the base")
        axis.set_ylim(losses[0] - 0.05 * (top - losses[0]), top)
    axes[0].set_ylabel("loss at the end (nats per token)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="width", frameon=False)
    figure.savefig(path, dpi=120)
