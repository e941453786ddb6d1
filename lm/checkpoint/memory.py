"""Snapshots of the state in the memory of hosts, from which a run goes on after a process failed.

MEMORY_DIR/RUN/process-I/own-STEP     the shards of process I
                         copy-STEP    those of the process before it, in a ring

Files in a folder in memory (tmpfs), which outlive their process. The copy goes from device to
device, by a collective of all processes. A restart on the same hosts goes on from the newest step
whose shards are all there, each in one of its two files. Lost are the memory of a machine that goes
down, and both files of a process whose host and whose successor's host do; then there is storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.checkpoint import manifest as manifests
from lm.checkpoint import restore
from lm.checkpoint.code_version import code_version
from lm.checkpoint.manifest import Damaged, Manifest
from lm.checkpoint.process_shards import ProcessShards, Shards, assemble, num_bytes
from lm.exit_codes import restarts
from lm.parallel import device_errors, process_group
from lm.storage import files
from lm.storage.paths import expand_local_path
from lm.types import TrainState

KINDS = ("own", "copy")
KEPT = 2  # steps: the newest may not be complete in all processes
SEAL = 4  # bytes of a CRC-32, the last ones of a file
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Found:
    """A step whose shards are all in memory; `lost`: processes whose own files are not."""

    manifest: Manifest
    lost: tuple[int, ...]

    def __str__(self) -> str:
        text = f"the memory of the hosts at step {self.manifest.step}"
        if self.lost:
            text += f", the shards of process {', '.join(map(str, self.lost))} from its neighbour's"
        return text


class MemorySnapshots:
    """The snapshots of one run, a context. All processes call its methods together.

    After an end that no restart follows the memory is free again.
    """

    def __init__(
        self, memory_dir: str, workdir: str, config: Mapping[str, Any], abstract: TrainState
    ) -> None:
        """config: that of the run, in JSON; abstract: the arrays that a checkpoint of it has.

        Raises:
            ValueError: the folder has not enough space, or the processes differ in their devices.
        """
        tree = {"params": abstract.params, "opt_state": abstract.opt_state}
        leaves, self._structure = jax.tree.flatten(tree)
        self._shards = ProcessShards(leaves)
        self._step_sharding = abstract.step.sharding
        self._config = json.loads(json.dumps(config))
        self._count, self._process = jax.process_count(), jax.process_index()
        name = "config.checkpoint.memory_dir"
        place = expand_local_path(memory_dir, name) if memory_dir else _default_folder()
        run = f"{place}/{hashlib.blake2b(workdir.encode(), digest_size=8).hexdigest()}"
        files.make_private_folder(run)
        self._folder = f"{run}/process-{self._process}"
        for name in files.list_names(run):
            if int(name.removeprefix("process-")) >= self._count:  # of more processes, once
                files.delete(f"{run}/{name}")
        self._check_space(place)

    def __enter__(self) -> MemorySnapshots:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or not restarts(device_errors.code_of(error)):
            self.clear()
            with contextlib.suppress(OSError):  # others of this host are not so far
                os.rmdir(os.path.dirname(self._folder))

    def _check_space(self, place: str) -> None:
        own = self._shards.num_bytes(self._process)
        hosts = multihost_utils.process_allgather(np.uint32(zlib.crc32(_host())))
        sharing = int((np.atleast_1d(hosts) == zlib.crc32(_host())).sum())
        need = (KEPT + 1) * len(self._kinds) * own * sharing
        free = shutil.disk_usage(place).free + sum(
            os.path.getsize(path) for kind in KINDS for path in self._paths(kind).values()
        )
        if free < need:
            raise ValueError(
                f"config.checkpoint.memory_every: snapshots of {sharing} processes need "
                f"{need / GIB:.3g} GiB in {place} (config.checkpoint.memory_dir), which has "
                f"{free / GIB:.3g} free"
            )

    # ---- making snapshots ----

    def save(self, state: TrainState, extras: Mapping[str, Any]) -> None:
        """Keep the shards of `state`, and those of the neighbour; return when they are kept.

        extras: as `manifest_extras` of `Checkpoints.save`.
        """
        tree = {"params": state.params, "opt_state": state.opt_state}
        manifest = Manifest(
            step=int(state.step),
            leaves=manifests.leaves(tree, restore.device_checksums(tree)),
            code=code_version(),
            **extras,
        )
        header = (
            json.dumps({"manifest": manifest.to_dict(), "mesh": str(self._shards)}).encode() + b"\n"
        )
        owners = dict(zip(self._kinds, (self._process, self._before), strict=False))
        contents = {kind: _Content(header, self._shards.num_bytes(p)) for kind, p in owners.items()}
        for i, leaf in enumerate(jax.tree.leaves(tree)):
            for kind, owner in owners.items():
                own = kind == "own"
                shards = self._shards.local(leaf) if own else self._shards.next(i, leaf)
                contents[kind].add([shards[j] for j in self._shards.firsts(i, owner)])
        for kind, content in contents.items():
            files.write_atomically(f"{self._folder}/{kind}-{manifest.step}", content.sealed())
        steps = sorted(self._paths("own"))
        self._delete(set(steps) - set(steps[-KEPT:]))

    @property
    def _kinds(self) -> tuple[str, ...]:
        return KINDS if self._count > 1 else KINDS[:1]

    @property
    def _before(self) -> int:
        return (self._process - 1) % self._count

    # ---- restoring ----

    def find(self, at_least: int) -> Found | None:
        """The newest step, `at_least` this one, whose shards are all in memory and good; None if
        there is none. Files of other steps are deleted.
        """
        steps = {kind: [s for s in self._good_steps(kind) if s >= at_least] for kind in KINDS}
        held = np.full((len(KINDS), KEPT + 1), -1, np.int32)
        for row, kind in zip(held, KINDS, strict=True):
            newest = sorted(steps[kind])[-len(row) :]
            row[: len(newest)] = newest
        everywhere = multihost_utils.process_allgather(held).reshape(self._count, *held.shape)
        own, copies = everywhere[:, 0], np.roll(everywhere[:, 1], -1, axis=0)
        for step in sorted({int(s) for s in own.flat if s >= 0}, reverse=True):
            has_own = (own == step).any(axis=1)
            if not (has_own | (copies == step).any(axis=1)).all():
                continue
            holder = int(has_own.argmax())
            text = process_group.from_process(
                holder, "snapshot", lambda step=step: self._read("own", step)[0]["manifest"]
            )
            self._delete(set().union(*(self._paths(kind) for kind in KINDS)) - {step})
            lost = tuple(int(p) for p in np.flatnonzero(~has_own))
            return Found(Manifest.from_json(json.dumps(text)), lost)
        self.clear()
        return None

    def restore(self, found: Found) -> TrainState:
        """The state of a step that `find` found. Raises Damaged in all processes where its bits
        are not those of the manifest.
        """
        step, received = found.manifest.step, None
        if found.lost:
            source = self._read_shards("copy", step) if self._before in found.lost else None
            received = [
                self._shards.send_back(i, None if source is None else source[i])
                for i, _ in self._shards
            ]
        own = self._read_shards("own", step) if self._process not in found.lost else received
        assert own is not None
        arrays = [assemble(x, shards) for (_, x), shards in zip(self._shards, own, strict=True)]
        tree = self._structure.unflatten(arrays)
        leaves = manifests.leaves(tree, restore.device_checksums(tree))
        manifests.check_bits(
            found.manifest.leaves, {name: leaf.checksum for name, leaf in leaves.items()}
        )
        count = jax.device_put(np.int32(step), self._step_sharding)
        return TrainState(count, tree["params"], tree["opt_state"])

    def _good_steps(self, kind: str) -> Iterator[int]:
        """Steps of the files that are whole, and of this config, code and mesh."""
        for step in self._paths(kind):
            try:
                header = self._read(kind, step)[0]
                manifest = Manifest.from_json(json.dumps(header["manifest"]))
            except (Damaged, ValueError, KeyError):
                continue
            is_same = manifest.config == self._config and _source(manifest.code) == _source(
                code_version()
            )
            if is_same and header["mesh"] == str(self._shards) and manifest.step == step:
                yield step

    def _read(self, kind: str, step: int) -> tuple[dict[str, Any], memoryview]:
        """(header, content) of a file. Raises Damaged."""
        data = files.read_bytes(f"{self._folder}/{kind}-{step}")
        if zlib.crc32(memoryview(data)[:-SEAL]) != int.from_bytes(data[-SEAL:], "big"):
            raise Damaged(f"{kind}-{step}: not what was written")
        end = data.find(b"\n")
        return json.loads(data[:end]), memoryview(data)[end + 1 : -SEAL]

    def _read_shards(self, kind: str, step: int) -> Shards:
        """The content of a file, of each leaf and device of its process."""
        process = self._process if kind == "own" else self._before
        content, start, found = self._read(kind, step)[1], 0, []
        for i, leaf in self._shards:
            shape, firsts = leaf.sharding.shard_shape(leaf.shape), self._shards.firsts(i, process)
            blocks = {}
            for first in firsts:
                stop = start + num_bytes(leaf)
                blocks[first] = np.frombuffer(content[start:stop], leaf.dtype).reshape(shape)
                start = stop
            found.append([blocks[j] for j in self._shards.replicas(i, process)])
        return found

    # ---- files ----

    def _paths(self, kind: str) -> dict[int, str]:
        """{step: path} of this process's files."""
        names = files.list_names(self._folder)
        pairs = [name.partition("-") for name in names]
        return {int(s): f"{self._folder}/{k}-{s}" for k, _, s in pairs if k == kind and s.isdigit()}

    def _delete(self, steps: set[int]) -> None:
        for kind in KINDS:
            for step, path in self._paths(kind).items():
                if step in steps:
                    files.delete(path)

    def clear(self) -> None:
        """Delete the snapshots of this process, and what a kill has left of one."""
        files.delete(self._folder)


class _Content:
    """The bytes of a file: a header, shards, and the CRC-32 of all before it."""

    def __init__(self, header: bytes, size: int) -> None:
        self._data, self._end = bytearray(len(header) + size + SEAL), 0
        self._bytes = np.frombuffer(self._data, np.uint8)
        self._append(np.frombuffer(header, np.uint8))

    def _append(self, block: np.ndarray) -> None:
        self._bytes[self._end : self._end + block.size] = block
        self._end += block.size

    def add(self, shards: Sequence[np.ndarray]) -> None:
        for shard in shards:
            self._append(np.ascontiguousarray(shard).reshape(-1).view(np.uint8))

    def sealed(self) -> memoryview:
        """All of it; no shard may be missing."""
        seal = zlib.crc32(memoryview(self._data)[:-SEAL]).to_bytes(SEAL, "big")
        self._append(np.frombuffer(seal, np.uint8))
        assert self._end == len(self._data), "as many bytes of shards as were said"
        return memoryview(self._data)


def _source(code: Mapping[str, Any]) -> dict[str, Any]:
    """The part that computes: a commit may come during a run without a change of its files."""
    return {key: value for key, value in code.items() if key not in ("commit", "dirty")}


def _host() -> bytes:
    return socket.gethostname().encode()


def _default_folder() -> str:
    if not os.path.isdir("/dev/shm"):
        raise ValueError("config.checkpoint.memory_dir: there is no /dev/shm here; name a folder")
    return f"/dev/shm/lm-{os.getuid()}"
