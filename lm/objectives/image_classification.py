"""Classification of pictures: the class is that whose name the caption is, or begins with.

The unit of all sums is the picture: a row has one target, the number of its class.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from lm.config.fields import field
from lm.data import images
from lm.data.rows import RowLayout, Rows
from lm.objectives import ModelInterface, Objective, RowGenerator
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Batch, HostBatch, Tokens


@dataclasses.dataclass(frozen=True)
class Config:
    labels: tuple[str, ...] = field(
        (),
        "The classes, by their numbers: captions, or the words that captions begin with; of "
        "several that fit, the longest counts, and an empty one fits all.",
    )
    flip: bool = field(False, "Mirror every other picture in training.")
    crop: float = field(
        1.0, "Smallest share of a picture that crops of training keep; 1: all of it.", gt=0, le=1
    )


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the objective; its model is lm.models.vit. A batch whose caption has no label raises
    ValueError.
    """
    if (size := interface.image_size) is None or interface.num_classes is None:
        raise ValueError(
            "config.objective.name=image_classification needs a model of pictures and classes: "
            "config.model.name=vit"
        )
    if not 2 <= len(set(config.labels)) == len(config.labels) <= interface.num_classes:
        raise ValueError(
            f"config.objective.labels ({len(config.labels)}) must name two classes or more, each "
            f"once, and at most config.model.num_classes ({interface.num_classes})"
        )
    numbers = {label: i for i, label in enumerate(config.labels)}

    @functools.lru_cache(maxsize=2**16)
    def class_of(caption: bytes) -> int:
        text = tokenizer.decode(np.frombuffer(caption, np.int32)).strip()
        words = text.split(" ")
        for count in range(len(words), -1, -1):
            if (found := numbers.get(" ".join(words[:count]))) is not None:
                return found
        raise ValueError(
            f"the caption {text!r} is none of config.objective.labels, and begins with none: "
            f"{', '.join(config.labels[:20])}{' ...' if len(config.labels) > 20 else ''}"
        )

    def pictures(rows: Rows, rng: RowGenerator) -> HostBatch:
        lengths = (rows.segments != 0).sum(1)
        there = (lengths > 0).astype(np.int32)[:, None]
        classes = [
            class_of(ids[: length - 1].astype(np.int32).tobytes()) if length else 0
            for ids, length in zip(rows.ids, lengths.tolist(), strict=True)
        ]
        return Batch(
            inputs=Tokens(np.zeros_like(there), there, np.zeros_like(there)),
            targets=np.array(classes, np.int32)[:, None],
            weights=there.astype(np.float32),
            images=rows.images,
        )

    scale = (config.crop, 1.0) if config.crop < 1 else None

    def augmented(rows: Rows, rng: RowGenerator) -> HostBatch:
        batch = pictures(rows, rng)
        assert batch.images is not None, "the layout has pictures"
        changed = images.augment(batch.images, rng, flip=config.flip, crop_scale=scale, size=size)
        return dataclasses.replace(batch, images=changed)

    layout = RowLayout((interface.length,), image_size=size)
    return Objective(augmented, layout, make_evaluation=pictures)
