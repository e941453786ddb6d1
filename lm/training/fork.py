"""A run that branches off another one: it goes on from that one's state, in a folder of its own.

A run is a function of (config, step), so two runs whose configs agree on all steps before step n
have the same state there. A branch is allowed only where that holds: it then is, bit for bit, the
run that it would be without the other one, and the steps that they share are paid for once. With a
warm-up-stable-decay schedule (arXiv:2404.06395) runs of all lengths share their steps up to the
decay, so one long run and a cool-down for each length are as many whole runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.checkpoint.manager import Checkpoints
from lm.checkpoint.parent import ParentCheckpoint
from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.optim.schedules import fractions
from lm.types import TrainState

KEY = "config.init.branch_from"
# What decides what a step does.
SAME = ("seed", "model", "objective", "data", "loss", "optimizer", "guard.spike_factor")
SCHEDULE = "optimizer.schedule"
BATCH = ("data.batch_size", "data.batch_size_per_device")


class Fork:
    """The checkpoint of another run that a run of this config goes on from."""

    def __init__(self, config: ConfigTree) -> None:
        """Raises FileNotFoundError where there is no such checkpoint, ValueError where the config
        doesn't say which one.
        """
        c = conversion.resolve(config)
        if c.init.from_ or c.init.word_vectors:
            raise ValueError(
                f"{KEY} ({c.init.branch_from}) gives the whole state: leave out config.init.from "
                f"({c.init.from_!r}) and word_vectors ({c.init.word_vectors!r})"
            )
        if c.init.step is None:
            raise ValueError(f"{KEY} ({c.init.branch_from}) needs config.init.step")
        self.workdir, self.step = c.init.branch_from, c.init.step
        self._own, self._own_dict = c, config
        self._base = ParentCheckpoint(self.workdir, self.step, key=KEY)
        self.manifest = self._base.manifest
        self.config = conversion.from_json(json.dumps(self.manifest.config))

    def __str__(self) -> str:
        return f"{self.workdir} at step {self.step}"

    def describe(self) -> dict[str, Any]:
        """What the manifests of the branch keep of where it began."""
        return self._base.describe()

    def check(self, num_steps: int, trunk_num_steps: int, batch_size: int) -> None:
        """Raises ValueError unless the branch, of `num_steps` with `batch_size` rows, agrees with
        the other run, of `trunk_num_steps`, on all steps before it; `config.checkpoint.
        allow_changed` names what may differ all the same.
        """
        if self.step >= num_steps:
            raise ValueError(
                f"config.init.step ({self.step}) must be less than the steps of the run "
                f"({num_steps}): there is nothing to do after it"
            )
        allowed = self._own.checkpoint.allow_changed
        both = (self._own_dict, self.config)
        conversion.check_paths(allowed, both, "config.checkpoint.allow_changed")
        rows = self.manifest.resolved.get("batch_size")  # None in a checkpoint of older code
        resolved = BATCH if rows is not None else ()
        lines = [
            f"config.{path}: {old!r} -> {new!r}"
            for path, (old, new) in conversion.changed(self.config, self._own_dict).items()
            if _is_in(path, SAME) and not _is_in(path, (SCHEDULE, *allowed, *resolved))
        ]
        if rows not in (None, batch_size) and not any(_is_in(path, allowed) for path in BATCH):
            lines.append(f"config.data.batch_size: {rows} -> {batch_size} rows a batch")
        if not _is_in(SCHEDULE, allowed):
            trunk = conversion.resolve(self.config).optimizer.schedule
            old = fractions(trunk, trunk_num_steps, self.step)
            new = fractions(self._own.optimizer.schedule, num_steps, self.step)
            if (old != new).any():
                at = int(np.argmax(old != new))
                lines.append(
                    f"config.{SCHEDULE}: at step {at} the learning rate is {old[at]:.6g} of its "
                    f"peak -> {new[at]:.6g}; the runs agree up to step {at}"
                )
        if lines:
            raise ValueError(
                f"{KEY}: this run would not have been at step {self.step} where {self.workdir} "
                "was; change it back, or name it in config.checkpoint.allow_changed:\n  "
                + "\n  ".join(lines)
            )

    def restore(self, abstract: TrainState) -> TrainState:
        """The state, in the shardings of `abstract`, every bit checked.

        Raises:
            ValueError: the checkpoint has other leaves, or none of an optimizer.
            CorruptCheckpoint: the bits are not those that were saved.
        """
        with Checkpoints(self.workdir, self._own.checkpoint, read_only=True) as checkpoints:
            restored = checkpoints.restore(abstract, self.step)
        assert restored is not None, "Base found the step"
        state, _ = restored
        if state.opt_state is None:
            raise ValueError(
                f"{KEY}: {self} has parameters alone; use config.init.from to begin with them"
            )
        return state


def _is_in(path: str, sections: Sequence[str]) -> bool:
    return any(path == s or path.startswith(s + ".") for s in sections)
