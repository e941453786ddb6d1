"""Verification of a checkpoint's files by reading them back, each process its share of the chunks.

The values of all leaves form one line of bytes, in the order of the manifest. Of P processes,
process p reads the chunks that begin in the p-th of P equal parts: at most its share and one chunk,
whatever the leaves are. Checksums are sums over elements, so those of a leaf's chunks add up.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from lm.checkpoint import step_files
from lm.checkpoint.arrays import StoredArray, StoredArrays
from lm.checkpoint.checksums import from_hexadecimal, hexadecimal, host_checksums
from lm.checkpoint.chunk_readers import for_each
from lm.checkpoint.manifest import Damaged, Manifest, check_bits
from lm.checkpoint.step_files import Unreadable
from lm.storage.epaths import StoragePath

Sums = Mapping[str, np.ndarray]  # of some leaves, by name: uint32 [2]


def verify(folder: StoragePath, manifest: Manifest) -> int:
    """Read all of a step's files, and return the number of bytes of their values.

    Raises:
        Unreadable: a leaf may not be read.
        Damaged: the first one that can't be read or has other bits.
    """
    sums, num_bytes = read_share(folder, manifest)
    _check(manifest, [sums])
    return num_bytes


def read_share(
    folder: StoragePath, manifest: Manifest, part: int = 0, parts: int = 1
) -> tuple[Sums, int]:
    """(contributions to the checksums, bytes of the values) of the chunks of one of many parts.

    Memory: that of `for_each` three times, for a chunk is stored, decoded and returned, and
    `INDEX_BYTES`. Raises as `verify`.
    """
    sums: dict[str, np.ndarray] = {}
    num_bytes = 0
    adding = threading.Lock()

    def check(task: tuple[StoredArray, int]) -> None:
        nonlocal num_bytes
        array, chunk = task
        index = array.index(chunk)
        values = array.read(index)
        found = host_checksums(values, [s.start for s in index], array.leaf.shape)
        with adding:
            sums[array.name] = sums.get(array.name, 0) + found
            num_bytes += values.nbytes

    chunks = _chunks(folder, manifest, part, parts)
    for_each(chunks, check, lambda task: task[0].chunk_bytes)
    return sums, num_bytes


def _chunks(
    folder: StoragePath, manifest: Manifest, part: int, parts: int
) -> Iterator[tuple[StoredArray, int]]:
    """Yield the chunks of a part; opens only the leaves that reach into it."""
    arrays = StoredArrays(folder, manifest.leaves)
    sizes = {name: leaf.num_bytes for name, leaf in manifest.leaves.items()}
    total, offset = sum(sizes.values()), 0
    first, end = (total * p // parts for p in (part, part + 1))
    for name, size in sizes.items():
        if max(first, offset) < min(end, offset + size):
            array = arrays.open(name)
            for chunk in array.chunks_from(first - offset, end - offset):
                yield array, chunk
        offset += size


def _check(manifest: Manifest, parts: Iterable[Sums]) -> None:
    """Raise Damaged unless the contributions of all parts add up to the manifest's checksums."""
    totals = {name: np.zeros(2, np.uint32) for name in manifest.leaves}
    for sums in parts:
        for name, own in sums.items():
            totals[name] += own
    check_bits(manifest.leaves, {name: hexadecimal(total) for name, total in totals.items()})


# ---- reports of processes ----


def report(folder: StoragePath, manifest: Manifest, part: int, parts: int) -> str:
    """The contributions of one of many parts, or why there are none, as JSON."""
    try:
        sums, _ = read_share(folder, manifest, part, parts)
    except Unreadable as error:
        return json.dumps({"unreadable": str(error)})
    except Damaged as error:
        return json.dumps({"damaged": str(error)})
    return json.dumps({"sums": {name: hexadecimal(own) for name, own in sums.items()}})


def check_reports(folder: StoragePath, reports: Iterable[str]) -> None:
    """Raise Damaged or Unreadable if the manifest is, or a part is, or the parts' contributions
    don't add up to the manifest's checksums.

    reports: the `report` of each part, one at a time in memory.
    """
    manifest = step_files.read_manifest(folder)
    faults: list[Exception] = []

    def sums() -> Iterator[Sums]:
        for text in reports:
            found = json.loads(text)
            if "sums" in found:
                yield {name: from_hexadecimal(own) for name, own in found["sums"].items()}
            elif not faults:
                kind, fault = next(iter(found.items()))
                faults.append(Unreadable(fault) if kind == "unreadable" else Damaged(fault))

    try:
        _check(manifest, sums())
    except Damaged as error:
        raise (faults or [error])[0] from None
