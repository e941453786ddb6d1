"""Drawings ranked by how similar a contrastive model finds them to their prompts, as DALL-E's were
(arXiv:2102.12092, section 2.6).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.config import conversion
from lm.data import images
from lm.training.evaluation import embed_images, embed_texts
from lm.training.restore import restore_params
from lm.training.stored_run import load
from lm.types import Device


class PictureRanker:
    """The contrastive model of a run's newest checkpoint."""

    def __init__(self, workdir: str, devices: Sequence[Device]) -> None:
        """Raises ValueError where the run is of another objective."""
        self.workdir, self.experiment = workdir, load(workdir, devices)
        names = conversion.names(self.experiment.config_dict)
        if names["objective"] != "contrastive":
            raise ValueError(
                f"--rank={workdir} is a run of config.objective.name={names['objective']}, not of "
                "contrastive"
            )
        _, self._params = restore_params(self.experiment, workdir)

    def similarities(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        """Cosines, float32 [n, samples], of prompts with each of their pictures, uint8 [n, samples,
        size, size, 3]. Raises ValueError where a prompt is too long for the model.
        """
        size = self.experiment.config.model.image_size
        flat = [images.resize(x, size) for x in pictures.reshape(-1, *pictures.shape[2:])]
        of_pictures = embed_images(self.experiment, self._params, np.stack(flat))
        try:
            of_texts = embed_texts(self.experiment, self._params, prompts)
        except ValueError as error:
            raise ValueError(f"--rank={self.workdir}: {error}") from None
        return np.einsum("ne,nse->ns", of_texts, of_pictures.reshape(*pictures.shape[:2], -1))


def best_first(pictures: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [n, samples, ...] and scores [n, samples], the largest score of each row first."""
    order = np.argsort(-scores, axis=1, kind="stable")
    rows = np.arange(len(order))[:, None]
    return pictures[rows, order], scores[rows, order]
