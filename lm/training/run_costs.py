"""FLOPs of a run: of its model, of its teacher, and the peak of its devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm.models import flops

if TYPE_CHECKING:
    from lm.training.experiment import Experiment


def flops_per_token(experiment: Experiment) -> float:
    """Model FLOPs of training on one token, without the gradients of frozen parameters, and those
    of the teacher's forward pass.
    """
    own = flops.flops_per_token(
        experiment.config.model,
        experiment.config.data.length,
        experiment.config.data.encoder_length,
        parameters=flops.named_parameters(experiment.boxed_params),
        frozen=experiment.initializer.frozen,
    )
    return own + teacher_flops_per_token(experiment)


def teacher_flops_per_token(experiment: Experiment) -> float:
    """FLOPs of the teacher's forward pass for one token; 0 without one."""
    return 0.0 if experiment.teacher is None else experiment.teacher.flops_per_token


def teacher_share(experiment: Experiment) -> float:
    """The part of `flops_per_token` that is the teacher's."""
    return teacher_flops_per_token(experiment) / experiment.flops_per_token


def peak_flops(experiment: Experiment) -> float | None:
    """FLOP/s of all devices together; None where their peak is neither known nor given."""
    given = experiment.config.log.peak_flops_per_device
    kind = experiment.rules.mesh.devices.flat[0].device_kind
    peak = flops.peak_flops(kind, experiment.config.model.dtype) if given is None else given
    return None if peak is None else peak * experiment.rules.mesh.size
