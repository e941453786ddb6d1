"""Writer of a checkpoint with only parameters, block by block: no leaf is ever whole in memory.

Training from it starts with a fresh optimizer state. Its files are those that Orbax would write,
but in chunks of one block.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.checkpoint import arrays, step_files, verification
from lm.checkpoint.checksums import hexadecimal, host_checksums
from lm.checkpoint.code_version import code_version
from lm.checkpoint.manager import SaveFailed
from lm.checkpoint.manifest import Damaged, Leaf, Manifest
from lm.storage.epaths import StoragePath
from lm.storage.paths import kvstore_spec

if TYPE_CHECKING:
    import tensorstore as ts

Shape = tuple[int, ...]


class ParamsWriter:
    """The checkpoint of `step` below `workdir`, from `write` after `write` to `commit`."""

    def __init__(self, workdir: str, step: int) -> None:
        """Raises ValueError where there are checkpoints: a run isn't overwritten."""
        directory = StoragePath(workdir).resolve() / "checkpoints"
        if steps := step_files.steps(directory):
            raise ValueError(f"{workdir} has checkpoints already, of steps {steps}")
        directory.mkdir(parents=True, exist_ok=True)
        step_files.delete_leftovers(directory)
        self._step = step
        self._folder = directory / str(step)
        renames = step_files.can_rename(directory)
        self._writing = directory / f"{step}{step_files.TEMPORARY}" if renames else self._folder
        self._writing.mkdir()
        self._arrays: dict[str, ts.TensorStore] = {}
        self._sums: dict[str, np.ndarray] = {}
        self._pending: tuple[str, arrays.Future[object]] | None = None

    def add(self, name: str, shape: Shape, num_stacked: int) -> None:
        """Add a float32 leaf, whose blocks are indexed by its `num_stacked` leading axes."""
        import tensorstore as ts

        base = kvstore_spec(str(self._writing / "params"))
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
            "metadata": {
                "shape": list(shape),
                "chunks": [1] * num_stacked + [max(n, 1) for n in shape[num_stacked:]],
                "dtype": "<f4",
                "compressor": {"id": "zstd", "level": 1},
            },
        }
        leaf = f"params.{name}"
        self._arrays[leaf] = arrays.result(ts.open(spec, create=True), leaf)
        self._sums[leaf] = np.zeros(2, np.uint32)

    def write(self, name: str, index: Shape, block: np.ndarray) -> None:
        """Start writing the block at `index`; the next call waits for it."""
        leaf = f"params.{name}"
        array = self._arrays[leaf]
        whole = block.reshape((1,) * len(index) + block.shape)
        self._sums[leaf] += host_checksums(whole, (*index, *(0,) * block.ndim), array.shape)
        self._wait()
        self._pending = leaf, array[index].write(block)

    def _wait(self) -> None:
        if self._pending is not None:
            leaf, future = self._pending
            arrays.result(future, leaf)
            self._pending = None

    def commit(self, extras: Mapping[str, Any]) -> None:
        """Make it the checkpoint of the step; SaveFailed where it doesn't read back.

        extras: `ledger`, `config` and `parent` of the manifest.
        """
        self._wait()
        leaves = {
            name: Leaf(tuple(array.shape), "float32", hexadecimal(self._sums[name]))
            for name, array in self._arrays.items()
        }
        manifest = Manifest(self._step, leaves, code=code_version(), time=time.time(), **extras)
        folder = self._writing / step_files.MANIFEST
        folder.mkdir()
        (folder / step_files.MANIFEST_FILE).write_text(json.dumps(manifest.to_dict()))
        try:
            verification.verify(self._writing, manifest)
        except Damaged as fault:
            message = f"what was written to {self._writing} doesn't read back: {fault}"
            raise SaveFailed(message) from None
        if self._writing == self._folder:
            (self._folder / step_files.COMMITTED).touch()
        else:
            self._writing.rename(self._folder)
        step_files.mark_verified(self._folder)
