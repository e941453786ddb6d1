"""Verification deals out chunks: every one once, to each process its share, in bounded memory."""

import pathlib
import subprocess
import sys
import textwrap
import threading

import faults
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoint import chunk_readers, comparison, manager, step_files, verification
from lm.checkpoint.arrays import StoredArray, StoredArrays
from lm.checkpoint.manager import Checkpoints
from lm.checkpoint.manifest import Damaged
from lm.config.schema import CheckpointConfig
from lm.storage.epaths import StoragePath
from lm.types import TrainState

CHUNK = 4096  # bytes


def values(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def save(workdir, params, monkeypatch, chunk_bytes=CHUNK):
    """(folder, manifest) of a checkpoint with these parameters, in small chunks."""
    monkeypatch.setattr(manager, "CHUNK_BYTES", chunk_bytes)
    state = TrainState(jnp.int32(1), {n: jnp.asarray(x) for n, x in params.items()}, {"m": ONES})
    with Checkpoints(str(workdir), CheckpointConfig()) as checkpoints:
        checkpoints.save(state)
    folder = StoragePath(workdir) / "checkpoints" / "1"
    return folder, step_files.read_manifest(folder)


ONES = jnp.ones(3)
PARAMS = {
    "a": values((5, 300, 7)),
    "huge": values((90, 400)),  # 36 chunks: most of the bytes
    "scalar": values(()),
    "small": values(9),
}


@pytest.fixture
def stored(tmp_path, monkeypatch):
    return save(tmp_path, PARAMS, monkeypatch)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_each_process_reads_at_most_its_share_and_one_chunk(stored, parts):
    folder, manifest = stored
    total = sum(leaf.num_bytes for leaf in manifest.leaves.values())
    shares = [verification.read_share(folder, manifest, part, parts) for part in range(parts)]
    read = [num_bytes for _, num_bytes in shares]
    assert sum(read) == total
    assert max(read) <= total / parts + CHUNK
    verification._check(manifest, [sums for sums, _ in shares])
    if parts > 1:
        with pytest.raises(Damaged, match="checksum"):
            verification._check(manifest, [sums for sums, _ in shares[1:]])


def test_the_chunks_of_an_array_are_where_arithmetic_puts_them(stored):
    folder, manifest = stored
    for name in manifest.leaves:
        array = StoredArrays(folder, manifest.leaves).open(name)
        covered, before = np.zeros(array.leaf.shape, int), 0
        for chunk in range(array.num_chunks):
            assert array.offset(chunk) == before
            assert array.chunks_from(before, before + 1) == range(chunk, chunk + 1)
            index = array.index(chunk)
            covered[index] += 1
            part = array.read(index)
            assert 0 < part.nbytes <= array.chunk_bytes <= CHUNK
            before += part.nbytes
        assert before == array.leaf.num_bytes and (covered == 1).all()


def test_a_process_opens_only_the_leaves_of_its_share(stored, monkeypatch):
    folder, manifest = stored
    opened = []
    real = StoredArrays.open
    monkeypatch.setattr(
        StoredArrays, "open", lambda self, name: opened.append(name) or real(self, name)
    )
    verification.read_share(folder, manifest, part=4, parts=8)
    assert opened == ["params.huge"]


def test_reports_of_processes_say_what_is_damaged(stored):
    folder, manifest = stored
    reports = [verification.report(folder, manifest, part, 3) for part in range(3)]
    verification.check_reports(folder, iter(reports))
    files = faults.files(pathlib.Path(folder) / "params")
    largest = max(files, key=lambda path: path.stat().st_size)
    faults.flip_bit(largest, 4 * largest.stat().st_size)
    damaged = [verification.report(folder, manifest, part, 3) for part in range(3)]
    assert damaged != reports  # a chunk of one process, or an index that several read
    with pytest.raises(Damaged, match=r"params\."):
        verification.check_reports(folder, iter(damaged))
    unreadable = [reports[0], '{"unreadable": "params.huge: not permitted"}', reports[2]]
    with pytest.raises(step_files.Unreadable, match="not permitted"):
        verification.check_reports(folder, iter(unreadable))


def most_at_once(monkeypatch, work):
    """The largest number of bytes that chunks under way had together, during `work`."""
    lock, now, most = threading.Lock(), [0], [0]
    real = StoredArray.read

    def read(self, index=None):
        found = real(self, index)
        with lock:
            now[0] += found.nbytes
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.001)
        with lock:
            now[0] -= found.nbytes
        return found

    with monkeypatch.context() as patch:
        patch.setattr(StoredArray, "read", read)
        work()
    return most[0]


def test_memory_does_not_grow_with_a_leaf(tmp_path, monkeypatch):
    """Neither that of a verification nor those of `show` and `diff`."""
    params = {"huge": values((200, 400))}
    folder, manifest = save(tmp_path / "a", params, monkeypatch)
    other, _ = save(tmp_path / "b", params, monkeypatch)
    monkeypatch.setattr(chunk_readers, "MAX_BYTES", 5 * CHUNK)
    leaves = {"params.huge": manifest.leaves["params.huge"]}
    assert leaves["params.huge"].num_bytes > 70 * CHUNK
    for work in (
        lambda: verification.verify(folder, manifest),
        lambda: comparison.distances([folder], leaves),
        lambda: comparison.distances([folder, other], leaves),
    ):
        assert CHUNK < most_at_once(monkeypatch, work) <= 5 * CHUNK


def test_a_chunk_larger_than_the_budget_is_read_by_itself(tmp_path, monkeypatch):
    folder, manifest = save(tmp_path, {"huge": values((90, 400))}, monkeypatch, 1 << 30)
    monkeypatch.setattr(chunk_readers, "MAX_BYTES", CHUNK)
    assert most_at_once(monkeypatch, lambda: verification.verify(folder, manifest)) == 90 * 400 * 4


@pytest.mark.parametrize("chunks", [(CHUNK, CHUNK), (CHUNK, 1 << 20), (1 << 20, CHUNK)], ids=str)
def test_distances_are_those_of_whole_arrays_whatever_the_chunks(tmp_path, monkeypatch, chunks):
    a, b = values((90, 400)), values((90, 400), seed=1)
    folders = []
    for name, array, size in zip("ab", (a, b), chunks, strict=True):
        folder, manifest = save(tmp_path / name, {"w": array}, monkeypatch, size)
        folders.append(folder)
    leaves = {"params.w": manifest.leaves["params.w"]}
    found = comparison.distances(folders, leaves)["params.w"]
    difference = a.astype(np.float64) - b
    assert found.largest == np.abs(difference).max()
    expected = np.linalg.norm(difference) / np.linalg.norm(a.astype(np.float64))
    assert found.relative == pytest.approx(expected, rel=1e-12)
    assert found.norm_of_a == pytest.approx(np.linalg.norm(a), rel=1e-5)


RESIDENT = """
    import re, sys
    import jax
    from lm.checkpoint import chunk_readers, comparison, step_files, verification
    from lm.storage.epaths import StoragePath

    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

    def read_all(workdir):
        folder = StoragePath(workdir) / "checkpoints" / "1"
        leaves = step_files.read_manifest(folder).leaves
        verification.verify(folder, step_files.read_manifest(folder))
        comparison.distances([folder, folder], {"params.w": leaves["params.w"]})

    chunk_readers.MAX_BYTES = int(sys.argv[1])
    read_all(sys.argv[2])  # libraries and compilation
    before = peak()
    read_all(sys.argv[3])
    print(peak() - before)
"""


@pytest.mark.slow
def test_the_memory_of_a_process_that_verifies_a_huge_leaf_stays_within_the_bound(
    tmp_path, monkeypatch
):
    size, max_bytes = 640 << 20, 72 << 20  # of two chunks
    noise = np.random.default_rng(0).integers(0, 2**30, 1 << 22, np.uint32).view(np.float32)
    huge = np.tile(noise, size >> 24).reshape(1024, -1)
    for name, array in (("small", huge[:, : 1 << 16]), ("huge", huge)):
        save(tmp_path / name, {"w": array}, monkeypatch, 36 << 20)
    command = [sys.executable, "-c", textwrap.dedent(RESIDENT), str(max_bytes)]
    command += [str(tmp_path / "small"), str(tmp_path / "huge")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"{int(done.stdout) >> 20} MiB more for a leaf of {size >> 20} MiB")
    assert int(done.stdout) < 3 * max_bytes + (64 << 20) < size / 2
