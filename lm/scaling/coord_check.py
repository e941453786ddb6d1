"""Coordinate checks (arXiv:2203.03466, appendix D.1): the size of activations, and how far the
first steps move them, in models of growing width or depth.

Under a maximal-update parametrization neither depends on the size; under the standard one they do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lm.config.tree import ConfigTree
from lm.scaling.powers import fit_power
from lm.telemetry.figures import make_figure, shades
from lm.training.experiment import Experiment
from lm.types import Batch, Device, Params

# The fields of `config.model` that grow in proportion to each kind of size.
WIDTHS = ("embed_dim", "mlp_dim", "moe.mlp_dim", "moe.shared_mlp_dim")
GROWING = {
    "width": (*WIDTHS, "num_heads", "num_kv_heads"),  # more heads of the same width
    "head_dim": (*WIDTHS, "head_dim"),  # as many heads, but wider
    "depth": ("num_layers",),
}
KINDS = {"size": "root mean square", "change": "change since step 0"}

Activations: TypeAlias = dict[str, jax.Array]


def resized(config: ConfigTree, along: str, size: int) -> dict[str, object]:
    """{config path: value} of the model with `size` as its embed_dim (along width or head_dim) or
    num_layers (along depth), and all that grows with it; the config's own sizes are the base where
    it names none. ValueError where a number would not be whole.
    """
    flat = cast("dict[str, Any]", flatten_dict(config.model.to_dict(), sep="."))
    flat["head_dim"] = flat["head_dim"] or flat["embed_dim"] // flat["num_heads"]
    old = flat["num_layers" if along == "depth" else "embed_dim"]
    bases = ("embed_dim", "num_layers", "head_dim")
    changes = {f"base_{name}": flat[name] for name in bases if flat[f"base_{name}"] is None}
    changes["head_dim"] = flat["head_dim"]
    for name in GROWING[along]:
        if (value := flat.get(name)) is None:
            continue  # what is unset follows
        if value * size % old:
            raise ValueError(
                f"config.model.{name} ({value}) times {size} / {old} must be whole: choose sizes "
                f"that are multiples of {old}"
            )
        changes[name] = value * size // old
    return {f"model.{name}": value for name, value in changes.items()}


def sized_experiment(
    config: ConfigTree,
    devices: Sequence[Device],
    along: str,
    size: int,
    changes: Mapping[str, object],
) -> Experiment:
    """The experiment of a config with `resized` and other values changed, {config path: value}."""
    sized = config.copy_and_resolve_references()
    sized.update_from_flattened_dict({**changes, **resized(config, along, size)})
    return Experiment(sized, devices)


def activations(experiment: Experiment, params: Params, batch: Batch) -> Activations:
    """Activations of one batch, by name: the residual stream after each block, the scores of its
    attention (of all pairs, before masks), the logits, and the targets' logits.

    The logits of other tokens say little while a model is narrower than its vocabulary is large:
    a step adds a sum of random signs to most of them, which becomes smaller with the width.
    """
    model, c = experiment.model, experiment.config.model
    output, kept = model.apply({"params": params}, batch.inputs, mutable=["intermediates"])
    layers = kept["intermediates"]["layers"]
    [hidden], [q], [k] = layers["hidden"], *(layers["attention"][n] for n in ("queries", "keys"))
    scores = c.score_scale * jnp.einsum(
        "lbkgth,lbksh->lbkgts", q.reshape(*k.shape[:3], -1, *q.shape[3:]), k
    )
    logits = model.apply({"params": params}, output.hidden, method="logits")
    target = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)
    found = {"logits": logits, "target": target}
    for i in range(hidden.shape[0]):
        found |= {f"block {i + 1}": hidden[i], f"scores {i + 1}": scores[i]}
    return dict(sorted(found.items()))


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def measure(experiment: Experiment, num_steps: int) -> dict[str, dict[str, list[float]]]:
    """{activation: {"size", "change"}}: root mean squares after 0 to `num_steps` steps of training,
    and those of the difference from before the first; that starts as nan.

    Every step takes the same batch: the effect of a step on other batches is another question,
    which depends on how much they share.
    """
    batch = experiment.make_global_batch(experiment.train_data.batch_at(0, experiment.rows))
    observe = jax.jit(
        functools.partial(activations, experiment), out_shardings=experiment.rules.sharding()
    )
    state = experiment.init_state()
    first = observe(state.params, batch)
    found = {name: {"size": [float(_rms(x))], "change": [math.nan]} for name, x in first.items()}
    for _ in range(num_steps):
        state, _, _ = experiment.train_step(state, batch)
        for name, x in observe(state.params, batch).items():
            found[name]["size"].append(float(_rms(x)))
            found[name]["change"].append(float(_rms(x - first[name])))
    return found


@dataclasses.dataclass(frozen=True)
class Check:
    """The coordinates of one parametrization."""

    parametrization: str
    along: str
    sizes: tuple[int, ...]
    values: dict[str, dict[str, list[list[float]]]]  # {activation: {kind: [size][step]}}

    def slopes(self, kind: str, step: int = -1) -> dict[str, float]:
        """The exponent of each activation in the size, after a step."""
        values = {name: np.array(found[kind])[:, step] for name, found in self.values.items()}
        sizes = np.array(self.sizes)
        return {name: float(fit_power(sizes, x).exponent) for name, x in values.items()}

    def to_json(self) -> dict[str, object]:
        num_measured = len(next(iter(self.values.values()))["size"][0])
        steps = {"size": range(num_measured), "change": range(1, num_measured)}
        slopes = {kind: [self.slopes(kind, step) for step in steps[kind]] for kind in KINDS}
        return {**dataclasses.asdict(self), "slopes": slopes}


def check(
    config: ConfigTree,
    devices: Sequence[Device],
    *,
    parametrization: str,
    sizes: Sequence[int],
    num_steps: int,
    along: str = "width",
) -> Check:
    """Train a model of each size for `num_steps` at the peak learning rate, and measure it after
    each of them.
    """
    changes = {
        "model.parametrization": parametrization,
        "optimizer.schedule.kind": "constant",
        "optimizer.schedule.warmup_steps": 0,
        "train.num_steps": num_steps,
    }
    found = []
    for size in sizes:
        experiment = sized_experiment(config, devices, along, size, changes)
        found.append(measure(experiment, num_steps))
        print(f"{parametrization}, {along} {size}: logits {found[-1]['logits']['size'][-1]:.4g}")
    values = {
        name: {kind: [of_size[name][kind] for of_size in found] for kind in KINDS}
        for name in found[-1]
        if all(name in of_size for of_size in found)  # deeper models have more blocks
    }
    return Check(parametrization, along, tuple(sizes), values)


def table(checks: Sequence[Check]) -> str:
    """The exponents after the last step, as lines of text."""
    names = list(checks[0].values)
    lines = [f"{'exponent of':<24}" + "".join(f"{name:>10}" for name in names)]
    for found in checks:
        for kind, label in (("size", "size"), ("change", "change since 0")):
            slopes = found.slopes(kind)
            cells = "".join(f"{slopes[name]:>10.2f}" for name in names)
            lines.append(f"{found.parametrization + ', ' + label:<24}{cells}")
    return "\n".join(lines)


def draw(checks: Sequence[Check], path: str) -> None:
    """Write a picture: a row for each parametrization and kind, a column for each activation, a
    line for each step; the exponent after the last step is in each title.
    """
    rows = [(found, kind) for found in checks for kind in KINDS]
    names = list(checks[0].values)
    figure, axes = make_figure(len(rows), len(names), size=(2.6, 2.3))
    for (found, kind), line in zip(rows, axes, strict=True):
        slopes = found.slopes(kind)
        for name, axis in zip(names, line, strict=True):
            curves = list(zip(*found.values[name][kind], strict=True))  # [step][size]
            for at, (values, color) in enumerate(zip(curves, shades(len(curves)), strict=True)):
                axis.plot(found.sizes, values, marker="o", markersize=3, color=color, label=at)
            axis.set_xscale("log", base=2)
            axis.set_xticks(found.sizes, [str(size) for size in found.sizes])
            axis.xaxis.minorticks_off()
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            middle = (low * high) ** 0.5  # at least a factor of ten, so that flat looks flat
            axis.set_ylim(min(low, middle / 10**0.6), max(high, middle * 10**0.6))
            axis.set_title(f"{name}: {slopes[name]:+.2f}", fontsize=9)
            axis.yaxis.set_minor_formatter("")  # tens are enough
            axis.tick_params(labelsize=7)
        line[0].set_ylabel(f"{found.parametrization}\n{KINDS[kind]}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel(checks[0].along, fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="step", loc="outside right upper", fontsize=7, frameon=False
    )
    figure.suptitle("Coordinates against size; after each name, the exponent after the last step")
    figure.savefig(path, dpi=110)
