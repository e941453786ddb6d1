"""Tokens to look at: their texts, HTML text and tables in colours, images of masks."""

from __future__ import annotations

import codecs
import html
from collections.abc import Iterable, Sequence

import numpy as np

from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Array

# The colours of the documents of a row, in turn; light enough for text on top.
COLORS = ("#8ecae6", "#ffb775", "#a3d9a5", "#f4a6b8", "#c3b1e1", "#e9d985", "#9fd8cf", "#d3bba3")
_BOX = (
    "font: 13px/1.6 monospace; white-space: pre-wrap; background: white; color: #222; "
    "border: 1px solid #ddd; padding: 8px 12px; max-height: 460px; overflow: auto"
)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token: special ids show their name, parts of characters U+FFFD."""
    names = {tokenizer.pad_id: "⟨pad⟩", tokenizer.bos_id: "⟨bos⟩", tokenizer.eos_id: "⟨eos⟩"}
    return names.get(token) or tokenizer.decode([token])


def token_texts(tokenizer: Tokenizer, ids: Array | np.ndarray) -> list[str]:
    """The texts of a stream's tokens; a character of several tokens is in the text of the last."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for token in np.asarray(ids).tolist():
        data = tokenizer.decode_bytes([token])
        texts.append(decoder.decode(data) if data else token_text(tokenizer, token))
    return texts


def visible(text: str) -> str:
    """Text with its white space made visible: `a·b↵`."""
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


def blend(color: tuple[int, int, int], share: float) -> str:
    """A CSS colour between white (share 0) and `color` (share 1)."""
    share = min(max(share, 0.0), 1.0)
    return f"rgb({', '.join(str(round(255 + share * (c - 255))) for c in color)})"


def box(content: str, legend: str = "") -> str:
    """HTML `content` in a frame, below a legend."""
    above = f'<div style="font: 12px sans-serif; margin: 4px 0">{legend}</div>' if legend else ""
    return f'{above}<div style="{_BOX}">{content}</div>'


def colored_text(tokens: Iterable[tuple[str, str, str]], legend: str) -> str:
    """HTML text of tokens: (text, CSS colour, hint when the mouse is over it) each."""
    spans = []
    for text, color, hint in tokens:
        shown = html.escape(text).replace("\n", '<span style="color: #aaa">↵</span>\n')
        title = html.escape(hint)
        spans.append(f'<span style="background: {color}" title="{title}">{shown}</span>')
    return box("".join(spans), legend)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> str:
    """HTML of a table whose columns `right` are aligned to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        style = "font: 12px monospace; white-space: pre; text-align:"
        sides = ("right" if i in right else "left" for i in range(len(cells)))
        return "".join(
            f'<{tag} style="{style} {side}">{html.escape(cell)}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )

    lines = [line("th", header)] if header else []
    lines += [line("td", row) for row in rows]
    return f"<table>{''.join(f'<tr>{cells}</tr>' for cells in lines)}</table>"


def paint(segments: Array, colors: Sequence[str] = COLORS) -> np.ndarray:
    """float [..., 3]: the colour of each segment of `segments` [...]; padding is white."""
    from matplotlib.colors import to_rgb

    palette, number = np.array([to_rgb(color) for color in colors]), np.asarray(segments)
    return np.where(number[..., None] > 0, palette[(number - 1) % len(palette)], 1.0)


def mask_image(allowed: Array, segments: Array) -> np.ndarray:
    """float [T, S, 3]: the colour of the query's document where it attends to the key, else white.

    allowed: bool [T, S]; segments: [T], of the queries.
    """
    return np.where(np.asarray(allowed)[..., None], paint(segments)[:, None], 1.0)
