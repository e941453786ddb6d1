"""Heat maps (layer x step) of a run's layers.jsonl."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lm.storage.epaths import StoragePath
from lm.telemetry import jsonl
from lm.telemetry.figures import make_figure
from lm.telemetry.metrics import LAYERS_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS = ("activation_rms", "attention_entropy", "gradient_norm", "update_to_weight")
SIZE, _COLUMNS = (4.0, 2.4), 3


def layers_figure(workdir: str, statistics: Sequence[str] = STATISTICS) -> Figure:
    """A heat map of each of these statistics and each group with values of several layers; colours
    by the logarithm where all values are positive. A run without any says so.
    """
    from matplotlib.colors import LogNorm

    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(dict)
    for record in jsonl.read(StoragePath(workdir) / LAYERS_FILE):
        for statistic in statistics:
            for group, values in record.get(statistic, {}).items():
                if isinstance(values, list):
                    found[statistic, group][record["step"]] = [float(x) for x in values]
    figure, axes = make_figure(-(-len(found) // _COLUMNS) or 1, _COLUMNS, size=SIZE, grid=False)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    if not found:
        text = "no statistics of layers: train with --config.log.layers_every=50"
        axes.flat[0].text(0, 0.5, text)
    names = sorted(found, key=lambda name: statistics.index(name[0]))
    for axis, name in zip(axes.flat, names, strict=False):
        steps = sorted(found[name])
        values = np.array([found[name][step] for step in steps]).T  # [L, steps]
        norm = LogNorm() if (values > 0).all() else None
        image = axis.pcolormesh(steps, range(len(values)), values, norm=norm, shading="nearest")
        axis.set_title("\n".join(name), fontsize=9)
        axis.set(xlabel="step", ylabel="layer", yticks=range(0, len(values), -(-len(values) // 8)))
        figure.colorbar(image, ax=axis)
    return figure
