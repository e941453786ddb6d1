"""Documents to token stores, in parallel, resumable and atomic.

    OUT/plan.json             what is being prepared: another run must agree with it
    OUT/parts-HASH/           one file per finished part, until the stores are complete
    OUT/train  OUT/validation the stores (see sources/tokens.py)

1. The units of all sources, in order, are grouped into parts: a pure function of the data.
2. Every part is read, tokenised and written to one file, moved to its name when complete. Parts
   are independent, so workers and shards share them out, and a killed run finds its finished ones
   again.
3. Whoever sees all parts done joins them in order, dropping documents seen in an earlier part, into
   stores that appear by one rename each, with their manifest. Whole documents are split here, by
   the hash of their id: where a split stays empty, or too much is lost, the parts stay for another
   attempt.

So the stores are byte for byte the same whatever the workers, the shards and the kills.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm import storage
from lm.data import tokenizer as tokenizers
from lm.data.corpus import (
    Corpus,
    Part,
    key_hash,
    plan_parts,
    read_documents,
    split_without_documents,
)
from lm.data.joining import WHOLE, block_names, empty_split, join, part_file
from lm.data.skip_report import SkipReport, describe_examples
from lm.data.sources import Document, DocumentSource, ListedSource, Skipped
from lm.data.sources.token_writer import encode_block
from lm.data.sources.tokens import MANIFEST
from lm.data.workers import Progress, run_in_processes

_PARTS_VERSION = 2  # to be raised when what a part holds changes


class Prepared(NamedTuple):
    """Manifests of the stores by split, none while other shards have parts to do."""

    manifests: dict[str, dict]
    was_complete: bool


def prepare(
    corpus: Corpus,
    *,
    tokenizer: str,
    out: str | os.PathLike,
    shard: tuple[int, int] = (0, 1),
    num_workers: int | None = None,
    out_flag: str = "--out",
) -> "Prepared":
    """Returns the stores in `out`, after making what is missing of them.

    out_flag: the flag that a user sets `out` with, for errors.

    shard: (i, n) does every n-th part; whichever shard sees all parts done joins them.
    num_workers: processes; all cores if None. Raises ValueError for a missing or empty source, for
    a split without documents, where more of the data than `corpus.max_loss` is lost, and where
    `out` holds something else.
    """
    out = Path(storage.expand(os.fspath(out), out_flag))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out_flag}={storage.printable(str(out))} is a file, not a folder")
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard {index}/{count}: the first number counts from 0 to {count - 1}")
    loaded = tokenizers.load(tokenizer)
    sources = corpus.sources()
    parts = plan_parts(sources)
    plan = _plan(corpus, loaded, parts)
    folder = out / f"parts-{_parts_hash(plan, corpus)[:16]}"
    was_complete = (out / "plan.json").is_file() and _is_complete(out, corpus)
    if not was_complete:
        _check_start(corpus, sources, parts)
    plan = _claim(out, plan, out_flag)
    if not was_complete:
        missing = [i for i in _missing(folder, parts) if i % count == index]
        folder.mkdir(exist_ok=True)
        job = _Job(corpus, tokenizer, loaded.fingerprint, str(folder))
        sizes = [sum(unit.size for _, unit in parts[i]) for i in missing]
        progress = Progress(sum(sizes), done=len(parts[index::count]) - len(missing))
        calls = [(job, i, parts[i]) for i in missing]
        for position, done in run_in_processes(_write_part, calls, num_workers=num_workers):
            progress.add(sizes[position], num_bytes=done.num_bytes, num_tokens=done.num_tokens)
        progress.close()
        left = _missing(folder, parts)
        if left and not _is_complete(out, corpus):
            print(
                f"{len(left)} of {len(parts)} parts are left to other shards; the last one joins "
                "them"
            )
            return Prepared({}, was_complete=False)
        with _lock(out):
            if not _is_complete(out, corpus):
                join(out, folder, parts, corpus, loaded, plan, sources)
    for left in out.glob("parts-*"):
        shutil.rmtree(left, ignore_errors=True)
    manifests = {split: json.loads((out / split / MANIFEST).read_text()) for split in corpus.splits}
    return Prepared(manifests, was_complete)


def _plan(corpus: Corpus, tokenizer: tokenizers.Tokenizer, parts: Sequence[Part]) -> dict:
    """Returns all that the stores depend on, and under "names" how it was spelled."""
    units = [(i, *unit) for part in parts for i, unit in part]
    plan = {
        "tokenizer": tokenizer.fingerprint,
        "columns": dict(corpus.columns),
        "separator": corpus.separator,
        "validation_fraction": corpus.validation_fraction,
        "split": corpus.split,
        "fold": None if corpus.fold is None else list(corpus.fold),
        "num_units": len(units),
        "num_source_bytes": sum(unit.size for part in parts for _, unit in part),
        "units": hashlib.sha256(json.dumps(units).encode()).hexdigest(),
    }
    plan["hash"] = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    plan["names"] = {"tokenizer": tokenizer.name, "data": list(corpus.data)}
    return plan


def inputs_hash(corpus: Corpus) -> str:
    """A hash of the documents of a corpus and of their split: files by their sizes and times."""
    units = [(i, *unit) for part in plan_parts(corpus.sources()) for i, unit in part]
    content = [dict(corpus.columns), corpus.separator, corpus.split, corpus.validation_fraction]
    return hashlib.sha256(json.dumps([content, units]).encode()).hexdigest()


def _parts_hash(plan: dict, corpus: Corpus) -> str:
    """Returns a hash of what the parts depend on: the split only where it cuts documents."""
    keys = ["tokenizer", "columns", "separator", "num_units", "num_source_bytes", "units"]
    if corpus.cuts_documents:
        keys += ["split", "validation_fraction"]
    content = [_PARTS_VERSION, [plan[key] for key in keys]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_start(corpus: Corpus, sources: Sequence[DocumentSource], parts: Sequence[Part]) -> None:
    """Raises ValueError for what would be an error at the end, as far as it is known now."""
    units = [(sources[i], unit) for part in parts for i, unit in part]
    losses = SkipReport()
    for source, unit in units:
        if isinstance(source, ListedSource) and source.document_ids(unit) == []:
            losses.add(Skipped(unit.name, "other_file_type"), unit.size)
    total = sum(unit.size for _, unit in units)
    found = [losses.limit_error(sys.maxsize, total, max_loss=corpus.max_loss)]
    if len(parts) > 1 and (empty := split_without_documents(corpus, sources, parts)):
        found.append(empty_split(empty, len(units), corpus, ""))
    if any(found):
        raise ValueError("; and ".join(filter(None, found)))


def _claim(out: Path, plan: dict, out_flag: str) -> dict:
    """Returns the plan of `out`, now `plan` if it had none. Raises ValueError if it differs."""
    file = out / "plan.json"
    if not file.is_file():
        taken = [split for split in ("train", "validation") if (out / split).exists()]
        if taken:
            raise ValueError(
                f"{out / taken[0]} exists and was not made here; choose another {out_flag}"
            )
        storage.write_atomically(file, json.dumps(plan, indent=2) + "\n")
    found = json.loads(file.read_text())
    different = [
        f"other {key}"
        if key in ("units", "tokenizer")  # a hash says nothing
        else f"{key} (there {found.get(key)}, now {plan[key]})"
        for key in plan
        if key not in ("hash", "names") and found.get(key) != plan[key]
    ]
    if different:
        raise ValueError(
            f"{out} holds a preparation of other inputs: {', '.join(different)}; it was made from "
            f"{', '.join(found['names']['data'])} with tokenizer {found['names']['tokenizer']}. "
            f"Choose another {out_flag}, or remove it if it is of no use any more"
        )
    return found


def _is_complete(out: Path, corpus: Corpus) -> bool:
    return all((out / split / MANIFEST).is_file() for split in corpus.splits)


def _missing(folder: Path, parts: Sequence[Part]) -> list[int]:
    return [i for i in range(len(parts)) if not part_file(folder, i).is_file()]


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Lets one process at a time join the parts; the lock of a killed process is free again."""
    with open(out / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        (out / "lock").unlink(missing_ok=True)


@dataclass(frozen=True)
class _Job:
    """What a worker needs beside the part."""

    corpus: Corpus
    tokenizer: str
    fingerprint: str
    folder: str


class _Done(NamedTuple):
    num_bytes: int
    num_tokens: int


@functools.cache
def _load(name: str, fingerprint: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.load(name)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"tokenizer {name} was changed during the preparation; start again")
    return tokenizer


def _write_part(job: _Job, i: int, part: Part) -> _Done:
    """Writes the file of part `i`: digests of its documents, their blocks, and what was skipped."""
    tokenizer = _load(job.tokenizer, job.fingerprint)
    documents: dict[str, list[Document]] = {group: [] for group in block_names(job.corpus)}
    digests = {group: [] for group in documents}
    losses, sizes = SkipReport(), {unit.name: unit.size for _, unit in part}
    order = {}  # digest -> its number in the part
    for item, digest in read_documents(job.corpus, part):
        if isinstance(item, Skipped):
            losses.add(item, sizes.get(item.id, 0))
            continue
        number = order.setdefault(digest, len(order))
        whole = [(WHOLE, item)]
        for group, document in job.corpus.assign(item) if job.corpus.cuts_documents else whole:
            if not all(document.fields.values()):
                losses.add(Skipped(item.id, "empty"))
                continue
            documents[group].append(document)
            digests[group].append(number)
    arrays = {
        "digests": np.frombuffer(b"".join(order), "<u8").reshape(-1, 2),
        "skipped": np.frombuffer(losses.to_json(), np.uint8),
    }
    num_bytes = num_tokens = 0
    for group, found in documents.items():
        block = encode_block(found, tokenizer, fields=list(job.corpus.columns))
        arrays[f"{group}.digests"] = np.array(digests[group], np.int64)
        arrays[f"{group}.hashes"] = np.array([key_hash(d.id) for d in found], np.uint64)
        arrays[f"{group}.ids"], arrays[f"{group}.id_lengths"] = block.ids
        for name, tokens in block.tokens.items():
            arrays[f"{group}.tokens.{name}"], arrays[f"{group}.lengths.{name}"] = tokens
            arrays[f"{group}.bytes.{name}"] = block.num_bytes[name]
            num_bytes += int(block.num_bytes[name].sum())
            num_tokens += len(tokens.values)
    content = io.BytesIO()
    np.savez(content, **arrays)
    storage.write_atomically(part_file(job.folder, i), content.getbuffer())
    return _Done(num_bytes, num_tokens)


def summary(manifests: dict[str, dict]) -> str:
    """Returns a table of the stores (documents, bytes, tokens, what was skipped), and the first of
    what was skipped.
    """
    lines = [
        f"{'store':<22}{'documents':>11}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}  skipped"
    ]
    examples = []
    for split, manifest in manifests.items():
        skipped = ", ".join(f"{n:,} {reason}" for reason, n in manifest["skipped"].items())
        # stores made before have none
        examples += describe_examples(manifest.get("skipped_examples", {}))
        for name, sizes in manifest["fields"].items():
            label = split if list(manifest["fields"]) == ["text"] else f"{split}/{name}"
            ratio = sizes["num_bytes"] / sizes["num_tokens"]
            lines.append(
                f"{label:<22}{manifest['num_documents']:>11,}{sizes['num_bytes']:>16,}"
                f"{sizes['num_tokens']:>16,}{ratio:>13.3f}  {skipped or 'nothing'}"
            )
    return "\n".join(lines + (["skipped, the first of each:", *examples] if examples else []))
