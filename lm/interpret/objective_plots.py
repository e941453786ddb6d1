"""Pictures of what an objective makes of rows: the text of its streams, and who sees whom."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

from lm.data.tokenizer import Tokenizer
from lm.interpret.attention_maps import token_texts
from lm.interpret.run_report import COLORS, visible
from lm.layers.attention.dot_product import Mask, self_mask
from lm.objectives import ModelInterface
from lm.telemetry.figures import make_figure
from lm.types import Array, Batch, Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def objective_html(tokenizer: Tokenizer, batch: Batch, row: int) -> str:
    """The streams of a row as HTML: a colour for each document, scored targets in bold.

    Ids that the tokenizer does not have, sentinels and masks among them, show their number.
    """
    inputs, targets, weights = batch.inputs, batch.targets[row], batch.weights[row]
    lines = []
    if batch.encoder is not None:
        lines.append(("encoder", batch.encoder.ids[row], batch.encoder.segments[row], None))
    lines.append(("inputs", inputs.ids[row], inputs.segments[row], None))
    lines.append(("targets", targets, inputs.segments[row], weights))
    cells = []
    for name, ids, segments, scored in lines:
        texts = _texts(tokenizer, ids[segments > 0])
        style = "padding: 2px 8px; vertical-align: top; text-align: left"
        spans = [
            _span(text, int(number), scored is None or bool(weight))
            for text, number, weight in zip(
                texts,
                segments[segments > 0],
                (segments if scored is None else scored)[segments > 0],
                strict=True,
            )
        ]
        cells.append(
            f'<tr><th style="{style}">{name}</th><td style="{style}">{"".join(spans)}</td>'
        )
    table = "font: 12px/1.7 monospace; border-collapse: collapse; background: white; color: #222"
    return f'<table style="{table}">{"".join(cells)}</table>'


def objective_figure(form: ModelInterface, batch: Batch, row: int) -> Figure:
    """Who sees whom in a row, a colour for each document: the stream of the inputs, and with an
    encoder its own stream and what the decoder sees of it. Marks at the left: scored places.
    """
    inputs = _row(batch.inputs, row)
    encoder = None if batch.encoder is None else _row(batch.encoder, row)
    masks = [("inputs", "inputs", self_mask(inputs, causal=form.is_causal), inputs)]
    if encoder is not None:
        cross = Mask(
            inputs.segments, inputs.positions, encoder.segments, encoder.positions, causal=False
        )
        masks.insert(0, ("encoder", "encoder", self_mask(encoder, causal=False), encoder))
        masks.append(("inputs", "encoder", cross, inputs))
    figure, axes = make_figure(1, len(masks), size=(4.4, 4.2), grid=False)
    for axis, (looks, seen, mask, queries) in zip(axes[0], masks, strict=True):
        allowed = np.asarray(mask.allowed())[0]
        axis.imshow(_paint(allowed, np.asarray(queries.segments)[0]), interpolation="nearest")
        axis.set(xlabel=f"seen: {seen}", ylabel=f"looks: {looks}")
        axis.locator_params(integer=True)
        if looks == "inputs":
            scored = np.flatnonzero(batch.weights[row])
            axis.plot(np.full(len(scored), -1.5), scored, "k.", markersize=2, clip_on=False)
    return figure


def _row(tokens: Tokens, row: int) -> Tokens:
    arrays = {name: None if x is None else x[row : row + 1] for name, x in vars(tokens).items()}
    return Tokens(**arrays)


def _paint(allowed: Array, segments: Array) -> np.ndarray:
    """float [T, S, 3]: the colour of the query's document where it sees the key, else white."""
    from matplotlib.colors import to_rgb

    colors = np.array([to_rgb(name) for name in COLORS])
    painted = colors[(segments - 1) % len(colors)][:, None]
    return np.where(allowed[..., None], painted, 1.0)


def _texts(tokenizer: Tokenizer, ids: Array) -> list[str]:
    texts = []
    for part in np.split(ids, np.flatnonzero(np.diff(ids >= tokenizer.vocab_size)) + 1):
        known = not len(part) or part[0] < tokenizer.vocab_size
        texts += token_texts(tokenizer, part) if known else [f"⟨{i}⟩" for i in part.tolist()]
    return texts


def _span(text: str, segment: int, is_scored: bool) -> str:
    color = COLORS[(segment - 1) % len(COLORS)]
    shown = html.escape(visible(text))
    weight = "font-weight: bold" if is_scored else "opacity: 0.45"
    style = f"background: {color}; {weight}; border-right: 1px solid white; padding: 1px 0"
    return f'<span style="{style}">{shown}</span><wbr>'
