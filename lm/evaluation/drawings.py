"""Drawings of `synthetic:shapes` against their prompts: colours, shapes and places read from
pixels (`lm.data.shapes.decode`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lm.data import shapes
from lm.data.shapes import Scene
from lm.generation.pictures import Painter
from lm.generation.sampling import Sampling
from lm.training.picture_codes import PictureCoder


def evaluate_drawings(
    painter: Painter,
    coder: PictureCoder,
    count: int,
    *,
    sampling: Sampling,
    guidance: float = 1.0,
    split: str = "held_out",
    report: Callable[[int, int], object] = lambda done, count: None,
) -> dict[str, float]:
    """`compare` of a drawing for each of `count` prompts of a split, every arrangement as often as
    any other.
    """
    scenes = shapes.arrangements(split)
    numbers = shapes.scene_numbers(np.arange(count), seed=sampling.seed, split=split)
    wanted = [scenes[number] for number in numbers.tolist()]
    prompts = [scene.caption for scene in wanted]
    codes, _ = painter.draw(prompts, sampling=sampling, guidance=guidance, report=report)
    return compare(wanted, coder.decode(codes[:, 0]))


def compare(wanted: Sequence[Scene], pictures: np.ndarray) -> dict[str, float]:
    """Shares of pictures, uint8 [n, size, size, 3], that show what is wanted: `right`, all of it;
    `colors` and `shapes`, both of them; `relation`; and `readable`, two objects of known shapes.
    """
    pairs = list(zip(wanted, shapes.decode(pictures), strict=True))

    def share(*names: str) -> float:
        def values(scene: Scene) -> list[str]:
            return [getattr(scene, name) for name in names]

        return float(np.mean([x is not None and values(x) == values(s) for s, x in pairs]))

    return {
        "drawings": float(len(pairs)),
        "right": share(*Scene._fields),
        "colors": share("color", "other_color"),
        "shapes": share("shape", "other_shape"),
        "relation": share("relation"),
        "readable": share(),
    }
