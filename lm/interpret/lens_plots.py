"""Figures and HTML text of what `lm.interpret.logit_lens` computes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lm.interpret.logit_lens import Norms
from lm.interpret.markup import blend, colored_text, visible
from lm.interpret.token_losses import TokenLosses
from lm.telemetry import fonts
from lm.telemetry.figures import make_figure
from lm.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE = (33, 102, 172), (214, 96, 19)  # for and against


def lens_figure(
    lens: TokenLosses, texts: Sequence[str], guesses: Sequence[Sequence[str]]
) -> Figure:
    """The guess of every layer after each token of one row, coloured by its probability.

    lens: [L, 1, T]; texts: [T], the inputs; guesses: [L][T], the text of `lens.guesses`.
    """
    confidence = np.asarray(lens.confidence)[:, 0]
    layers, length = confidence.shape
    families = fonts.families("".join([*texts, *(g for row in guesses for g in row)]), "monospace")
    size = (1.5 + 0.62 * length, 1.6 + 0.34 * layers)
    figure, [[axis]] = make_figure(size=size, grid=False)
    image = axis.imshow(confidence, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    style = {"ha": "center", "va": "center", "fontsize": 7, "family": families}
    for (layer, t), share in np.ndenumerate(confidence):
        guess = fonts.readable(visible(guesses[int(layer)][int(t)])[:7], families)
        axis.text(t, layer, guess, color="white" if share > 0.6 else "black", **style)
    names = [fonts.readable(visible(text)[:9], families) for text in texts]
    axis.set_xticks(range(length), names, rotation=60, ha="right", fontsize=8, family=families)
    axis.set_yticks(range(layers), [f"after layer {i}" for i in range(layers)], fontsize=8)
    axis.set_xlabel("token that was read")
    axis.tick_params(length=0)
    figure.colorbar(image, ax=axis, shrink=0.7, label="probability of the guess")
    return figure


def lens_loss_figure(lens: TokenLosses, weights: Array) -> Figure:
    """The mean loss after each layer, over scored tokens."""
    scored = np.asarray(weights) > 0
    nll = np.asarray(lens.nll)[:, scored].mean(axis=1)
    figure, [[axis]] = make_figure()
    layers = np.arange(len(nll))
    axis.plot(layers, nll, marker="o")
    for layer, loss in zip(layers, nll, strict=True):
        axis.annotate(f"{loss:.2f}", (layer, loss), (0, 7), textcoords="offset points", ha="center")
    axis.set(xlabel="after layer", ylabel="loss (nats per token)", xticks=layers)
    axis.margins(y=0.15)
    return figure


def norms_figure(norms: Norms, weights: Array) -> Figure:
    """Norms of the residual stream and of each layer's update: median, and the middle 80%."""
    scored = np.asarray(weights) > 0
    figure, [[axis]] = make_figure()
    for name, values in (("residual stream", norms.stream), ("update", norms.update)):
        low, middle, high = np.quantile(np.asarray(values)[:, scored], (0.1, 0.5, 0.9), axis=1)
        layers = np.arange(len(middle))
        [line] = axis.plot(layers, middle, marker="o", label=name)
        axis.fill_between(layers, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axis.set(xlabel="layer", ylabel="root mean square", xticks=layers, yscale="log")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def attributions_html(texts: Sequence[str], values: Array, answer: str) -> str:
    """HTML text coloured by the share of each token for (blue) or against (orange) `answer`.

    texts: [T]; values: [T], in nats, also in the tokens' hints.
    """
    shares = np.asarray(values, np.float64)
    largest = max(float(np.abs(shares).max()), 1e-9)
    tokens = [
        (
            text,
            blend(_BLUE if value > 0 else _ORANGE, 0.75 * abs(value) / largest),
            f"{visible(text)}: {value:+.2f} nats",
        )
        for text, value in zip(texts, shares.tolist(), strict=True)
    ]
    return colored_text(
        tokens,
        f"for <b>{html.escape(visible(answer))}</b>: blue speaks for it, orange against; "
        f"{shares.sum():+.2f} nats in all, at most {largest:.2f} from one token",
    )


def pairs_figure(pairs: Sequence[tuple[str, str]], nats: Array) -> Figure:
    """Bars of log p(first) - log p(second) of minimal pairs. nats: [pairs, 2], their losses."""
    gains = np.asarray(nats)[:, 1] - np.asarray(nats)[:, 0]
    figure, [[axis]] = make_figure(size=(9.0, 1.2 + 0.34 * len(pairs)))
    heights = np.arange(len(pairs))[::-1]
    colors = ["C0" if gain > 0 else "C1" for gain in gains]
    axis.barh(heights, gains, color=colors, height=0.6)
    families = fonts.families("".join(text for pair in pairs for text in pair), "monospace")
    names = [fonts.readable(f"{visible(a)}  |  {visible(b)}", families) for a, b in pairs]
    axis.set_yticks(heights, names, fontsize=8, family=families)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_xlabel("nats by which the first is likelier than the second")
    return figure
