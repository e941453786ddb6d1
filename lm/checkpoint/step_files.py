"""Files of checkpoints, read on a host without devices: steps, verification, single leaves.

WORKDIR/checkpoints/STEP/params/        Orbax's files of the parameters
                         opt_state/     and of the optimizer's state
                         manifest/      the manifest
                         verified-I-of-N   process I of N has read its part back
WORKDIR/bad_checkpoints/STEP[-K]/       checkpoints that didn't verify
"""

from __future__ import annotations

import concurrent.futures
import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import orbax.checkpoint as ocp

from lm.checkpoint.checksums import hexadecimal, host_checksums
from lm.checkpoint.manifest import Damaged, Leaf, Manifest, check_bits
from lm.storage.epaths import StoragePath
from lm.storage.paths import is_url, kvstore_spec

if TYPE_CHECKING:
    import tensorstore as ts

T_co = TypeVar("T_co", covariant=True)
ITEMS = ("params", "opt_state")
READERS = 8  # a bucket answers each request after a while
MANIFEST = "manifest"
MANIFEST_FILE = "manifest.json"
DELETING = "deleting"  # older code's file in a step's folder that is half deleted
TEMPORARY = ocp.path.atomicity.TMP_DIR_SUFFIX
COMMITTED = ocp.path.atomicity.COMMIT_SUCCESS_FILE
_UNREADABLE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class Unreadable(PermissionError):
    """Files that may not be read, or whose storage doesn't answer: their checkpoint may be good."""


def steps(directory: StoragePath) -> list[int]:
    """The steps whose checkpoints in `directory` are complete, ascending."""
    if not directory.exists():
        return []
    names = [path.name for path in directory.iterdir()]
    return sorted(int(n) for n in names if is_complete(directory / n))


def can_rename(folder: StoragePath) -> bool:
    """True where a step gets its name by a rename once it is complete, instead of a commit file."""
    return not is_url(str(folder))


def is_complete(folder: StoragePath) -> bool:
    """True if a step's folder is whole; else its save or its deletion is under way."""
    if not folder.name.isdigit():
        return False
    is_committed = can_rename(folder) or (folder / COMMITTED).exists()
    return is_committed and not (folder / DELETING).exists()


def delete(folder: StoragePath) -> None:
    """Delete a checkpoint, first its name or its commit file: no half is left under the name."""
    if can_rename(folder):
        folder = folder.rename(folder.parent / f"{folder.name}{TEMPORARY}-{time.time_ns()}")
    else:
        (folder / COMMITTED).unlink(missing_ok=True)
    folder.rmtree()


def delete_leftovers(directory: StoragePath) -> None:
    """Delete remains of killed processes: incomplete saves and half deleted steps."""
    for path in directory.iterdir():
        if TEMPORARY in path.name:
            path.rmtree()
        elif path.name.isdigit() and not is_complete(path):
            delete(path)


def read_manifest(folder: StoragePath) -> Manifest:
    """The manifest of a step's folder.

    Raises:
        Unreadable: it may not be read.
        Damaged: there is none, or it isn't what was written for this step.
    """
    try:
        manifest = Manifest.from_json((folder / MANIFEST / MANIFEST_FILE).read_bytes())
    except PermissionError as error:
        raise Unreadable(str(error)) from None
    except OSError as error:
        raise Damaged(f"no manifest can be read: {error}") from None
    if str(manifest.step) != folder.name:
        raise Damaged(f"its manifest is that of step {manifest.step}")
    return manifest


def mark_verified(folder: StoragePath, part: int, parts: int) -> None:
    (folder / f"verified-{part}-of-{parts}").touch()


def is_verified(folder: StoragePath) -> bool:
    """True if every part of a step's files has been read back and verified."""
    marks = {path.name for path in folder.iterdir() if path.name.startswith("verified-")}
    counts = {int(name.rsplit("-", 1)[1]) for name in marks}
    return any(marks >= {f"verified-{i}-of-{n}" for i in range(n)} for n in counts)


def size(folder: StoragePath) -> int:
    """Bytes of all files in a folder."""
    return sum(size(p) if p.is_dir() else p.stat().length for p in folder.iterdir())


def verify(folder: StoragePath, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Read every `parts`-th leaf of a step's files, the largest first, `READERS` at once.

    Raises:
        Unreadable: a leaf may not be read.
        Damaged: the first one that can't be read or has other bits.
    """

    def check(name: str) -> None:
        leaf, sums = manifest.leaves[name], np.zeros(2, np.uint32)
        for start, block in _chunks(open_leaf(folder, name, leaf), name):
            sums += host_checksums(block, start, leaf.shape)
        check_bits({name: leaf}, {name: hexadecimal(sums)})

    by_size = sorted(manifest.leaves, key=lambda n: (-np.prod(manifest.leaves[n].shape), n))
    with concurrent.futures.ThreadPoolExecutor(READERS, "verify") as executor:
        for _ in executor.map(check, by_size[part::parts]):
            pass


def open_leaf(folder: StoragePath, name: str, leaf: Leaf) -> ts.TensorStore:
    """The TensorStore of a leaf that the manifest lists, in Orbax's files; Damaged where it can't
    be opened, or has another shape or dtype.
    """
    import tensorstore as ts

    item, path = name.split(".", 1)
    base = kvstore_spec(str(folder / item))
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
    array = result(ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True), name)
    stored = Leaf(tuple(array.shape), array.dtype.name)
    if str(stored) != str(leaf):
        raise Damaged(f"{name}: stored as {stored}, the manifest says {leaf}")
    return array


def read_leaf(folder: StoragePath, name: str, leaf: Leaf) -> np.ndarray:
    """All values of a leaf; raises as `open_leaf`."""
    return np.asarray(result(open_leaf(folder, name, leaf).read(), name))


class Future(Protocol[T_co]):
    """A future of TensorStore."""

    def result(self) -> T_co: ...


def result(future: Future[T_co], name: str) -> T_co:
    """The result of a future of TensorStore.

    Raises:
        Unreadable: it may not be read, or its storage doesn't answer.
        Damaged: the file is damaged or missing: TensorStore raises a ValueError for either.
    """
    try:
        return future.result()
    except ValueError as error:
        if str(error).startswith(_UNREADABLE):
            raise Unreadable(f"{name}: {first_line(error)}") from None
        raise Damaged(f"{name}: {first_line(error)}") from None


def _chunks(array: ts.TensorStore, name: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(first index, values) of every chunk of a TensorStore, one at a time in memory."""
    chunk = [n or 1 for n in array.chunk_layout.read_chunk.shape or ()]
    ranges = [range(0, n, step) for n, step in zip(array.shape, chunk, strict=True)]
    for start in itertools.product(*ranges):
        bounds = zip(start, chunk, array.shape, strict=True)
        index = tuple(slice(a, min(a + c, n)) for a, c, n in bounds)
        yield start, np.asarray(result(array[index].read(), name))


def first_line(error: BaseException) -> str:
    """An error's message as one line of limited length: TensorStore appends all its settings."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = text.split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    return text if len(text) <= 400 else f"{text[:150]} … {text[-240:]}"
