"""SeqGAN (arXiv:1609.05473) on its synthetic task. The step decides which of the two networks has a
loss, and which loss:

    pretrain_steps          the generator: maximum likelihood
    discriminator_steps     the discriminator: rows of the data against those of the generator
    then, in turns          `g_steps` of the generator: policy gradient
                            `d_steps` of the discriminator

The policy gradient is that of sum_t (Q_t - Q_{t-1}) log p(y_t | y_<t) over sequences y that the
generator draws. Q_t is the mean probability to be data that the discriminator gives to
`num_rollouts` completions of y_1 ... y_t by the generator itself, which is the paper's roll-out
policy while `g_steps` is 1; Q_T is that of y. The baseline Q_{t-1} does not depend on y_t, so that
the gradient is the paper's in the mean; the paper has none.

An evaluation reports nats per token: `loss` of held-out sequences under the generator, their
`entropy` under the oracle, and `oracle_nll` of sequences that the generator draws, one for each
row; the first and the last also at each of `temperatures` of the softmax (arXiv:1811.02549).

Draws are by a key for each row, which belongs to the row and the step in training, and to the row
in evaluation, whatever batch, device or micro-batch it is in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.config.fields import check_values, field
from lm.data.rows import RowLayout, Rows
from lm.objectives import ModelInterface, Objective, RowGenerator, causal
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Batch, HostBatch

if TYPE_CHECKING:
    from lm.types import Array


@dataclasses.dataclass(frozen=True)
class Config:
    pretrain_steps: int = field(1000, "Steps of maximum likelihood.", ge=0)
    discriminator_steps: int = field(500, "Steps of the discriminator alone, after those.", ge=0)
    g_steps: int = field(1, "Steps of the generator in a round of adversarial training.", ge=1)
    d_steps: int = field(5, "Steps of the discriminator in a round.", ge=0)
    num_rollouts: int = field(16, "Completions of each prefix.", ge=1)
    baseline: str = field(
        "prefix",
        "Subtracted from a token's reward: that of the tokens before it (prefix), or nothing.",
        choices=("prefix", "none"),
    )
    temperatures: tuple[float, ...] = field((), "Evaluation: of the softmax, beside 1.", gt=0)


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the objective; its model is lm.models.seqgan, its rows synthetic:oracle."""
    check_values(config, "config.objective")
    plain = causal.build(causal.Config(), tokenizer, interface)

    def training(rows: Rows, rng: RowGenerator) -> HostBatch:
        if not (rows.segments == 1).all():
            raise ValueError(
                "config.objective.name=seqgan takes sequences that fill their rows: set "
                "config.data.train to synthetic:oracle"
            )
        return plain.make(rows, rng)

    def evaluation(rows: Rows, rng: RowGenerator) -> HostBatch:
        keys = [rng(i).integers(2**32, dtype=np.uint32) for i in range(len(rows.ids))]
        return dataclasses.replace(plain.make(rows, rng), records=np.array(keys, np.uint32))

    def phase(step: Array) -> Array:
        """0, 1 or 2, as `lm.models.seqgan.SeqGan.losses` takes it."""
        after = step - config.pretrain_steps - config.discriminator_steps
        is_policy = (after >= 0) & (after % (config.g_steps + config.d_steps) < config.g_steps)
        return (step >= config.pretrain_steps) * (1 + is_policy)

    settings = config

    def loss(
        model: Any,
        params: Any,
        batch: Batch,
        rng: Array,
        *,
        train: bool,
        config: Any,
        step: Array | None,
    ) -> tuple[Array, dict[str, Array]]:
        del config
        if not hasattr(model, "figures"):
            raise ValueError("config.objective.name=seqgan needs config.model.name=seqgan")
        if not train:
            return model.figures(params, batch, temperatures=tuple(settings.temperatures))
        assert step is not None, "a training step has a number"
        options = {
            "phase": phase(step),
            "num_rollouts": settings.num_rollouts,
            "subtract_prefix": settings.baseline == "prefix",
        }
        return model.losses(params, batch, rng, **options)

    return Objective(
        training,
        RowLayout((interface.length,), num_ids=interface.num_ids(tokenizer)),
        loss=loss,
        summarize=summarize,
        make_evaluation=evaluation,
    )


def summarize(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the figures of a whole evaluation: nats per token, and `discriminator_accuracy`."""
    tokens = max(float(sums["tokens"]), 1.0)
    result = {n: float(x) / tokens for n, x in sums.items() if n not in ("tokens", "objective")}
    perplexity = math.exp(min(result["loss"], 700.0))
    return {**result, "tokens": float(sums["tokens"]), "perplexity": perplexity}
