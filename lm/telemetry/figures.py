"""The style of all figures: matplotlib without a window and without global state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (6.5, 3.4), grid: bool = True
) -> tuple[Figure, np.ndarray]:
    """(figure, axes [rows, columns]), each axis of `size` in inches.

    grid: a faint grid and no frame at the top and right, for curves; without it, for images.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    if grid:
        for axis in axes.flat:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def shades(count: int) -> np.ndarray:
    """Colors from dark to light: float [count, 4]."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.9, count))
