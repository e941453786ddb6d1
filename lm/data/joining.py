"""Finished parts of a preparation to stores: documents once each, in order, split by their ids."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lm.data.corpus import Corpus
from lm.data.skip_report import SkipReport
from lm.data.sources import DocumentSource, skipped_files
from lm.data.sources.token_writer import Block, write_blocks
from lm.tokenizers.tokenizer import Tokenizer


def part_file(folder: str | os.PathLike, i: int) -> Path:
    return Path(folder) / f"part-{i:06d}.npz"


def join(
    out: Path,
    folder: Path,
    num_parts: int,
    corpus: Corpus,
    tokenizer: Tokenizer,
    plan: dict,
    sources: Sequence[DocumentSource],
) -> None:
    """Write the stores from the parts.

    Raises ValueError where a split has no documents, or too much is skipped. The plan is then
    removed, so that the next attempt may have another split, or other data; the parts stay, unless
    they have no documents.
    """
    report = SkipReport()
    for source in sources:
        for item in skipped_files(source):
            report.add(item)
    digests, numbers, held_out = [], [], []
    for i in range(num_parts):
        with np.load(part_file(folder, i)) as part:
            report.update(SkipReport.from_json(part["skipped"].tobytes()))
            digests.append(part["digests"])
            numbers.append(part["numbers"] + sum(map(len, digests[:-1])))
            of_hash = corpus.is_held_out(part["hashes"])
            held_out.append(part["is_validation"] if corpus.cuts_documents else of_hash)
    is_first = _is_first(np.concatenate(digests))[np.concatenate(numbers)]
    is_held_out = np.concatenate(held_out)
    in_split = {split: is_held_out == (split == "validation") for split in corpus.splits}
    counts = {split: int((mask & is_first).sum()) for split, mask in in_split.items()}
    duplicates = {split: int(mask.sum()) - counts[split] for split, mask in in_split.items()}
    report.counts["duplicate"] += sum(duplicates.values())

    total, skipped = sum(counts.values()), report.describe() or "none"
    errors = [report.limit_error(total, plan["num_source_bytes"], max_loss=corpus.max_loss)]
    if not total:
        data = ", ".join(corpus.data)
        errors = [f"no documents in {data}; skipped: {skipped}{report.advice()}"]
    elif empty := [split for split in corpus.splits if not counts[split]]:
        errors.append(empty_split(empty[0], total, corpus, f"; skipped: {skipped}"))
    if any(errors):
        (out / "plan.json").unlink()
        if not total:
            shutil.rmtree(folder)
        raise ValueError("; and ".join(filter(None, errors)))

    limits = np.cumsum([len(found) for found in numbers])[:-1]

    def blocks(split: str) -> Iterator[tuple[Block, np.ndarray]]:
        for i, keep in enumerate(np.split(in_split[split] & is_first, limits)):
            with np.load(part_file(folder, i)) as part:
                yield part, keep

    for split in reversed(corpus.splits):
        # a record that is no document belongs to no split: the train store counts it
        skipped = Counter(duplicate=duplicates[split])
        if split == "train":
            skipped = report.counts - Counter(duplicate=duplicates.get("validation", 0))
        write_blocks(
            out / split,
            blocks(split),
            tokenizer,
            fields=list(corpus.columns),
            tokenizer_name=plan["names"]["tokenizer"],
            source=plan["names"]["data"],
            split=split,
            skipped=+skipped,  # without counts of 0
            skipped_examples=report.examples if split == "train" else {},
        )


def _is_first(digests: np.ndarray) -> np.ndarray:
    """Return bool [n]: True at the first of equal digests, uint64 [n, 2]."""
    order = np.lexsort(digests.T)  # stable: the first of equals stays first
    is_repeat = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    first = np.ones(len(digests), bool)
    first[order[1:][is_repeat]] = False
    return first


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
