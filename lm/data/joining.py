"""Finished parts of a preparation to stores: documents once each, in order, split by their ids."""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lm.data.corpus import Corpus
from lm.data.skip_report import SkipReport
from lm.data.sources import DocumentSource, skipped_files
from lm.data.sources.token_writer import Block, RaggedArray, StoreWriter
from lm.data.tokenizer import Tokenizer

WHOLE = "documents"  # the block of a part whose documents are split when it is joined


def part_file(folder: str | os.PathLike, i: int) -> Path:
    return Path(folder) / f"part-{i:06d}.npz"


def block_names(corpus: Corpus) -> tuple[str, ...]:
    """Return the blocks of a part: its splits where they cut documents, else all documents."""
    return corpus.splits if corpus.cuts_documents else (WHOLE,)


def block_arrays(name: str, block: Block) -> dict[str, np.ndarray]:
    """Return the arrays of a part's file that hold `block`."""
    arrays = {f"{name}.ids": block.ids.values, f"{name}.id_lengths": block.ids.lengths}
    for field, tokens in block.tokens.items():
        arrays[f"{name}.tokens.{field}"] = tokens.values
        arrays[f"{name}.lengths.{field}"] = tokens.lengths
        arrays[f"{name}.bytes.{field}"] = block.num_bytes[field]
    return arrays


def _read_block(part: Mapping[str, np.ndarray], name: str, fields: Sequence[str]) -> Block:
    tokens = {
        field: RaggedArray(part[f"{name}.tokens.{field}"], part[f"{name}.lengths.{field}"])
        for field in fields
    }
    ids = RaggedArray(part[f"{name}.ids"], part[f"{name}.id_lengths"])
    return Block(ids, tokens, {field: part[f"{name}.bytes.{field}"] for field in fields})


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

    Raises ValueError where a split has no documents, or too much is skipped; the parts stay.
    """
    report = SkipReport()
    for source in sources:
        for item in skipped_files(source):
            report.add(item)
    digests, blocks = [], []
    for i in range(num_parts):
        with np.load(part_file(folder, i)) as part:
            digests.append(part["digests"])
            report.update(SkipReport.from_json(part["skipped"].tobytes()))
            names = block_names(corpus)
            blocks.append({n: (part[f"{n}.digests"], part[f"{n}.hashes"]) for n in names})
    first = np.split(_first_occurrences(digests), np.cumsum([len(d) for d in digests])[:-1])
    block_of = {split: split if corpus.cuts_documents else WHOLE for split in corpus.splits}
    kept: dict[str, list[np.ndarray]] = {split: [] for split in corpus.splits}  # masks, by part
    duplicates = Counter()
    for split, name in block_of.items():
        for is_first, block in zip(first, blocks, strict=True):
            numbers, hashes = block[name]
            is_held_out = corpus.is_held_out(hashes)
            in_split = corpus.cuts_documents | (is_held_out == (split == "validation"))
            kept[split].append(in_split & is_first[numbers])
            duplicates[split] += int((in_split & ~is_first[numbers]).sum())
    report.counts["duplicate"] += duplicates.total()
    counts = {split: sum(int(mask.sum()) for mask in kept[split]) for split in corpus.splits}
    _check_counts(out, folder, corpus, counts, report, plan["num_source_bytes"])
    for split in reversed(corpus.splits):
        writer = StoreWriter(out / split, tokenizer, fields=list(corpus.columns))
        for i, mask in enumerate(kept[split]):
            with np.load(part_file(folder, i)) as part:
                writer.add(_read_block(part, block_of[split], list(corpus.columns)).keep(mask))
        # a record that is no document belongs to no split: the train store counts it
        skipped = Counter({"duplicate": duplicates[split]})
        if split == "train":
            skipped = report.counts - Counter({"duplicate": duplicates["validation"]})
        writer.close(
            tokenizer_name=plan["names"]["tokenizer"],
            source=plan["names"]["data"],
            split=split,
            skipped=+skipped,  # without counts of 0
            skipped_examples=report.examples if split == "train" else {},
        )


def _check_counts(
    out: Path,
    folder: Path,
    corpus: Corpus,
    counts: dict[str, int],
    report: SkipReport,
    num_bytes: int,
) -> None:
    """Raise ValueError where a split has no documents, or too much is skipped.

    The plan is removed, so that the next attempt may have another split, or other data; the parts
    stay, unless they have no documents.
    """
    total = sum(counts.values())
    skipped = report.describe() or "none"
    if not total:
        data = ", ".join(corpus.data)
        errors = [f"no documents in {data}; skipped: {skipped}{report.advice()}"]
    else:
        errors = [report.limit_error(total, num_bytes, max_loss=corpus.max_loss)]
        if empty := [split for split in corpus.splits if not counts[split]]:
            errors.append(empty_split(empty[0], total, corpus, f"; skipped: {skipped}"))
    if any(errors):
        (out / "plan.json").unlink()
        if not total:
            shutil.rmtree(folder)
        raise ValueError("; and ".join(filter(None, errors)))


def _first_occurrences(digests: Sequence[np.ndarray]) -> np.ndarray:
    """Return bool [n]: True at the first of equal digests, rows of the joined words [n, 2]."""
    words = np.concatenate(digests)
    order = np.lexsort((words[:, 0], words[:, 1]))  # stable: the first of equals stays first
    is_repeat = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    first = np.ones(len(words), bool)
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
