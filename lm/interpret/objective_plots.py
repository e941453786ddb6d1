"""The batches of an objective: the text of their streams, and their attention masks."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

from lm.interpret.attention_maps import cut
from lm.interpret.markup import COLORS, mask_image, token_texts, visible
from lm.kernels.dot_product import Mask, self_mask
from lm.objectives import ModelInterface
from lm.telemetry.figures import make_figure
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Array, Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def objective_html(tokenizer: Tokenizer, batch: Batch, row: int) -> str:
    """The streams of a row as HTML: a colour for each document, scored targets in bold.

    Ids that the tokenizer does not have, sentinels and masks among them, show their number.
    """
    inputs = batch.inputs
    streams = {
        "inputs": (inputs.ids, inputs.segments, inputs.segments),
        "targets": (batch.targets, inputs.segments, batch.weights),
    }
    if batch.encoder is not None:
        ids, segments = batch.encoder.ids, batch.encoder.segments
        streams = {"encoder": (ids, segments, segments), **streams}
    style = "padding: 2px 8px; vertical-align: top; text-align: left"
    lines = []
    for name, arrays in streams.items():
        ids, segments, scored = (x[row][arrays[1][row] > 0] for x in arrays)
        spans = map(_span, _texts(tokenizer, ids), segments.tolist(), (scored > 0).tolist())
        cells = f'<th style="{style}">{name}</th><td style="{style}">{"".join(spans)}</td>'
        lines.append(f"<tr>{cells}</tr>")
    style = "font: 12px/1.7 monospace; border-collapse: collapse; background: white; color: #222"
    return f'<table style="{style}">{"".join(lines)}</table>'


def objective_figure(form: ModelInterface, batch: Batch, row: int) -> Figure:
    """The attention masks of a row, a colour for each document; dots at the left: scored positions.

    With an encoder: its own mask, the decoder's, and that of cross-attention.
    """
    inputs = cut(batch.inputs, row)
    masks = [("inputs", "inputs", self_mask(inputs, causal=form.is_causal), inputs)]
    if batch.encoder is not None:
        encoder = cut(batch.encoder, row)
        cross = Mask(
            inputs.segments, inputs.positions, encoder.segments, encoder.positions, causal=False
        )
        masks.insert(0, ("encoder", "encoder", self_mask(encoder, causal=False), encoder))
        masks.append(("inputs", "encoder", cross, inputs))
    figure, axes = make_figure(1, len(masks), size=(4.4, 4.2), grid=False)
    for axis, (queries, keys, mask, tokens) in zip(axes[0], masks, strict=True):
        image = mask_image(mask.allowed()[0], tokens.segments[0])
        axis.imshow(image, interpolation="nearest")
        axis.set(xlabel=f"keys: {keys}", ylabel=f"queries: {queries}")
        axis.locator_params(integer=True)
        if queries == "inputs":
            scored = np.flatnonzero(batch.weights[row])
            axis.plot(np.full(len(scored), -1.5), scored, "k.", markersize=2, clip_on=False)
    return figure


def _texts(tokenizer: Tokenizer, ids: Array) -> list[str]:
    texts = []
    for part in np.split(ids, np.flatnonzero(np.diff(ids >= tokenizer.vocab_size)) + 1):
        known = not len(part) or part[0] < tokenizer.vocab_size
        texts += token_texts(tokenizer, part) if known else [f"⟨{i}⟩" for i in part.tolist()]
    return texts


def _span(text: str, segment: int, is_scored: bool) -> str:
    weight = "font-weight: bold" if is_scored else "opacity: 0.45"
    style = f"{weight}; border-right: 1px solid white; padding: 1px 0"
    color = COLORS[(segment - 1) % len(COLORS)]
    shown = html.escape(visible(text))
    return f'<span style="background: {color}; {style}">{shown}</span><wbr>'
