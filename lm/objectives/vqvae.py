"""Reconstruction of pictures by a VQ-VAE (arXiv:1711.00937).

The unit of all sums is the picture: `tokens` counts pictures, and each contributes the means over
its own pixels and latents. `loss` is the squared error of pixels, of 0 to 1, over `variance`;
`commitment` the squared distance of latents from their codes. Captions are read and not used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.config.fields import field
from lm.data.rows import RowLayout, Rows
from lm.objectives import ModelInterface, Objective, RowGenerator
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Batch, HostBatch, Tokens

if TYPE_CHECKING:
    from lm.types import Array


@dataclasses.dataclass(frozen=True)
class Config:
    commitment: float = field(0.25, "Coefficient of the commitment loss.", ge=0)
    variance: float = field(
        0.06, "Variance of pixels, which squared errors are divided by; of CIFAR-10: 0.06.", gt=0
    )


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the objective; its model is lm.models.vqvae."""
    del tokenizer
    if interface.image_size is None or interface.batch_size is None:
        raise ValueError("config.objective.name=vqvae needs a model of pictures: vqvae")
    batch_size = interface.batch_size

    def pictures(rows: Rows, rng: RowGenerator) -> HostBatch:
        return Batch(
            inputs=Tokens(rows.ids, rows.segments, rows.positions),
            targets=rows.ids,
            weights=(rows.segments != 0).astype(np.float32),
            images=rows.images,
        )

    def loss(
        model: Any, params: Any, batch: Batch, rng: Array, *, train: bool, config: Any, step: Any
    ) -> tuple[Array, dict[str, Array]]:
        del rng, config, step
        return model.apply({"params": params}, batch, train=train, method="losses", **options)

    options = dataclasses.asdict(config) | {"batch_size": batch_size}
    layout = RowLayout((interface.length,), image_size=interface.image_size)
    return Objective(pictures, layout, loss=loss, summarize=lambda s: summarize(s, config.variance))


def summarize(sums: Mapping[str, np.ndarray], variance: float) -> dict[str, float]:
    """Return the figures of a whole evaluation: `squared_error` of pixels of 0 to 1, and `psnr`,
    the same in dB; `codes_used`, and `code_perplexity`, the exponential of the entropy of codes.
    """
    uses, pictures = np.asarray(sums["code_uses"], np.float64), max(float(sums["tokens"]), 1.0)
    share = uses[uses > 0] / max(uses.sum(), 1.0)
    error = variance * float(sums["loss"]) / pictures
    return {
        "tokens": float(sums["tokens"]),
        "loss": float(sums["loss"]) / pictures,
        "commitment": float(sums["commitment"]) / pictures,
        "squared_error": error,
        "psnr": float(-10 * np.log10(max(error, 1e-12))),
        "codes_used": float(np.sum(uses > 0)),
        "code_perplexity": float(np.exp(-np.sum(share * np.log(share)))),
    }
