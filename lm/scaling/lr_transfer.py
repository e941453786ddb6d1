"""Whether the best learning rate is the same for every width: short runs over widths, learning
rates and seeds, with one compiled step for each width.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.config.tree import ConfigTree
from lm.scaling.coord_check import resized
from lm.telemetry import jsonl
from lm.training import train_step
from lm.training.experiment import Experiment
from lm.types import Array, Batch, TrainState


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
    def key(self) -> tuple[Any, ...]:
        return self.parametrization, self.width, self.learning_rate, self.seed


def read(path: Path) -> list[TrainedPoint]:
    """The runs of a file, in which a last line that a kill has cut is left out."""
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
    say: Callable[[str], Any] = print,
) -> list[TrainedPoint]:
    """Does all runs that the file has not, and appends each when it is done."""
    found = read(path)
    done = {run.key for run in found}
    path.parent.mkdir(parents=True, exist_ok=True)
    with jsonl.reopen(path, map(dataclasses.asdict, found)) as file:
        for name in parametrizations:
            for width in widths:
                keys = [(name, width, r, seed) for seed in seeds for r in rates]
                wanted = [key for key in keys if key not in done]
                for run in _runs(config, devices, wanted):
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
    config: ConfigTree, devices: Sequence[Any], keys: Iterable[tuple[Any, ...]]
) -> Iterator[TrainedPoint]:
    """The runs of one parametrization and width."""
    advance: Any = None
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
        if advance is None:
            advance = _make_step(experiment, first)
        began, losses = time.monotonic(), []
        state, bad = jax.tree.map(jnp.copy, first), []
        for at in range(experiment.num_steps):
            batch = experiment.make_global_batch(
                experiment.train_data.batch_at(at, experiment.rows)
            )
            state, loss, was_bad = advance(state, batch, jnp.float32(rate))
            losses.append(loss)
            bad.append(was_bad)
        last = np.asarray(losses[-max(1, len(losses) // 4) :])
        loss = None if np.any(bad) else float(np.mean(last))
        yield TrainedPoint(name, width, rate, seed, loss, time.monotonic() - began)


def _make_step(experiment: Experiment, like: TrainState) -> Any:
    """(state, batch, learning rate) -> (state, mean loss of the batch, whether the update was bad).

    The rate is an argument, so that all rates are one program: steps of an optimizer are
    proportional to it.
    """
    tx = experiment.tx

    def advance(state: TrainState, batch: Batch, rate: Array) -> tuple[TrainState, Array, Array]:
        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            updates, state = tx.update(updates, state, params)
            return jax.tree.map(lambda u: rate * u, updates), state

        state, sums, facts = train_step.train_step(
            state,
            batch,
            loss_fn=experiment.loss_fn,
            tx=optax.GradientTransformation(tx.init, update),
            rng=jax.random.key(0),
        )
        return state, sums["loss"] / sums["tokens"], facts["bad"]

    everywhere = experiment.rules.sharding()
    outputs = (jax.tree.map(lambda x: x.sharding, like), everywhere, everywhere)
    return jax.jit(advance, donate_argnums=0, out_shardings=outputs)


@dataclasses.dataclass(frozen=True)
class Best:
    """The best learning rate of one parametrization and width."""

    parametrization: str
    width: int
    rate: float  # on the grid, by the mean over seeds
    fitted: float  # where a parabola in log(rate), through it and its neighbours, is lowest
    loss: float
    of_seeds: tuple[float, ...]  # on the grid, for each seed alone

    @property
    def is_inside(self) -> bool:
        """Whether the grid goes on to both sides of it."""
        return not math.isnan(self.fitted)


def best(runs: Sequence[TrainedPoint]) -> list[Best]:
    """Of every parametrization and width, in the order of the runs."""
    found = []
    for name, width in dict.fromkeys((r.parametrization, r.width) for r in runs):
        mine = [r for r in runs if (r.parametrization, r.width) == (name, width)]
        curve = mean_losses(mine)
        rates = sorted(curve)
        i = min(range(len(rates)), key=lambda i: curve[rates[i]])
        fitted = float("nan")
        if 0 < i < len(rates) - 1 and math.isfinite(curve[rates[i - 1]] + curve[rates[i + 1]]):
            x = np.log2(rates[i - 1 : i + 2])
            a, b, _ = np.polyfit(x, [curve[r] for r in rates[i - 1 : i + 2]], 2)
            fitted = float(2 ** (-b / (2 * a)))
        seeds = sorted({r.seed for r in mine})
        of_seeds = tuple(
            min((r for r in mine if r.seed == s), key=lambda r: _loss(r)).learning_rate
            for s in seeds
        )
        found.append(Best(name, width, rates[i], fitted, curve[rates[i]], of_seeds))
    return found


def _loss(run: TrainedPoint) -> float:
    return math.inf if run.loss is None else run.loss


def mean_losses(runs: Sequence[TrainedPoint]) -> dict[float, float]:
    """{learning rate: mean over seeds}, infinite where one diverged."""
    rates = sorted({r.learning_rate for r in runs})
    return {
        rate: float(np.mean([_loss(r) for r in runs if r.learning_rate == rate])) for rate in rates
    }


def table(found: Sequence[Best]) -> str:
    """The best rates as a table in Markdown, and how far they move from the least width."""
    lines = [
        "| parametrization | width | best rate (grid) | of each seed | parabola | moved by 2^ "
        "| loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for b in found:
        first = next(f for f in found if f.parametrization == b.parametrization)
        known = b.is_inside and first.is_inside
        moved = f"{math.log2(b.fitted / first.fitted):+.2f}" if known else "?"
        fitted = f"2^{math.log2(b.fitted):.2f}" if b.is_inside else "outside"
        seeds = " ".join(f"2^{math.log2(r):g}" for r in b.of_seeds)
        lines.append(
            f"| {b.parametrization} | {b.width} | 2^{math.log2(b.rate):g} | {seeds} | {fitted} | "
            f"{moved} | {b.loss:.3f} |"
        )
    return "\n".join(lines)


def draw(runs: Sequence[TrainedPoint], path: str) -> None:
    """Writes a picture: loss against learning rate, a panel for each parametrization and a line for
    each width, its lowest point marked and its seeds as dots.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.parametrization for r in runs))
    figure = Figure(figsize=(5.5 * len(names), 4.2), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    widths = sorted({r.width for r in runs})
    for name, axis in zip(names, axes[0], strict=True):
        for i, width in enumerate(widths):
            mine = [r for r in runs if (r.parametrization, r.width) == (name, width)]
            if not mine:
                continue
            colour = colormaps["viridis"](i / max(1, len(widths) - 1) * 0.9)
            curve = {r: loss for r, loss in mean_losses(mine).items() if math.isfinite(loss)}
            axis.plot(list(curve), list(curve.values()), color=colour, label=width, zorder=2)
            dots = [r for r in mine if r.loss is not None]
            x, y = [r.learning_rate for r in dots], [r.loss for r in dots]
            axis.scatter(x, y, color=colour, s=8, alpha=0.5)
            if curve:
                low = min(curve, key=lambda r: curve[r])
                axis.scatter([low], [curve[low]], color=colour, s=70, marker="*", zorder=3)
        axis.set_xscale("log", base=2)
        axis.set_title(name)
        axis.set_xlabel("learning rate of the base")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    losses = sorted(r.loss for r in runs if r.loss is not None)
    top = losses[int(0.95 * (len(losses) - 1))]
    for axis in axes[0]:
        axis.set_ylim(losses[0] - 0.05 * (top - losses[0]), top)
    axes[0][0].set_ylabel("loss at the end (nats per token)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="width", frameon=False)
    figure.savefig(path, dpi=120)
