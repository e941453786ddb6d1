"""Length of a run in optimizer steps, from steps, tokens or epochs."""

from __future__ import annotations

import math
from collections.abc import Callable

from lm.config.schema import Config
from lm.data.pipeline import OutOfData
from lm.optim import schedules

LENGTHS = ("num_steps", "num_tokens", "num_epochs")  # of `config.train`: one of them is set


def given_length(config: Config) -> str:
    """The config key of `LENGTHS` that sets the length.

    Raises:
        ValueError: not one of them is set.
    """
    given = [name for name in LENGTHS if getattr(config.train, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"set one of config.train.num_steps, num_tokens and num_epochs; set: {given or 'none'}"
        )
    return given[0]


def num_steps(config: Config, batch_size: int, num_batches: Callable[[float], int]) -> int:
    """Optimizer steps of the whole run.

    num_batches: global batches in a number of epochs of the training data.

    Raises:
        OutOfData: they need more than `max_epochs`.
        ValueError: no length is given, or the schedule needs more steps.
    """
    t, name = config.train, given_length(config)
    length = f"config.train.{name} ({getattr(t, name)})"
    if t.num_steps is not None:
        steps = t.num_steps
    elif t.num_tokens is not None:
        steps = math.ceil(t.num_tokens / (batch_size * config.data.length))
    else:
        steps = num_batches(t.num_epochs or 0.0)
    if steps < 1:
        raise ValueError(f"{length} gives {steps} steps")
    if t.max_epochs is not None and steps > num_batches(t.max_epochs):
        raise OutOfData(
            f"{length} is {steps} steps of {batch_size} rows; config.train.max_epochs "
            f"({t.max_epochs}) of the data are {num_batches(t.max_epochs)}"
        )
    schedules.check(config.optimizer.schedule, steps)
    return steps
