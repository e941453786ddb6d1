"""The learning rate over a run, as a fraction of its peak."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

from lm.config.schema import ScheduleConfig


def decay_steps(config: ScheduleConfig, num_steps: int) -> int:
    """Steps of the final decay of wsd in a run of `num_steps`."""
    return max(1, num_steps // 5) if config.decay_steps is None else config.decay_steps


def check(config: ScheduleConfig, num_steps: int) -> None:
    """Raises ValueError, naming config path and numbers, for a schedule that a run of `num_steps`
    has no room for.
    """
    warmup, final = config.warmup_steps, config.final_fraction
    decay = decay_steps(config, num_steps)
    needed = warmup + (decay if config.kind == "wsd" else 0)
    if needed > num_steps:
        raise ValueError(
            f"config.optimizer.schedule: warmup_steps ({warmup}) and decay need {needed} steps; "
            f"the run has {num_steps}"
        )
    if config.kind == "range" and not 0 < final < 1:
        raise ValueError(
            f"config.optimizer.schedule.final_fraction ({final}) must be above 0 and below 1, for "
            "kind=range to begin with"
        )


def make_schedule(config: ScheduleConfig, num_steps: int) -> optax.Schedule:
    """step -> fraction of the peak learning rate; step 0 of a warm-up of w has 1 / w, not zero.

    Raises:
        ValueError: as `check`.
    """
    check(config, num_steps)
    warmup, final = config.warmup_steps, config.final_fraction
    rest, start, decay = max(1, num_steps - warmup), max(1, warmup), decay_steps(config, num_steps)
    kinds: dict[str, optax.Schedule] = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, rest, alpha=final),
        "linear": optax.linear_schedule(1.0, final, rest),
        "inverse_sqrt": lambda step: jnp.sqrt(start / (start + step)),
        # arXiv:1506.01186, in equal ratios
        "range": lambda step: final ** (1 - step / max(1, rest - 1)),
        # warm-up, stable, decay: arXiv:2404.06395
        "wsd": optax.linear_schedule(1.0, final, decay, transition_begin=max(0, rest - decay)),
    }
    main = kinds[config.kind]
    if warmup == 0:
        return main
    ramp = optax.linear_schedule(1 / warmup, 1.0, max(1, warmup - 1))
    return optax.join_schedules([ramp, main], [warmup])


def fractions(config: ScheduleConfig, num_steps: int, stop: int) -> np.ndarray:
    """The fractions of the peak learning rate of all steps before `stop`, float32 [stop]."""
    steps = jnp.arange(stop)
    found = make_schedule(config, num_steps)(steps)
    return np.broadcast_to(np.asarray(found, np.float32), steps.shape)
