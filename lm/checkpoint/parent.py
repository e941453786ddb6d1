"""The checkpoint that another run begins with: its parameters alone, in any sharding."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lm.checkpoint import manifest as manifests
from lm.checkpoint import restore, step_files
from lm.checkpoint.manager import CorruptCheckpoint
from lm.checkpoint.manifest import Damaged, Leaf, Manifest
from lm.optim import param_tree
from lm.parallel import process_group
from lm.types import Params


class ParentCheckpoint:
    """The parameters of a checkpoint of the run in `workdir`, at `step` (None: its newest).

    All processes make one and read it together. key: the config path that names the run.
    """

    def __init__(
        self, workdir: str, step: int | None = None, *, key: str = "config.init.from"
    ) -> None:
        """Raises FileNotFoundError where there is no such checkpoint."""
        self._key = key
        directory = epath.Path(workdir).resolve() / "checkpoints"
        there: list[int] = process_group.from_lead("base", lambda: step_files.steps(directory))
        if not there:
            raise FileNotFoundError(f"{key}: {workdir} has no checkpoint")
        self.step = there[-1] if step is None else step
        if self.step not in there:
            raise FileNotFoundError(
                f"{key}: {workdir} has no checkpoint of step {step}; there are {there}"
            )
        self.workdir, self._folder = workdir, directory / str(self.step)

    @functools.cached_property
    def manifest(self) -> Manifest:
        try:
            return restore.manifest_of(self._folder)
        except Damaged as error:
            raise CorruptCheckpoint(f"{self._key}: {self._folder} is bad: {error}") from None

    @functools.cached_property
    def _leaves(self) -> dict[str, Leaf]:
        """Of the parameters, by their names."""
        prefix = "params."
        leaves = self.manifest.leaves.items()
        return {n.removeprefix(prefix): leaf for n, leaf in leaves if n.startswith(prefix)}

    def describe(self) -> dict[str, Any]:
        """What a run's manifest keeps of where it began: place, step, and a hash of all bits."""
        fingerprint = manifests.fingerprint(self._leaves)
        return {"workdir": self.workdir, "step": self.step, "fingerprint": fingerprint}

    def check(self, wanted: Params, skip: Sequence[str]) -> None:
        """Raises ValueError unless the abstract tree `wanted` takes exactly the stored parameters
        that no pattern of `skip` matches.
        """
        there = {n: x for n, x in self._leaves.items() if n not in self._skipped(skip)}
        lines = manifests.differences(there, manifests.leaves(wanted))
        if lines:
            hint = ""
            if any(".lora_" in name for name in there):
                hint = "\nit holds adapters alone: merge them first, with scripts/merge_lora.py"
            raise ValueError(
                f"config.init.from: {self._folder} has other parameters than this run; list in "
                "config.init.skip what this run has no place for, and in config.init.new what "
                "begins at random:\n  " + "\n  ".join(lines) + hint
            )

    def _skipped(self, skip: Sequence[str]) -> frozenset[str]:
        return param_tree.matching("config.init.skip", skip, self._leaves)

    def read(self, wanted: Params, skip: Sequence[str] = ()) -> Params:
        """The values of the abstract tree `wanted`, in its shardings, every bit checked; raises as
        `check`.
        """
        self.check(wanted, skip)
        return self.read_part(wanted)

    def read_part(self, wanted: Params) -> Params:
        """As `read`, whatever else is stored.

        Raises:
            CorruptCheckpoint: the bits are not those that were saved.
        """
        names = {f"params.{name}" for name in param_tree.flatten(wanted)}
        others = [name for name in self.manifest.leaves if name not in names]
        tree = {"params": wanted}
        fault, found, _ = restore.restore(self._folder, tree, verify=True, leave_out=others)
        if fault:
            raise CorruptCheckpoint(f"config.init.from: {self._folder} is bad: {fault}")
        return found["params"]

    def check_same(self, parent: Mapping[str, Any]) -> None:
        """Raises ValueError unless this is what `describe` gave when a run began."""
        now = self.describe()
        if now["fingerprint"] != parent.get("fingerprint"):
            raise ValueError(
                f"config.init.from: the parameters of {self.workdir} at step {self.step} "
                f"(fingerprint {now['fingerprint'][:12]}) are not those that this run's adapters "
                f"were trained on ({str(parent.get('fingerprint'))[:12]}, of {parent['workdir']} "
                f"at step {parent['step']})"
            )
