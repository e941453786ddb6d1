"""A run that is saved and restored in between."""

import jax
import numpy as np

from lm.checkpoint.manager import Checkpoints
from lm.training.restore import restore


def assert_same_bits(make, folder):
    """Four steps end with the bits of two, a checkpoint in `folder`, and two of what it restores
    into another experiment.

    make: () -> an experiment.
    """

    def go(experiment, state, start, stop):
        for _, batch in experiment.batches(start, stop):
            state, _, _ = experiment.train_step(state, batch)
        return state

    experiment, again = make(), make()
    with Checkpoints(str(folder), experiment.config.checkpoint) as checkpoints:
        state = go(experiment, experiment.init_state(), 0, 2)
        checkpoints.save(state)
        whole = jax.device_get(go(experiment, state, 2, 4))
    with Checkpoints(str(folder), again.config.checkpoint) as checkpoints:
        state, _ = restore(again, checkpoints)
    resumed = jax.device_get(go(again, state, 2, 4))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
