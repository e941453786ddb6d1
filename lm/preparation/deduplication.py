"""Repeated documents, found by keys: equal documents have one, and near-duplicates share some.

A document that has a key which an earlier document has, in the order of the sources, is dropped.
Keys are hashes; their first bits divide them into buckets, each looked at by itself.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lm.preparation.arrow_files import ArrowReader, ArrowWriter, column, numbers
from lm.preparation.job import Job
from lm.storage import files as storage
from lm.storage.paths import is_url

_SORTED_KEYS = 1 << 22  # of a bucket, sorted at once
DUPLICATE, NEAR_DUPLICATE = 0, 1  # kinds of keys
REASONS = ("duplicate", "near_duplicate")


class Keys:
    """Keys of documents of a part: two words, the number of the document, and the kind."""

    def __init__(self, num_buckets: int):
        self._num_buckets = num_buckets
        self._digests: list[bytes] = []
        self._numbers: list[int] = []
        self._near: list[np.ndarray] = []
        self._num_near = 0

    def __len__(self) -> int:
        return len(self._digests) + self._num_near

    def add(self, number: int, digest: bytes, near: np.ndarray | None) -> None:
        """digest: of the whole document, 16 bytes. near: keys of near-duplicates, uint64 [n]."""
        self._numbers.append(number)
        self._digests.append(digest)
        if near is not None:
            self._near.append(np.stack([near, np.full(len(near), number, np.uint64)]))
            self._num_near += len(near)

    def flush(self, file: ArrowWriter) -> None:
        """Write a batch for each bucket."""
        import pyarrow as pa

        words = np.frombuffer(b"".join(self._digests), "<u8").reshape(-1, 2)
        near = np.concatenate([np.empty((2, 0), np.uint64), *self._near], 1)
        first = np.concatenate([words[:, 0], near[0]])
        bucket = bucket_of(first, self._num_buckets)
        order = np.argsort(bucket, kind="stable")
        kind = np.repeat(
            np.array([DUPLICATE, NEAR_DUPLICATE], np.uint8), [len(words), len(near[0])]
        )
        numbers = np.concatenate([np.array(self._numbers, np.int64), near[1].astype(np.int64)])
        second = np.concatenate([words[:, 1], np.zeros(len(near[0]), np.uint64)])
        columns = [values[order] for values in (first, second, numbers, kind)]
        limits = np.searchsorted(bucket[order], np.arange(self._num_buckets + 1))
        for start, stop in itertools.pairwise(limits.tolist()):
            arrays = [column(values[start:stop]) for values in columns]
            file.write(pa.RecordBatch.from_arrays(arrays, ["word", "second", "document", "kind"]))
        self.__init__(self._num_buckets)


def bucket_of(words: np.ndarray, num_buckets: int) -> np.ndarray:
    """Return the bucket of each hash, uint64 [n], by its first bits; num_buckets: a power of 2."""
    bits = num_buckets.bit_length() - 1
    return ((words >> np.uint64(1)) >> np.uint64(63 - bits)).astype(np.int64)  # 64 is no shift


def bucket_file(job: Job) -> str:
    """Return the path of the repeated documents of a bucket, with braces for its number."""
    return f"{job.work}/bucket-{{:04d}}.bin"


def deduplicate(job: Job, k: int) -> int:
    """Write the documents of all parts that have a key of bucket `k` which an earlier one has:
    int64 offsets [num_parts + 1], then 2 * document + kind of the key.
    """

    def read(i: int) -> list[np.ndarray]:
        with ArrowReader(f"{job.work}/part-{i:06d}.keys") as reader:
            batches = range(k, reader.num_record_batches, job.num_buckets)
            found = [reader.get_batch(batch) for batch in batches]
            return [np.concatenate([numbers(b.column(c)) for b in found]) for c in range(4)]

    words, documents, kinds, counts = [], [], [], []
    with ThreadPoolExecutor(16 if is_url(job.out) else 1) as threads:
        for word, second, document, kind in threads.map(read, range(job.num_parts)):
            words.append(np.stack([word, second], 1))
            documents.append(document)
            kinds.append(kind)
            counts.append(len(word))
    key, document, kind = (np.concatenate(c) for c in (words, documents, kinds))
    del words, documents, kinds
    repeated = np.zeros(len(key), bool)
    num_rounds = 1 << (len(key) // _SORTED_KEYS).bit_length()
    rounds = bucket_of(key[:, 0], job.num_buckets * num_rounds) % num_rounds
    for number in range(num_rounds):
        chosen = np.flatnonzero(rounds == number)
        order = np.lexsort((key[chosen, 1], key[chosen, 0], kind[chosen]))  # stable: first is first
        chosen = chosen[order]
        same = (key[chosen[1:]] == key[chosen[:-1]]).all(1) & (
            kind[chosen[1:]] == kind[chosen[:-1]]
        )
        repeated[chosen[1:][same]] = True
    part = np.repeat(np.arange(job.num_parts), counts)
    offsets = np.searchsorted(part[repeated], np.arange(job.num_parts + 1))
    values = 2 * document[repeated] + kind[repeated]
    content = np.concatenate([offsets, values]).astype("<i8")
    storage.write_atomically(bucket_file(job).format(k), content.tobytes())
    return 0


def find_repeated(job: Job, i: int, num_documents: int) -> np.ndarray:
    """Return the kind of key by which each document of part `i` repeats an earlier one, or -1."""
    files = [bucket_file(job).format(k) for k in range(job.num_buckets)]
    limits = storage.read_ranges([(file, 8 * i, 8 * i + 16) for file in files])
    ranges = []
    for file, content in zip(files, limits, strict=True):
        start, stop = (np.frombuffer(content, "<i8") + job.num_parts + 1).tolist()
        if stop > start:
            ranges.append((file, 8 * start, 8 * stop))
    found = [np.frombuffer(content, "<i8") for content in storage.read_ranges(ranges)]
    repeated = np.full(num_documents, -1, np.int8)
    for kind in (NEAR_DUPLICATE, DUPLICATE):  # one that is both is a duplicate
        for values in found:
            repeated[values[values % 2 == kind] // 2] = kind
    return repeated
