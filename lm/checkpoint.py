"""Checkpoints of a run, through Orbax: asynchronous, atomic, restored into any sharding.

The checkpoint at step n is the state before batch n. Parameters and optimizer state are separate
items, so that either can be read alone.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lm.config import CheckpointConfig
from lm.types import Params, TrainState

ITEMS = ("params", "opt_state")


class Checkpoints:
    """The checkpoints below `workdir`; a context that waits for the last save when it is left."""

    def __init__(self, workdir: str, config: CheckpointConfig, *, read_only: bool = False) -> None:
        directory = epath.Path(workdir).resolve() / "checkpoints"
        if config.keep_last < 1:
            raise ValueError(f"config.checkpoint.keep_last ({config.keep_last}) must be at least 1")
        if read_only and not directory.exists():
            raise FileNotFoundError(f"{workdir} has no checkpoints; train first")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep_last,
            keep_period=config.keep_every or None,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(directory, item_names=ITEMS, options=options)
        self.directory = directory

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> bool:
        """Starts saving `state`, returns once it is copied; False if its step is saved already."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
            ),
        )
        return True

    def wait(self) -> None:
        """Returns when the last save is complete; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState | None:
        """The state at `step` (default: newest) in the shardings of `abstract`, or None."""
        step = self._find(step)
        if step is None:
            return None
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
            ),
        )
        count = jax.device_put(np.int32(step), abstract.step.sharding)
        return TrainState(step=count, params=restored["params"], opt_state=restored["opt_state"])

    def restore_params(self, abstract: Params, step: int | None = None) -> tuple[int, Params]:
        """(step, parameters) alone: nothing of the optimizer is read.

        Raises:
            FileNotFoundError: there is no checkpoint.
        """
        step = self._find(step)
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}; train first")
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return step, self._manager.restore(step, args=args)["params"]

    def _find(self, step: int | None) -> int | None:
        if step is not None and step not in self._manager.all_steps():
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}; there are {self.steps()}"
            )
        return self._manager.latest_step() if step is None else step
