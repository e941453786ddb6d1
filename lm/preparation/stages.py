"""The stages of a preparation, each a number of independent tasks; an engine runs them in turn.

    tokenize     part i of the sources: documents as tokens, and the keys that find repeated ones
    deduplicate  bucket i of the keys: documents that repeat an earlier one
    count        part i: the documents that stay, and their sizes
    divide       one task: shards of similar size, from the counts of all parts
    write        shard i
    complete     split i: its manifest

A task is a function of (job, i). It writes its files whole or not at all, also in buckets, and the
same bytes wherever and how often it runs; a task that is done does nothing. So tasks of a stage may
run in any order, at once, and again after a kill, by any engine:

    job = prepare.begin(corpus, tokenizer="bpe.model", out="gs://bucket/data")
    for stage in stages(job):
        for i in stage.missing():  # in any order, anywhere
            stage.run(i)
    prepare.finish(job)

No task holds more than a block of documents in memory, the keys of a bucket, or one shard's index.
Files of the work are in OUT/parts-HASH/; what depends on the split is in a folder of its own there.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lm.preparation import sharding
from lm.preparation.arrow_files import ArrowWriter, column
from lm.preparation.corpus import key_hash
from lm.preparation.deduplication import Keys, bucket_file, deduplicate
from lm.preparation.job import Job
from lm.preparation.parts import read_part
from lm.preparation.skip_report import SkipReport
from lm.preparation.token_writer import document_sizes, encode_block
from lm.sources import Document, Skipped
from lm.storage import files as storage
from lm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK_CHARACTERS, _BLOCK_DOCUMENTS = 1 << 22, 1 << 15  # of a block; a byte of pixels is one
_KEYS = 1 << 21  # of a part, until they are written


class Stage(NamedTuple):
    """Tasks that need all stages before, and not each other.

    num_tasks: known when the stages before are complete. run: task -> number of tokens read by it;
    nothing is done beyond the last task, and where the task is done. missing: tasks still to do.
    """

    name: str
    num_tasks: Callable[[], int]
    run: Callable[[int], int]
    missing: Callable[[], list[int]]


def stages(job: Job) -> list[Stage]:
    """Return the stages of a job, in order."""
    last = functools.partial(len, job.corpus.splits)
    return [
        _stage(job, "tokenize", lambda: job.num_parts, _tokenize, f"{job.work}/part-{{:06d}}.json"),
        _stage(job, "deduplicate", lambda: job.num_buckets, deduplicate, bucket_file(job)),
        _stage(
            job, "count", lambda: job.num_parts, sharding.count, f"{job.split}/count-{{:06d}}.json"
        ),
        _stage(job, "divide", lambda: 1, sharding.divide, f"{job.split}/shards.json"),
        _stage(
            job,
            "write",
            lambda: len(sharding.shards_of(job)),
            sharding.write,
            f"{job.split}/shard-{{:05d}}.json",
        ),
        _stage(job, "complete", last, sharding.complete, f"{job.split}/complete-{{}}"),
    ]


def _stage(
    job: Job, name: str, num_tasks: Callable[[], int], task: Callable[[Job, int], int], marker: str
) -> Stage:
    """Return a stage of which task i has written the file `marker` with i, last of all."""
    folder, _, pattern = marker.rpartition("/")

    def missing() -> list[int]:
        done = set(storage.list_names(folder))
        return [i for i in range(num_tasks()) if pattern.format(i) not in done]

    return Stage(name, num_tasks, functools.partial(_run, job, name, task, marker), missing)


def _run(job: Job, name: str, task: Callable[[Job, int], int], marker: str, i: int) -> int:
    if storage.exists(marker.format(i)) or job.is_complete():
        return 0
    if name == "write" and i >= len(sharding.shards_of(job)):
        return 0
    return task(job, i)


def _tokenize(job: Job, i: int) -> int:
    """Write the documents of part `i` as blocks, their keys by bucket, and what was skipped."""
    tokenizer, part, near_keys = job.load_tokenizer(), job.part(i), job.near_keys()
    report, sizes = SkipReport(), {unit.name: unit.size for _, unit in part}
    duplicates: Counter[str] = Counter()
    keys, rows, num_tokens, number = Keys(job.num_buckets), [], 0, 0
    contaminated: list[str] = []
    documents: list[tuple[int, str, Document]] = []
    with contextlib.ExitStack() as stack:
        blocks, key_file = (
            stack.enter_context(ArrowWriter(f"{job.work}/part-{i:06d}.{suffix}"))
            for suffix in ("arrow", "keys")
        )

        def flush() -> None:
            nonlocal num_tokens
            block = _block(documents, tokenizer, job.fields, job.image_size)
            blocks.write(block)
            rows.append(len(documents))
            num_tokens += sum(len(block.column(f"tokens.{f}").values) for f in job.fields)
            documents.clear()

        size, picture_bytes = 0, 3 * (job.image_size or 0) ** 2
        for item, digest in read_part(job.corpus, part):
            if isinstance(item, Skipped):
                if item.reason == "duplicate":
                    duplicates[job.corpus.split_of(item.detail)] += 1
                else:
                    report.add(item, sizes.get(item.id, 0))
                if item.reason.startswith("decontaminate/"):
                    evaluation_set = item.reason.partition("/")[2]
                    line = {"id": item.id, "set": evaluation_set, "match": item.detail}
                    contaminated.append(json.dumps(line) + "\n")
                continue
            report.masked.update(dict(item.masked))
            keys.add(number, digest, None if near_keys is None else near_keys(item))
            # the split of a whole document follows from its hash, and is asked for later
            is_cut = job.corpus.cuts_documents
            for split, document in job.corpus.assign(item) if is_cut else [("", item)]:
                if isinstance(document, Skipped):
                    report.add(document)
                else:
                    documents.append((number, split, document))
                    size += sum(map(len, document.fields.values())) + picture_bytes
            number += 1
            if size >= _BLOCK_CHARACTERS or len(documents) >= _BLOCK_DOCUMENTS:
                flush()
                size = 0
            if len(keys) >= _KEYS:
                keys.flush(key_file)
        flush()
        keys.flush(key_file)
    if contaminated:
        storage.write_atomically(f"{job.contaminated}/{i:06d}.jsonl", "".join(contaminated))
    content = {
        "rows": rows,
        "num_documents": number,
        "duplicates": duplicates,
        "report": json.loads(report.to_json()),
    }
    storage.write_atomically(f"{job.work}/part-{i:06d}.json", json.dumps(content))
    return num_tokens


def _block(
    documents: Sequence[tuple[int, str, Document]],
    tokenizer: Tokenizer,
    fields: Sequence[str],
    image_size: int | None,
) -> pa.RecordBatch:
    """Return documents as tokens, each with the number of the whole document in the part, the hash
    of its id, its split where documents are cut, and its size in a shard.
    """
    texts = [document for _, _, document in documents]
    block = encode_block(texts, tokenizer, fields=fields, image_size=image_size)
    more = {
        "document": np.array([number for number, _, _ in documents], np.int64),
        "hash": np.array([key_hash(document.split_key) for document in texts], np.uint64),
        "is_validation": np.array([split == "validation" for _, split, _ in documents], np.uint8),
        "size": document_sizes(block, fields),
    }
    for name, values in more.items():
        block = block.append_column(name, column(values))
    return block
