"""Consensus of all processes about the end of a step: one small all-gather a step."""

from __future__ import annotations

import dataclasses
import signal

import jax
import numpy as np

from lm.parallel.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Vote:
    """Requests of one process, or of any of them, at the end of a step."""

    signal: signal.Signals | None = None  # a request to save and end
    save: bool = False


class Consensus:
    """An all-gather of each process's vote and of the seconds in which its host held up the step.

    The devices compute it behind the step, so that its result is read with the step's metrics. One
    process needs none.
    """

    def __init__(self, rules: Rules) -> None:
        mesh = rules.mesh
        self._by_device = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
        self._gather = jax.jit(lambda x: x, out_shardings=rules.sharding())
        self._owners = [device.process_index for device in mesh.devices.flat]

    def start(self, vote: Vote, seconds: float) -> jax.Array | np.ndarray:
        """Dispatch the all-gather; `collect` takes what this returns."""
        own = np.array([[float(vote.signal or 0), float(vote.save), seconds]], np.float32)
        if jax.process_count() == 1:
            return own
        shape = (len(self._owners), own.shape[1])
        return self._gather(jax.make_array_from_callback(shape, self._by_device, lambda _: own))

    def collect(self, votes: jax.Array | np.ndarray) -> tuple[Vote, int, float]:
        """(requests of any process, the slowest process, its seconds beyond the fastest one's)."""
        number, save, seconds = np.asarray(votes).T
        vote = Vote(signal.Signals(int(number.max())) if number.any() else None, bool(save.any()))
        slowest = self._owners[int(seconds.argmax())] if len(seconds) > 1 else 0
        return vote, slowest, float(seconds.max() - seconds.min())
