"""Plots of a run: its loss curve, and the loss of a learning rate range test."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.signal

from lm.storage import files
from lm.storage.epaths import StoragePath
from lm.telemetry import fonts, metrics
from lm.telemetry.figures import make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_curve(workdir: str, references: Mapping[str, float] | None = None) -> str:
    """Draw `loss_figure` into WORKDIR/loss.png and return its path."""
    return _save(loss_figure(workdir, references), workdir, "loss.png")


def loss_figure(workdir: str, references: Mapping[str, float] | None = None) -> Figure:
    """Losses over training tokens, from metrics.jsonl.

    Left: training and validation loss in nats per token, with a gap where every update of a log
    window was skipped; right, where it is known: bits per byte of validation. `references` are
    named horizontal lines in bits per byte, such as what gzip needs.

    Raises:
        ValueError: the run has written no loss yet.
    """
    import matplotlib

    records = metrics.read(workdir)
    train = [r for r in records if r["kind"] == "train"]
    if not any("loss" in r for r in train):
        raise ValueError(f"{workdir} has no loss to draw yet")
    evals = [r for r in records if r["kind"] == "eval"]
    seen, tokens_at = 0.0, {}  # {step: millions of tokens}
    for r in train:
        seen += r.get("tokens", 0.0)  # a window of skipped updates has none
        tokens_at[r["step"]] = seen / 1e6
    names = metrics.short_names(sorted({r["source"] for r in evals}))
    title = StoragePath(workdir).resolve().name
    references = references or {}
    families = fonts.families("".join([title, *names.values(), *references]))
    with matplotlib.rc_context({"font.family": families}):
        columns = 1 + any("bits_per_byte" in r for r in evals)
        figure, [axes] = make_figure(1, columns, size=(6.0, 4.4))
        losses = [r.get("loss", math.nan) for r in train]
        tokens = [tokens_at[r["step"]] for r in train]
        axes[0].plot(tokens, losses, color="0.6", linewidth=1, label="training")
        located = [r for r in evals if r["step"] in tokens_at]
        for axis, key in zip(axes, ("loss", "bits_per_byte"), strict=False):
            for i, (source, name) in enumerate(names.items()):
                own = [r for r in located if r["source"] == source and key in r]
                x, y = [tokens_at[r["step"]] for r in own], [r[key] for r in own]
                label = fonts.readable(name, families)
                axis.plot(x, y, marker="o", markersize=4, color=f"C{i}", label=label)
                if y and math.isfinite(y[-1]):
                    offset = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
                    axis.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), annotation_clip=False, **offset)
            axis.set_xlabel("tokens trained on (millions)")
        axes[0].set_ylabel("loss (nats per token)")
        values = sorted(_finite(r.get("loss") for r in [*train, *evals]))
        axes[0].set_ylim(values[0] * 0.95, values[int(0.97 * (len(values) - 1))] * 1.05)
        if len(axes) > 1:
            axes[1].set_ylabel("bits per byte, held out")
            for i, (name, value) in enumerate(references.items(), len(names)):
                label = fonts.readable(f"{name} {value:.3f}", families)
                axes[1].axhline(value, color=f"C{i}", linestyle="--", label=label)
            found = _finite(r.get("bits_per_byte") for r in evals)
            low, high = [*found, *references.values()], [*references.values()]
            if found:
                high.append(min(found) * 1.6)
            if low:
                axes[1].set_ylim(min(low) * 0.93, max(high) * 1.05)
        _add_title_and_legend(figure, axes, fonts.readable(title, families))
        return figure


def range_curve(workdir: str, smoothing: float = 0.9) -> tuple[str, float]:
    """Draw WORKDIR/lr_range.png, the loss over the learning rate of a run with schedule `range`.

    Returns its path and the rate at which the smoothed loss is lowest.

    smoothing: decay of the running mean over records, without the bias of its start.

    Raises:
        ValueError: the run has written too few metrics.
    """
    import matplotlib

    records = [r for r in metrics.read(workdir) if r["kind"] == "train" and "loss" in r]
    if len(records) < 2:
        raise ValueError(f"{workdir} has {len(records)} records of training: nothing to draw")
    rates, losses = [r["learning_rate"] for r in records], [r["loss"] for r in records]
    smooth = scipy.signal.lfilter([1 - smoothing], [1, -smoothing], losses)
    smooth /= 1 - smoothing ** np.arange(1, len(losses) + 1)
    low = int(np.nanargmin(smooth))
    title = StoragePath(workdir).resolve().name
    families = fonts.families(title)
    with matplotlib.rc_context({"font.family": families}):
        figure, [[axis]] = make_figure(size=(6.0, 4.4))
        axis.plot(rates, losses, color="0.7", linewidth=1, label="each record")
        axis.plot(rates, smooth, label="running mean")
        label = f"lowest at {rates[low]:.2g}"
        axis.axvline(rates[low], color="C1", linewidth=1, linestyle="--", label=label)
        axis.set_xscale("log")
        axis.set_xlabel("learning rate")
        axis.set_ylabel("loss (nats per token)")
        span = smooth[0] - smooth[low] or 1.0
        axis.set_ylim(smooth[low] - 0.25 * span, smooth[0] + 0.5 * span)
        _add_title_and_legend(figure, [axis], fonts.readable(title, families))
        return _save(figure, workdir, "lr_range.png"), rates[low]


def _add_title_and_legend(figure: Figure, axes: Sequence[Axes], title: str) -> None:
    """Add a title, and one legend for all axes below them."""
    figure.suptitle(title)
    found = {}
    for axis in axes:
        for line in axis.lines:
            found.setdefault(line.get_label(), line)
    columns = min(len(found), 3 * len(axes))
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False
    )


def _finite(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]


def _save(figure: Figure, workdir: str, name: str) -> str:
    path = StoragePath(workdir) / name
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    files.write_atomically(path, content.getbuffer())
    return str(path)
