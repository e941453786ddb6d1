"""Parent checkpoint: the parameters of another run that a warm start reads, in any sharding."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lm.checkpoint import manifest as manifests
from lm.checkpoint import restore, step_files
from lm.checkpoint.manager import CorruptCheckpoint
from lm.checkpoint.manifest import Damaged, Leaf, Manifest
from lm.optim import param_tree
from lm.parallel import process_group
from lm.storage.epaths import StoragePath
from lm.types import Params


class ParentCheckpoint:
    """The parameters of a checkpoint of the run in `workdir`, at `step` (None: its newest).

    All processes call its methods together. key: the config path that names the run.
    """

    def __init__(
        self, workdir: str, step: int | None = None, *, key: str = "config.init.from"
    ) -> None:
        """Raises FileNotFoundError where there is no such checkpoint."""
        self._key = key
        directory = StoragePath(workdir).resolve() / "checkpoints"
        steps: list[int] = process_group.from_lead("parent", lambda: step_files.steps(directory))
        if not steps:
            raise FileNotFoundError(f"{key}: {workdir} has no checkpoint")
        self.step = steps[-1] if step is None else step
        if self.step not in steps:
            raise FileNotFoundError(
                f"{key}: {workdir} has no checkpoint of step {step}; there are {steps}"
            )
        self.workdir, self._folder = workdir, directory / str(self.step)

    @functools.cached_property
    def manifest(self) -> Manifest:
        try:
            return restore.read_manifest(self._folder)
        except Damaged as error:
            raise CorruptCheckpoint(f"{self._key}: {self._folder} is bad: {error}") from None

    @functools.cached_property
    def _params(self) -> dict[str, Leaf]:
        prefix = "params."
        leaves = self.manifest.leaves.items()
        return {n.removeprefix(prefix): leaf for n, leaf in leaves if n.startswith(prefix)}

    def describe(self) -> dict[str, Any]:
        """The entry `parent` of a run's manifests: folder, step, and a hash of all bits."""
        fingerprint = manifests.fingerprint(self._params)
        return {"workdir": self.workdir, "step": self.step, "fingerprint": fingerprint}

    def check(self, abstract: Params, skip: Sequence[str]) -> None:
        """Raises ValueError with all that differ unless the stored parameters that don't match
        `skip` are those of `abstract`.
        """
        skipped = param_tree.matching("config.init.skip", skip, self._params)
        stored = {n: x for n, x in self._params.items() if n not in skipped}
        lines = manifests.differences(stored, manifests.leaves(abstract))
        if lines:
            hint = ""
            if any(".lora_" in name for name in stored):
                hint = "\nit holds only adapters: merge them first, with scripts/merge_lora.py"
            raise ValueError(
                f"config.init.from: {self._folder} has other parameters than this run; list in "
                "config.init.skip what this run should ignore, and in config.init.new what is "
                "initialized randomly:\n  " + "\n  ".join(lines) + hint
            )

    def read(self, abstract: Params) -> Params:
        """The parameters of `abstract`, in its shardings and every bit verified; CorruptCheckpoint
        where the bits are not those that were saved.
        """
        items = {"params": abstract}
        try:
            return restore.restore(self._folder, items, verify=True, partial=True)[0]["params"]
        except Damaged as error:
            raise CorruptCheckpoint(f"{self._key}: {self._folder} is bad: {error}") from None

    def check_same(self, parent: Mapping[str, Any]) -> None:
        """Raises ValueError unless `parent` is what `describe` returns."""
        now = self.describe()
        if now["fingerprint"] != parent.get("fingerprint"):
            raise ValueError(
                f"config.init.from: the parameters of {self.workdir} at step {self.step} "
                f"(fingerprint {now['fingerprint'][:12]}) are not those that this run's adapters "
                f"were trained on ({str(parent.get('fingerprint'))[:12]}, of {parent['workdir']} "
                f"at step {parent['step']})"
            )
