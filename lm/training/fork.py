"""Fork: a run that continues another run's state in a folder of its own.

It is allowed only where both configs agree on all steps before: it is then, bit for bit, the run
that it would be by itself. With a warm-up-stable-decay schedule (arXiv:2404.06395) runs of all
lengths share their steps up to the decay, so one long run and a cool-down for each length give as
many whole runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from lm.checkpoint.manager import Checkpoints
from lm.checkpoint.parent import ParentCheckpoint
from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.optim.schedules import fractions
from lm.types import TrainState

KEY = "config.init.branch_from"
DETERMINES_STEPS = ("seed", "model", "objective", "data", "loss", "optimizer", "guard.spike_factor")
SCHEDULE = "optimizer.schedule"
BATCH = ("data.batch_size", "data.batch_size_per_device")


class Fork(ParentCheckpoint):
    """The checkpoint of another run that a run of this config continues."""

    def __init__(self, config: ConfigTree) -> None:
        """Raises as `ParentCheckpoint`, and ValueError where the config does not say which one."""
        c = conversion.resolve(config)
        if c.init.from_ or c.init.word_vectors:
            raise ValueError(
                f"{KEY} ({c.init.branch_from}) gives the whole state: leave out config.init.from "
                f"({c.init.from_!r}) and word_vectors ({c.init.word_vectors!r})"
            )
        if c.init.step is None:
            raise ValueError(f"{KEY} ({c.init.branch_from}) needs config.init.step")
        super().__init__(c.init.branch_from, c.init.step, key=KEY)
        self._config, self._config_dict = c, config

    def __str__(self) -> str:
        return f"{self.workdir} at step {self.step}"

    def check_steps(self, num_steps: int, trunk_num_steps: int, batch_size: int) -> None:
        """Raise ValueError, listing all differences, unless both runs do the same steps before the
        fork, but for what `config.checkpoint.allow_changed` names.

        num_steps, batch_size: of the fork. trunk_num_steps: of the other run.
        """
        if self.step >= num_steps:
            raise ValueError(
                f"config.init.step ({self.step}) must be less than the steps of the run "
                f"({num_steps}): there is nothing to do after it"
            )
        trunk_config = self.manifest.config_tree()
        allowed = self._config.checkpoint.allow_changed
        key = "config.checkpoint.allow_changed"
        conversion.check_paths(allowed, (self._config_dict, trunk_config), key)
        rows = self.manifest.resolved.get("batch_size")  # None in a checkpoint of older code
        exempt = (SCHEDULE, *allowed, *(BATCH if rows is not None else ()))
        lines = changed_lines(trunk_config, self._config_dict, DETERMINES_STEPS, exempt)
        if rows not in (None, batch_size) and not any(is_in(path, allowed) for path in BATCH):
            lines.append(f"config.data.batch_size: {rows} -> {batch_size} rows a batch")
        if not is_in(SCHEDULE, allowed):
            trunk = conversion.resolve(trunk_config).optimizer.schedule
            old = fractions(trunk, trunk_num_steps, self.step)
            new = fractions(self._config.optimizer.schedule, num_steps, self.step)
            if (old != new).any():
                first = int(np.argmax(old != new))
                lines.append(
                    f"config.{SCHEDULE}: at step {first} the learning rate is {old[first]:.6g} of "
                    f"its peak -> {new[first]:.6g}; the runs agree up to step {first}"
                )
        if lines:
            raise ValueError(
                f"{KEY}: this run would not have been at step {self.step} where {self.workdir} "
                "was; change it back, or name it in config.checkpoint.allow_changed:\n  "
                + "\n  ".join(lines)
            )

    def restore(self, abstract: TrainState) -> TrainState:
        """The state in the shardings of `abstract`, every bit verified; raises as
        `Checkpoints.restore`, and ValueError where there is no optimizer state.
        """
        if self.manifest.has_only_params:
            raise ValueError(
                f"{KEY}: {self} has only parameters; use config.init.from to start from them"
            )
        with Checkpoints(self.workdir, self._config.checkpoint, read_only=True) as checkpoints:
            restored = checkpoints.restore(abstract, self.step)
        assert restored is not None, "the folder of the step is there"
        return restored[0]


def changed_lines(
    old: ConfigDict, new: ConfigDict, sections: Sequence[str], exempt: Sequence[str] = ()
) -> list[str]:
    """One line for each value that differs and lies inside `sections`, but not inside `exempt`."""
    return [
        f"config.{path}: {before!r} -> {now!r}"
        for path, (before, now) in conversion.changed(old, new).items()
        if is_in(path, sections) and not is_in(path, exempt)
    ]


def is_in(path: str, sections: Sequence[str]) -> bool:
    """True if a config path is one of `sections` or inside one."""
    return any(path == s or path.startswith(s + ".") for s in sections)
