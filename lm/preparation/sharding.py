"""Documents that stay, divided into shards of similar size, and the stores of these shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lm.preparation.arrow_files import ArrowReader, column, numbers
from lm.preparation.corpus import Corpus
from lm.preparation.deduplication import REASONS, find_repeated
from lm.preparation.job import Job
from lm.preparation.skip_report import SkipReport
from lm.preparation.token_writer import write_manifest, write_shard
from lm.storage import files as storage

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_BYTES = 2 << 30
_DOCUMENT_BYTES = 512  # a shard has at most SHARD_BYTES / this documents: 4 million


def count(job: Job, i: int) -> int:
    """Write the split of every document of part `i`, 0 where it is dropped, uint8; the numbers and
    sizes of those that stay, by split and block; and what was skipped, by split.
    """
    part = json.loads(storage.read_bytes(f"{job.work}/part-{i:06d}.json"))
    repeated = find_repeated(job, i, part["num_documents"])
    splits, counts, dropped = [], {split: [] for split in job.corpus.splits}, Counter()
    is_cut = job.corpus.cuts_documents  # one document is then counted once
    columns = ("document", "hash", "is_validation", "size")
    with ArrowReader(f"{job.work}/part-{i:06d}.arrow", columns) as reader:
        for b in range(reader.num_record_batches):
            block = reader.get_batch(b)
            document, hashes, is_validation, size = (
                numbers(block.column(name)) for name in columns
            )
            if not is_cut:
                is_validation = job.corpus.is_held_out(hashes).astype(np.uint8)
            kind = repeated[document]
            for number, split in enumerate(job.corpus.splits):
                chosen = is_validation == number
                kept = chosen & (kind < 0)
                counts[split].append([int(kept.sum()), int(size[kept].sum())])
                for of_kind, reason in enumerate(() if number and is_cut else REASONS):
                    dropped[split, reason] += int((chosen & (kind == of_kind)).sum())
            splits.append(np.where(kind < 0, 1 + is_validation, 0).astype(np.uint8))
    storage.write_atomically(f"{job.split}/keep-{i:06d}.bin", np.concatenate(splits).tobytes())
    for split, number in part["duplicates"].items():
        dropped[split, "duplicate"] += number
    content = {
        "counts": counts,
        "dropped": [[*key, number] for key, number in dropped.items() if number],
        "report": part["report"],
    }
    storage.write_atomically(f"{job.split}/count-{i:06d}.json", json.dumps(content))
    return 0


def divide(job: Job, _: int) -> int:
    """Write the shards, ranges of blocks of consecutive parts.

    Raises ValueError where a split has no documents, or too much is skipped. The plan is then
    removed, so that the next attempt may have another split, or other data; the parts stay, unless
    they have no documents.
    """
    files = [(f"{job.split}/count-{i:06d}.json", None, None) for i in range(job.num_parts)]
    found = [json.loads(content) for content in storage.read_ranges(files)]
    report = SkipReport.from_json(storage.read_bytes(f"{job.work}/skipped.json"))
    dropped: Counter[tuple[str, str]] = Counter()
    for part in found:
        report.update(SkipReport.from_json(json.dumps(part["report"]).encode()))
        for split, reason, number in part["dropped"]:
            dropped[split, reason] += number
    shards, totals = [], {}
    for split in job.corpus.splits:
        counts = [np.array(part["counts"][split]).reshape(-1, 2) for part in found]
        totals[split] = sum(int(blocks[:, 0].sum()) for blocks in counts)
        shards += [[split, *limits] for limits in _ranges_of_blocks(counts)]
    _check(job, totals, report, dropped)
    skipped = {split: Counter() for split in job.corpus.splits}
    skipped["train"] += report.counts  # a record that is no document belongs to no split
    for (split, reason), number in dropped.items():
        skipped[split][reason] += number
    content = {
        "shards": shards,
        "skipped": {split: +counts for split, counts in skipped.items()},
        "skipped_examples": report.examples,
        "masked": report.masked,
    }
    storage.write_atomically(f"{job.split}/shards.json", json.dumps(content))
    return 0


def _ranges_of_blocks(counts: Sequence[np.ndarray]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first part, its first block, last part, its last block) of shards of similar size.

    counts: of each part, int64 [blocks, 2], the documents and their bytes in each block.
    """
    place = [(i, b) for i, blocks in enumerate(counts) for b in range(len(blocks))]
    sizes = np.concatenate(counts)
    weights = np.maximum(sizes[:, 1], sizes[:, 0] * _DOCUMENT_BYTES)
    ends = np.cumsum(weights)
    num_shards = max(-(-int(ends[-1]) // SHARD_BYTES), 1)
    shard = (ends - weights) * num_shards // max(int(ends[-1]), 1)
    for number in np.unique(shard[sizes[:, 0] > 0]).tolist():
        of_shard = np.flatnonzero(shard == number)
        yield *place[of_shard[0]], *place[of_shard[-1]]


def _check(
    job: Job, totals: dict[str, int], report: SkipReport, dropped: Counter[tuple[str, str]]
) -> None:
    corpus, total = job.corpus, sum(totals.values())
    everything = SkipReport(report.counts.copy(), report.examples)
    for (_, reason), number in dropped.items():
        everything.counts[reason] += number
    skipped = everything.describe() or "none"
    errors = [report.limit_error(total, job.plan["num_source_bytes"], max_loss=corpus.max_loss)]
    if not total:
        data = ", ".join(corpus.data)
        errors = [f"no documents in {data}; skipped: {skipped}{report.advice()}"]
    elif empty := [split for split in corpus.splits if not totals[split]]:
        errors.append(empty_split(empty[0], total, corpus, f"; skipped: {skipped}"))
    if any(errors):
        storage.delete(f"{job.out}/plan.json")
        if not total:
            storage.delete(job.work)
        raise ValueError("; and ".join(filter(None, errors)))


def empty_split(split: str, count: int, corpus: Corpus, skipped: str) -> str:
    """Return the error of a split without documents."""
    held_out = f"validation fraction {corpus.validation_fraction}"
    if corpus.fold is not None:
        held_out = f"fold {corpus.fold[0]} of {corpus.fold[1]}"
    return (
        f"none of the {count} documents of {', '.join(corpus.data)} falls into {split} "
        f"({held_out}{skipped}); change --validation-fraction (0 makes no validation store), which "
        "keeps what is done, or cut every document with --split=tail"
    )


def shards_of(job: Job) -> list[list]:
    return json.loads(storage.read_bytes(f"{job.split}/shards.json"))["shards"]


def write(job: Job, j: int) -> int:
    shards = shards_of(job)
    split, *limits = shards[j]
    number = [name for name, *_ in shards[:j]].count(split)
    blocks = _kept_blocks(job, split, *limits)
    entry = write_shard(
        f"{job.out}/{split}",
        number,
        blocks,
        fields=job.fields,
        packings=job.packings,
        image_size=job.image_size,
    )
    storage.write_atomically(f"{job.split}/shard-{j:05d}.json", json.dumps(entry))
    return 0


def _kept_blocks(
    job: Job, split: str, first: int, first_block: int, last: int, last_block: int
) -> Iterator[pa.RecordBatch]:
    """Yield the blocks of a shard, with the documents that stay in its split."""
    code = 1 + job.corpus.splits.index(split)
    for i in range(first, last + 1):
        rows = json.loads(storage.read_bytes(f"{job.work}/part-{i:06d}.json"))["rows"]
        keep = np.frombuffer(storage.read_bytes(f"{job.split}/keep-{i:06d}.bin"), np.uint8) == code
        ends = np.cumsum(rows).tolist()
        with ArrowReader(f"{job.work}/part-{i:06d}.arrow") as reader:
            start = first_block if i == first else 0
            stop = last_block + 1 if i == last else len(rows)
            for b in range(start, stop):
                chosen = keep[ends[b] - rows[b] : ends[b]]
                if chosen.any():
                    yield reader.get_batch(b).filter(column(chosen))


def complete(job: Job, i: int) -> int:
    split = job.corpus.splits[::-1][i]  # train is the last
    numbers = [j for j, (name, *_) in enumerate(shards_of(job)) if name == split]
    files = [(f"{job.split}/shard-{j:05d}.json", None, None) for j in numbers]
    plan = json.loads(storage.read_bytes(f"{job.split}/shards.json"))
    write_manifest(
        f"{job.out}/{split}",
        [json.loads(content) for content in storage.read_ranges(files)],
        job.load_tokenizer(),
        tokenizer_name=job.plan["names"]["tokenizer"],
        fields=job.fields,
        source=job.plan["names"]["data"],
        split=split,
        skipped=plan["skipped"][split],
        skipped_examples=plan["skipped_examples"] if split == "train" else {},
        masked=plan["masked"] if split == "train" else {},
        images=job.plan.get("images", {}),
    )
    storage.write_atomically(f"{job.split}/complete-{i}", b"")
    return 0
