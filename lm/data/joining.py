"""Finished parts of a preparation to stores: documents once each, in order, split by their ids."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lm.data import tokenizer as tokenizers
from lm.data.corpus import Corpus, Part
from lm.data.skip_report import SkipReport
from lm.data.sources import DocumentSource, ListedSource
from lm.data.sources.token_writer import Block, RaggedArray, StoreWriter

WHOLE = "documents"  # the block of a part whose documents are split when it is joined


def part_file(folder: str | os.PathLike, i: int) -> Path:
    return Path(folder) / f"part-{i:06d}.npz"


def block_names(corpus: Corpus) -> tuple[str, ...]:
    """The blocks of a part: its splits where they cut documents, else all whole documents."""
    return corpus.splits if corpus.cuts_documents else (WHOLE,)


def _read_block(part, group: str, corpus: Corpus) -> Block:
    return Block(
        RaggedArray(part[f"{group}.ids"], part[f"{group}.id_lengths"]),
        {
            name: RaggedArray(part[f"{group}.tokens.{name}"], part[f"{group}.lengths.{name}"])
            for name in corpus.columns
        },
        {name: part[f"{group}.bytes.{name}"] for name in corpus.columns},
    )


def join(
    out: Path,
    folder: Path,
    parts: Sequence[Part],
    corpus: Corpus,
    tokenizer: tokenizers.Tokenizer,
    plan: dict,
    sources: Sequence[DocumentSource],
) -> None:
    """Writes the stores from the parts.

    Raises ValueError where a split has no documents, or too much is lost; the parts stay.
    """
    losses = SkipReport()
    for source in sources:
        for item in source.skipped_files() if isinstance(source, ListedSource) else ():
            losses.add(item)
    digests, numbers, hashes = [], [], []
    for i in range(len(parts)):
        with np.load(part_file(folder, i)) as part:
            digests.append(part["digests"])
            losses.update(SkipReport.from_json(part["skipped"].tobytes()))
            numbers.append({group: part[f"{group}.digests"] for group in block_names(corpus)})
            hashes.append({group: part[f"{group}.hashes"] for group in block_names(corpus)})
    first = np.split(_first_occurrences(digests), np.cumsum([len(d) for d in digests])[:-1])
    kept: dict[str, list[np.ndarray]] = {}  # masks of the documents of each part
    duplicates = Counter()
    for split in corpus.splits:
        kept[split] = []
        for i in range(len(parts)):
            group = split if corpus.cuts_documents else WHOLE
            is_first = first[i][numbers[i][group]]
            belongs = np.ones(len(is_first), bool)
            if not corpus.cuts_documents:
                belongs = corpus.is_held_out(hashes[i][group]) == (split == "validation")
            kept[split].append(is_first & belongs)
            duplicates[split] += int((belongs & ~is_first).sum())
    losses.counts["duplicate"] += duplicates.total()
    counts = {split: sum(int(mask.sum()) for mask in kept[split]) for split in corpus.splits}
    _check_end(out, folder, corpus, counts, losses, plan["num_source_bytes"])
    for split in reversed(corpus.splits):
        writer = StoreWriter(out / split, tokenizer, fields=list(corpus.columns))
        for i, mask in enumerate(kept[split]):
            with np.load(part_file(folder, i)) as part:
                group = split if corpus.cuts_documents else WHOLE
                writer.add(_read_block(part, group, corpus).keep(mask))
        # what is no document is of no split: the train store says it
        skipped = Counter({"duplicate": duplicates[split]})
        if split == "train":
            skipped = losses.counts - Counter({"duplicate": duplicates["validation"]})
        writer.close(
            tokenizer_name=plan["names"]["tokenizer"],
            source=plan["names"]["data"],
            split=split,
            skipped=+skipped,  # without counts of 0
            skipped_examples=losses.examples if split == "train" else {},
        )


def _check_end(
    out: Path,
    folder: Path,
    corpus: Corpus,
    counts: dict[str, int],
    losses: SkipReport,
    num_bytes: int,
) -> None:
    """Raises ValueError where a split has no documents, or too much is lost.

    The plan is given up, so that the next attempt may have another split, or other data; the parts
    stay, unless there is no document in them.
    """
    total = sum(counts.values())
    listed = losses.describe() or "none"
    if not total:
        found = [f"no documents in {', '.join(corpus.data)}; skipped: {listed}{losses.advice()}"]
    else:
        found = [losses.limit_error(total, num_bytes, max_loss=corpus.max_loss)]
        if empty := [split for split in corpus.splits if not counts[split]]:
            found.append(empty_split(empty[0], total, corpus, f"; skipped: {listed}"))
    if any(found):
        (out / "plan.json").unlink()
        if not total:
            shutil.rmtree(folder)
        raise ValueError("; and ".join(filter(None, found)))


def _first_occurrences(digests: Sequence[np.ndarray]) -> np.ndarray:
    """Returns bool [n]: whether a digest of the joined [n, 2] words is the first of its kind."""
    words = np.concatenate(digests)
    order = np.lexsort((words[:, 0], words[:, 1]))  # stable: the first of equals stays first
    is_repeat = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    first = np.ones(len(words), bool)
    first[order[1:][is_repeat]] = False
    return first


def empty_split(split: str, count: int, corpus: Corpus, skipped: str) -> str:
    held_out = f"validation fraction {corpus.validation_fraction}"
    if corpus.fold is not None:
        held_out = f"fold {corpus.fold[0]} of {corpus.fold[1]}"
    return (
        f"none of the {count} documents of {', '.join(corpus.data)} falls into {split} "
        f"({held_out}{skipped}); change --validation-fraction (0 makes no validation store), which "
        "keeps what is done, or cut every document with --split=tail"
    )
