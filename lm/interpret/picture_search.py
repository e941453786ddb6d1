"""Embeddings of a source's pictures and captions: export, nearest neighbours, and their figure."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from lm.data.pipeline import evaluation_batch_at
from lm.storage.files import read_bytes, write_atomically
from lm.telemetry.figures import make_figure
from lm.training.experiment import Experiment
from lm.types import Params

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Rows of a source.

    pictures, texts: embeddings of length 1, float32 [N, E]. captions: [N]. images: uint8 [N, H, W,
    3].
    """

    pictures: np.ndarray
    texts: np.ndarray
    captions: np.ndarray
    images: np.ndarray

    def save(self, path: str) -> None:
        """Write a NumPy archive, an array for each field."""
        buffer = io.BytesIO()
        np.savez(buffer, **vars(self))
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str) -> Embedded:
        """Read what `save` wrote."""
        with np.load(io.BytesIO(read_bytes(path))) as arrays:
            return cls(**arrays)


def embed(experiment: Experiment, params: Params, source: str, *, num_rows: int = 512) -> Embedded:
    """The first `num_rows` rows of a validation source, by its path, embedded by a model of two
    towers.
    """
    rows, objective = experiment.validation[source], experiment.objective.for_evaluation()
    num_rows, size = min(num_rows, len(rows)), experiment.batch_size
    parts: list[tuple[np.ndarray, ...]] = []
    for number in range(-(-num_rows // size)):
        batch = evaluation_batch_at(rows, objective, number, batch_size=size)
        _, (found, *_) = experiment.embed_step(params, experiment.make_global_batch(batch))
        embeddings = jax.device_get(found)
        texts = [
            experiment.tokenizer.decode(ids[ids_are_text > 0])
            for ids, ids_are_text in zip(batch.inputs.ids, batch.inputs.segments, strict=True)
        ]
        assert batch.images is not None, "a batch of pictures"
        parts.append((embeddings[:, 0], embeddings[:, 1], np.array(texts), batch.images))
    return Embedded(*(np.concatenate(x)[:num_rows] for x in zip(*parts, strict=True)))


def nearest(queries: np.ndarray, embeddings: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` embeddings [N, E] that are nearest to each query [Q, E], the
    nearest first: [Q, count].
    """
    return np.argsort(-(queries @ embeddings.T), axis=1, kind="stable")[:, :count]


def search_figure(
    queries: Sequence[str | np.ndarray], found: np.ndarray, embedded: Embedded
) -> Figure:
    """A row for each query, a text or a picture [H, W, 3], with the pictures `found` [Q, count] and
    their captions.
    """
    figure, axes = make_figure(len(queries), 1 + found.shape[1], size=(1.6, 1.9), grid=False)
    for query, indices, row in zip(queries, found, axes, strict=True):
        for axis in row:
            axis.set_axis_off()
        if isinstance(query, str):
            row[0].text(0.5, 0.5, query, ha="center", va="center", wrap=True, fontsize=8)
        else:
            row[0].imshow(query)
            row[0].set_title("like this", fontsize=8)
        for axis, index in zip(row[1:], indices.tolist(), strict=True):
            axis.imshow(embedded.images[index])
            axis.set_title(embedded.captions[index], fontsize=6, wrap=True)
    return figure
