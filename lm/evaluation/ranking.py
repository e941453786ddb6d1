"""Drawings ranked by how similar a contrastive model finds them to their prompts, as DALL-E's were
(arXiv:2102.12092, section 2.6).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from lm.config import conversion
from lm.data import images
from lm.parallel import sharding
from lm.training.restore import restore_params
from lm.training.stored_run import load
from lm.types import Device, HostTokens, Tokens


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
        size, size, 3].
        """
        size = self.experiment.config.model.image_size
        flat = [images.resize(x, size) for x in pictures.reshape(-1, *pictures.shape[2:])]
        of_pictures = self._embed("embed_images", np.stack(flat))
        of_texts = self._embed("embed_texts", self._texts(prompts))
        return np.einsum("ne,nse->ns", of_texts, of_pictures.reshape(*pictures.shape[:2], -1))

    def _texts(self, prompts: Sequence[str]) -> HostTokens:
        """The tokens of prompts as training has captions; ValueError where one is too long."""
        config, tokenizer = self.experiment.config, self.experiment.tokenizer
        start = [tokenizer.bos_id] if config.objective.begins_with_bos else []
        ids = np.zeros((len(prompts), config.data.length), np.int32)
        segments = np.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            found = [*start, *tokenizer.encode(prompt), tokenizer.eos_id]
            if len(found) > ids.shape[1]:
                raise ValueError(
                    f"prompt {i} has {len(found)} tokens, captions of --rank={self.workdir} at "
                    f"most config.data.length ({ids.shape[1]})"
                )
            ids[i, : len(found)], segments[i, : len(found)] = found, 1
        return Tokens(ids, segments, np.arange(ids.shape[1], dtype=np.int32) * segments)

    def _embed(self, method: str, rows: np.ndarray | HostTokens) -> np.ndarray:
        """Embeddings, float32 [n, E], of all rows at once, which the devices divide."""
        rules, model = self.experiment.rules, self.experiment.model
        count = len(jax.tree.leaves(rows)[0])
        missing = -count % rules.size("batch")

        def put(x: np.ndarray) -> jax.Array:
            padded = np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
            return jax.device_put(padded, rules.sharding(*sharding.row_axes(x.ndim)))

        run = jax.jit(lambda params, x: model.apply({"params": params}, x, method=method))
        return np.asarray(run(self._params, jax.tree.map(put, rows)))[:count]


def best_first(pictures: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [n, samples, ...] and scores [n, samples], the largest score of each row first."""
    order = np.argsort(-scores, axis=1, kind="stable")
    rows = np.arange(len(order))[:, None]
    return pictures[rows, order], scores[rows, order]
