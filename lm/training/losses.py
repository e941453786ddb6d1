"""The loss of an objective: of tokens, of its own, or of pairs of rows."""

from __future__ import annotations

from lm.config.schema import Config, LossConfig
from lm.layers import cross_entropy, pair_loss
from lm.objectives import Objective
from lm.parallel import pipeline_stages
from lm.types import Array, Batch, LossFn, Model, Params, Sums


def check(objective: Objective, config: Config) -> None:
    """Raise ValueError where a loss over pairs of rows is asked for what only sums have, or several
    stages for statistics of layers.
    """
    if config.log.layers_every and config.mesh.stage > 1:
        raise ValueError(
            f"config.log.layers_every ({config.log.layers_every}) must be 0 on several stages "
            f"(config.mesh.stage={config.mesh.stage}): layers are measured one by one"
        )
    if objective.pairs is not None and config.log.noise_scale:
        raise ValueError(
            "config.log.noise_scale compares the gradients of micro-batches, which a loss over "
            "pairs of all rows of a batch doesn't have: set it to False"
        )


def make(
    objective: Objective,
    model: Model,
    config: LossConfig,
    *,
    train: bool,
    step: Array | None = None,
    teacher: tuple[Model, Params] | None = None,
) -> LossFn:
    """The loss of a batch: a SUM to differentiate, and additive sums.

    step: of the run, for an objective's own loss; None in evaluation. teacher: for one that asks
    for it (lm.training.teacher).

    Raises:
        ValueError: the model cannot be trained with it.
    """
    if objective.pairs is not None:
        return pair_loss.make(model, objective.pairs.kind, train=train)

    others = {} if teacher is None else {"teacher": teacher}

    def loss_fn(params: Params, batch: Batch, rng: Array) -> tuple[Array, Sums]:
        if train:
            batch = pipeline_stages.interleave(model.rules, model.num_pipeline_microbatches, batch)
        if objective.loss is not None:
            options = {"train": train, "config": config, "step": step, **others}
            return cross_entropy.objective_loss(
                objective.loss, model, params, batch, rng, **options
            )
        own = {
            "tasks": objective.tasks if batch.tasks is not None else (),
            "parts": objective.parts,
        }
        return cross_entropy.lm_loss(model, params, batch, rng, train=train, config=config, **own)

    return loss_fn
