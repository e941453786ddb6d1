"""Views of a run for notebooks: HTML text and figures of its data, losses and attention."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from lm.config import conversion
from lm.data.pipeline import ExplainedRow
from lm.interpret.attention_maps import cut, mean_distances
from lm.interpret.markup import (
    COLORS,
    blend,
    box,
    colored_text,
    mask_image,
    paint,
    table,
    token_text,
    token_texts,
    visible,
)
from lm.interpret.token_losses import TokenLosses
from lm.kernels.dot_product import self_mask
from lm.storage.epaths import StoragePath
from lm.telemetry import fonts
from lm.telemetry.figures import make_figure
from lm.telemetry.progress import format_quantity
from lm.tokenizers.tokenizer import Tokenizer
from lm.training.experiment import Experiment
from lm.types import Array, Batch, Tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREYS = ("#dddddd", "#bbbbbb")
_HOT = (240, 90, 60)  # the colour of the highest loss; zero is white


def references(workdir: str) -> dict[str, float]:
    """Bits per byte of gzip and xz on the held-out text, if the run has a summary.json."""
    path = StoragePath(workdir) / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    names = {"gzip -9": "gzip_bits_per_byte", "xz -9": "xz_bits_per_byte"}
    return {name: summary[key] for name, key in names.items() if key in summary}


def overview(experiment: Experiment, step: int) -> str:
    """HTML tables: the size of the run, and every config value that is not the default."""
    c, count = experiment.config, format_quantity
    seen = step * experiment.batch_size * c.data.length
    run = [
        ("checkpoint", f"step {step:,} of {experiment.num_steps:,}"),
        ("parameters", count(sum(x.size for x in jax.tree.leaves(experiment.abstract_params)))),
        ("batch", f"{experiment.batch_size} rows of {c.data.length} tokens"),
        ("seen", f"{count(seen)} tokens"),
    ]
    values = [
        (path, repr(value), repr(default), sentence)
        for path, value, default, sentence in conversion.explain(experiment.config_dict)
        if value != default
    ]
    return table((), run) + table(("config", "this run", "default", ""), values)


def row_html(tokenizer: Tokenizer, batch: Batch, row: int, explained: ExplainedRow) -> str:
    """The text of a row as HTML, a colour for each document, below the document's name."""
    segments, documents = batch.inputs.segments[row], []
    for number, (name, color) in enumerate(_labels(explained), start=1):
        text = "".join(token_texts(tokenizer, batch.targets[row][segments == number]))
        documents.append(
            f'<div style="font: bold 12px sans-serif; margin-top: 6px">{html.escape(name)}</div>'
            f'<span style="background: {color}90">{html.escape(text)}</span>'
        )
    return box("".join(documents))


def losses_html(
    tokenizer: Tokenizer,
    ids: Array,
    nll: Array,
    guesses: Array | None = None,
    *,
    limit: float = 8.0,
) -> str:
    """HTML text of ids [T], coloured by their losses `nll` [T] up to `limit` nats.

    The hint of a token has its loss, and the model's guess where `guesses` [T] are given.
    """
    tokens = []
    for i, text in enumerate(token_texts(tokenizer, ids)):
        hint = f"{visible(text)}: {nll[i]:.2f} nats"
        if guesses is not None:
            hint += f", guess {visible(token_text(tokenizer, int(guesses[i])))}"
        tokens.append((text, blend(_HOT, float(nll[i]) / limit), hint))
    bar = f"background: linear-gradient(to right, {blend(_HOT, 0)}, {blend(_HOT, 1)})"
    style = f"display: inline-block; width: 160px; height: 10px; border: 1px solid #ddd; {bar}"
    return colored_text(tokens, f'0 <span style="{style}"></span> {limit:g} nats')


def hardest_html(
    tokenizer: Tokenizer, batch: Batch, losses: TokenLosses, *, count: int = 12, context: int = 12
) -> str:
    """HTML table of the `count` tokens of highest loss, after the `context` tokens before them."""
    weighted = losses.nll * (batch.weights > 0)
    rows = []
    for index in np.argsort(-weighted, axis=None)[:count]:
        i, t = np.unravel_index(index, weighted.shape)
        first = max(0, t - context, t - int(batch.inputs.positions[i, t]))
        before = visible("".join(token_texts(tokenizer, batch.targets[i, first:t])))[-60:]
        target, guess = (
            visible(token_text(tokenizer, int(x[i, t]))) for x in (batch.targets, losses.guesses)
        )
        nll, confidence = losses.nll[i, t], losses.confidence[i, t]
        rows.append((f"{nll:.1f}", before, target, f"{guess}  ({confidence:.0%})"))
    return table(("nats", "after", "comes", "the model's guess"), rows, right=(0, 1))


def _labels(explained: ExplainedRow) -> list[tuple[str, str]]:
    """(name, colour) of every document of a row."""
    return [
        (f"{d.id}  tokens {d.start:,} to {d.stop:,}", COLORS[i % len(COLORS)])
        for i, d in enumerate(explained.documents)
    ]


def packing_figure(
    tokens: Tokens,
    row: int,
    explained: ExplainedRow,
    windows: Sequence[int | None] = (None,),
) -> Figure:
    """A batch with one row in the colours of its documents, and its mask for each window."""
    from matplotlib.patches import Patch

    figure, axes = make_figure(1, 1 + len(windows), size=(5.0, 4.6), grid=False)
    left, *right = axes[0]
    image = paint(tokens.segments, _GREYS)
    image[row] = paint(tokens.segments[row])
    left.imshow(image, aspect="auto", interpolation="nearest")
    left.hlines(np.arange(len(image) - 1) + 0.5, -0.5, image.shape[1] - 0.5, "white", linewidth=1)
    left.set(title="the batch", xlabel="position in the row", ylabel="row", yticks=[row])
    one = cut(tokens, row)
    for axis, window in zip(right, windows, strict=True):
        axis.imshow(mask_image(self_mask(one, window=window).allowed()[0], one.segments[0]))
        kind = "" if window is None else f", window {window}"
        axis.set(title=f"attention mask of row {row}{kind}", xlabel="key", ylabel="query")
    labels = [Patch(color=color, label=name) for name, color in _labels(explained)[:8]]
    figure.legend(handles=labels, loc="outside lower center", frameon=False, fontsize=9)
    return figure


def heads_figure(maps: Array) -> Figure:
    """The attention weights of all heads, small: maps [L, N, T, S]."""
    num_layers, num_heads = maps.shape[:2]
    figure, axes = make_figure(num_layers, num_heads, size=(1.5, 1.5), grid=False)
    for (layer, head), axis in np.ndenumerate(axes):
        _show_weights(axis, maps[layer, head])
        axis.set(xticks=[], yticks=[])
        if layer == 0:
            axis.set_title(f"head {head}", fontsize=9)
        if head == 0:
            axis.set_ylabel(f"layer {layer}", fontsize=9)
    return figure


def attention_figure(
    maps: Array, texts: Sequence[str], heads: Sequence[tuple[int, int]], *, columns: int = 2
) -> Figure:
    """The attention weights of chosen heads (layer, head) of maps [L, N, T, S], with tokens."""
    size = 1.0 + 0.14 * len(texts)
    rows = -(-len(heads) // columns)
    figure, axes = make_figure(rows, columns, size=(size + 0.5, size), grid=False)
    families = fonts.families("".join(texts), "monospace")
    names = [fonts.readable(visible(text)[:9], families) for text in texts]
    distances = mean_distances(maps)
    used = axes.flat[: len(heads)]
    for axis in axes.flat[len(heads) :]:
        axis.remove()
    for axis, (layer, head) in zip(used, heads, strict=True):
        _show_weights(axis, maps[layer, head])
        back = distances[layer, head]
        axis.set_title(f"layer {layer}, head {head}: {back:.1f} tokens back", fontsize=10)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7, family=families)
        axis.set_yticks(range(len(names)), names, fontsize=7, family=families)
        axis.tick_params(length=0)
    figure.colorbar(used[0].images[0], ax=used, shrink=0.4, label="attention weight")
    return figure


def position_figure(nll: Array, positions: Array, weights: Array) -> Figure:
    """Mean loss and its standard error by tokens of context, of arrays [B, T]."""
    scored = np.asarray(weights) > 0
    values, num_before = np.asarray(nll)[scored], np.asarray(positions)[scored]
    bins = np.ceil(np.log2(num_before + 1)).astype(int)  # 0, 1, 2 to 3, 4 to 7, ...
    kinds = np.unique(bins)
    groups = [values[bins == k] for k in kinds]
    figure, [[axis]] = make_figure(size=(7.5, 3.6))
    errors = [g.std() / np.sqrt(len(g)) for g in groups]
    axis.errorbar(kinds, [g.mean() for g in groups], errors, marker="o", capsize=3)
    axis.axhline(values.mean(), color="0.6", linestyle="--", linewidth=1)
    axis.annotate(
        f"mean {values.mean():.2f}",
        (kinds[0], values.mean()),
        (0, -12),
        textcoords="offset points",
        color="0.4",
    )
    names = [f"{2**k // 2}–{2**k - 1}" if k > 1 else str(k) for k in kinds.tolist()]
    axis.set_xticks(kinds, names)
    axis.set(xlabel="tokens of context", ylabel="loss (nats per token)")
    return figure


def _show_weights(axis: Axes, weights: Array) -> None:
    from matplotlib.colors import PowerNorm

    # the square root, since most weights are small
    axis.imshow(np.asarray(weights), cmap="Blues", norm=PowerNorm(0.5, 0.0, 1.0))
