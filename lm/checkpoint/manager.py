"""Checkpoints of a run, through Orbax: asynchronous, atomic, verified, restored into any sharding.

The checkpoint at step n is the state before batch n. Parameters and optimizer state are separate
items, so that each can be read without the other. The manifest beside them has the checksum of
every leaf: a save is read back from its files, a restore is verified on the devices, and nothing is
deleted before its successor was read back. Hence not Orbax's CheckpointManager, whose
`preservation_policy` deletes at the commit of the next step, before that can be verified.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import re
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lm.checkpoint import arrays, orbax_s3, restore, step_files, verification
from lm.checkpoint import manifest as manifests
from lm.checkpoint.code_version import code_version
from lm.checkpoint.manifest import Damaged, Manifest
from lm.config.schema import CheckpointConfig
from lm.exit_codes import Exit, RunError
from lm.parallel import device_errors, process_group
from lm.storage import files
from lm.storage.epaths import StoragePath
from lm.storage.filesystems import StorageError
from lm.types import Params, PyTree, TrainState

CHUNK_BYTES = 64 << 20  # of a leaf, at most: what a host reads and decodes at once
# Errors of the file system, of TensorStore, and of a barrier that a process didn't reach.
SAVE_ERRORS = (OSError, ValueError, TimeoutError, jax.errors.JaxRuntimeError)
_NO_ANSWER = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED)\b")  # of TensorStore, from a bucket


class SaveFailed(RunError):
    """A checkpoint could not be written, or what was written doesn't read back."""

    code = Exit.SAVE_FAILED


class CorruptCheckpoint(RunError):
    """No checkpoint verifies, or the requested one doesn't."""

    code = Exit.CORRUPT


@dataclasses.dataclass(frozen=True)
class _Save:
    step: int
    orbax_is_free: threading.Event  # ready for the next save, also after one that failed
    verified: concurrent.futures.Future[None]


class Checkpoints:
    """The checkpoints below `workdir`; a context that waits for the last save at its end.

    All processes of a run call its methods together. A read-only one writes, renames and deletes
    nothing: it passes over bad checkpoints.
    """

    def __init__(self, workdir: str, config: CheckpointConfig, *, read_only: bool = False) -> None:
        if workdir.startswith("s3://"):
            orbax_s3.enable()
        root = StoragePath(workdir).resolve()
        self.directory = root / "checkpoints"
        self._bad = root / "bad_checkpoints"
        self._config = config
        self._read_only = read_only
        self._lead = jax.process_index() == 0
        self._saves: collections.deque[_Save] = collections.deque()
        # `ParentCheckpoint.describe` of what the run started from, copied from manifest to manifest
        self.parent: dict[str, Any] | None = None
        if read_only:
            if not self.directory.exists():
                raise FileNotFoundError(f"{workdir} has no checkpoints; train first")
            return
        if self._lead and self.directory.exists():
            step_files.delete_leftovers(self.directory)
        # Not Orbax's files of shardings and of each process's metadata, which nothing here reads:
        # process 0 would read those of all, and each costs requests in a bucket.
        of_arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, of_arrays))
        handler = ocp.CompositeCheckpointHandler(
            params=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            opt_state=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            manifest=ocp.JsonCheckpointHandler(filename=step_files.MANIFEST_FILE),
        )
        # In the background, a folder that can't be created leaves threads that wait five minutes
        # for it and keep the process from ending.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._checkpointer = ocp.AsyncCheckpointer(handler, async_options=options)
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._closing = threading.Event()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._read_only:
            return
        try:
            if error is None:
                self.wait()
                self._checkpointer.close()
            elif jax.process_count() == 1 or (
                isinstance(error, RunError) and error.code != Exit.PEER_LOST
            ):
                # keep the save under way; its own error must not hide this one
                concurrent.futures.wait([save.verified for save in self._saves])
        finally:
            self._closing.set()
            self._worker.shutdown(wait=False, cancel_futures=True)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, as the lead process sees them."""
        return process_group.from_lead("steps", lambda: step_files.steps(self.directory))

    # ---- saving ----

    def save(self, state: TrainState, *, manifest_extras: Mapping[str, Any] | None = None) -> bool:
        """Start saving `state`, and return once it is copied; False if its step is saved already.

        manifest_extras: `ledger`, `config` and `resolved` of the manifest, and `parent` in place of
        `self.parent`.

        Raises:
            SaveFailed: this save could not start, or an earlier one failed.
        """
        step = int(state.step)
        self.poll()
        if self._saves:
            self._saves[-1].orbax_is_free.wait()
        if process_group.from_lead("steps", lambda: self._is_saved(step)):
            return False
        tree = {"params": state.params, "opt_state": state.opt_state}
        manifest = Manifest(
            step=step,
            leaves=manifests.leaves(tree, restore.device_checksums(tree)),
            code=code_version(),
            time=time.time(),
            **{"parent": self.parent, **(manifest_extras or {})},
        )
        args = ocp.args.Composite(
            params=_save_args(state.params),
            opt_state=_save_args(state.opt_state),
            manifest=ocp.args.JsonSave(manifest.to_dict()),
        )
        try:
            self._checkpointer.save(self.directory / str(step), args=args)
        except SAVE_ERRORS as error:
            raise self._failed(step, error) from error
        orbax_is_free = threading.Event()
        key = process_group.background_key(f"verification of step {step}")
        verified = self._worker.submit(self._finish, manifest, orbax_is_free, key)
        self._saves.append(_Save(step, orbax_is_free, verified))
        return True

    def _is_saved(self, step: int) -> bool:
        """Return True if a step's checkpoint is complete; else delete what is there of it, by a
        process that has lost the lock on the run in the middle of its save.
        """
        if str(step) not in files.list_names(self.directory):
            return False
        if step_files.is_complete(folder := self.directory / str(step)):
            return True
        step_files.delete(folder)
        return False

    def poll(self) -> None:
        """Raise SaveFailed if a save failed or doesn't read back; return at once."""
        while self._saves and self._saves[0].verified.done():
            self._settle()

    def wait(self) -> None:
        """Wait until all saves are verified, and those that they replace deleted; as `poll`."""
        while self._saves:
            self._settle()

    def _settle(self) -> None:
        save = self._saves.popleft()
        try:
            save.verified.result()
        except SAVE_ERRORS as error:
            raise self._failed(save.step, error) from error

    def _failed(self, step: int, error: Exception) -> SaveFailed:
        others = [s for s in step_files.steps(self.directory) if s != step]
        failed = SaveFailed(
            f"the checkpoint of step {step} could not be saved in {self.directory}: "
            f"{arrays.first_line(error)}; "
            + (f"the last one is of step {others[-1]}" if others else "there is no other one")
        )
        is_tensorstore = isinstance(error, ValueError)
        if isinstance(error, StorageError) or (is_tensorstore and _NO_ANSWER.search(str(error))):
            failed.code = Exit.NO_STORAGE
        else:
            failed.code = device_errors.exit_code(error) or failed.code
        return failed

    def _finish(self, manifest: Manifest, orbax_is_free: threading.Event, key: str) -> None:
        """Complete and verify a save, then delete old ones; in the background."""
        try:
            self._checkpointer.wait_until_finished()
        finally:
            orbax_is_free.set()
        if self._config.verify:
            self._verify(manifest, key)
        if self._lead:
            self._delete_old(manifest.step)

    def _verify(self, manifest: Manifest, key: str) -> None:
        """Read the files of a save back together with all processes; mark it, or move it aside."""
        folder = self.directory / str(manifest.step)
        report = verification.report(folder, manifest, jax.process_index(), jax.process_count())

        def decide(reports: Iterator[str]) -> str:
            try:
                verification.check_reports(folder, reports)
                step_files.mark_verified(folder)
            except Damaged as fault:
                moved = self._bad / self._move_aside(manifest.step)
                return f"doesn't read back: {fault}; it was moved to {moved}"
            except OSError as error:
                return f"can't be read back: {error}"
            return ""

        if fault := process_group.reduce_on_lead(key, report, decide, stopped=self._closing.is_set):
            raise SaveFailed(f"the checkpoint of step {manifest.step} {fault}")

    def _delete_old(self, newest: int) -> None:
        """Delete what none of keep_last, keep_every and at keeps, now that `newest` is good."""
        old = [step for step in step_files.steps(self.directory) if step < newest]
        good = [
            step
            for step in old
            if not self._config.verify or step_files.is_verified(self.directory / str(step))
        ]
        keep = set(good[max(0, len(good) - self._config.keep_last + 1) :])
        if every := self._config.keep_every:
            keep |= {step for step in old if step % every == 0}
        keep |= set(self._config.at)
        for step in old:
            if step not in keep:
                step_files.delete(self.directory / str(step))

    def set_aside(self, step: int) -> StoragePath:
        """Move a checkpoint to WORKDIR/bad_checkpoints, and return its new path there."""
        name = process_group.from_lead("set aside", lambda: self._move_aside(step))
        return self._bad / name

    def _move_aside(self, step: int) -> str:
        """Move a checkpoint, also in several processes at once; return its name there."""
        self._bad.mkdir(parents=True, exist_ok=True)
        names = itertools.chain([str(step)], (f"{step}-{k}" for k in itertools.count(1)))
        name = next(name for name in names if not (self._bad / name).exists())
        with contextlib.suppress(FileNotFoundError):  # another process was first
            files.move_folder(self.directory / str(step), self._bad / name)
        return name

    # ---- restoring ----

    def restore(
        self, abstract: TrainState, step: int | None = None
    ) -> tuple[TrainState, Manifest] | None:
        """(state, manifest) of the newest good checkpoint, or of the one at `step`, in the
        shardings of `abstract`; None if there is none. An import has None for `opt_state`.

        A bad checkpoint is moved to WORKDIR/bad_checkpoints, with a line that says why, and the one
        before it is tried.

        Raises:
            ValueError: the leaves are not those of `abstract`; the message lists all that differ.
            FileNotFoundError: there is no checkpoint of `step`.
            CorruptCheckpoint: the one at `step` is bad, or all are.
        """
        items = {"params": abstract.params, "opt_state": abstract.opt_state}
        restored = self._restore(items, step)
        if restored is None:
            return None
        tree, manifest = restored
        count = jax.device_put(np.int32(manifest.step), abstract.step.sharding)
        return TrainState(count, tree["params"], tree.get("opt_state")), manifest

    def restore_params(self, abstract: Params, step: int | None = None) -> tuple[int, Params]:
        """(step, parameters), without the optimizer state; FileNotFoundError where none are."""
        restored = self._restore({"params": abstract}, step)
        if restored is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}; train first")
        tree, manifest = restored
        return manifest.step, tree["params"]

    def holds(self, state: TrainState) -> bool:
        """True if the checkpoint of the state's step has the same bits; Damaged if unreadable."""
        tree = {"params": state.params, "opt_state": state.opt_state}
        manifest = restore.read_manifest(self.directory / str(int(state.step)))
        return manifests.leaves(tree, restore.device_checksums(tree)) == manifest.leaves

    def _restore(
        self, items: dict[str, PyTree], step: int | None
    ) -> tuple[dict[str, PyTree], Manifest] | None:
        if not self._read_only:
            self.wait()
        verify = self._config.verify
        bad: list[int] = []
        # listed anew each time: a run that is going on deletes its old ones
        while candidates := [s for s in self.steps() if s not in bad and step in (None, s)]:
            candidate = candidates[-1]
            folder = self.directory / str(candidate)
            try:
                tree, manifest = restore.restore(folder, items, verify=verify)
            except Damaged as error:
                if step is not None:
                    raise CorruptCheckpoint(
                        f"the checkpoint of step {step} is bad: {error}"
                    ) from None
                bad.append(candidate)
                self._pass_over(candidate, str(error))
                continue
            self.parent = manifest.parent
            marks = self._lead and not self._read_only and verify
            if marks and set(items) == set(step_files.ITEMS) and not step_files.is_verified(folder):
                step_files.mark_verified(folder)
            return tree, manifest
        if step is not None:
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}; there are {self.steps()}"
            )
        # Not from step 0 because all there was had to be set aside, nor at the next start.
        if bad or process_group.from_lead("bad", self._bad.exists):
            raise CorruptCheckpoint(
                f"no checkpoint in {self.directory} is good; move one back from {self._bad}, or "
                f"delete that folder to begin at step 0"
            )
        return None

    def _pass_over(self, step: int, fault: str) -> None:
        if not self._lead:
            return
        done = "passed over"
        if not self._read_only:
            done = f"moved to {self._bad / self._move_aside(step)}"
        print(f"the checkpoint of step {step} is bad and was {done}: {fault}", flush=True)


def _save_args(tree: PyTree) -> ocp.args.PyTreeSave:
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    return ocp.args.PyTreeSave(tree, save_args=chunked)
