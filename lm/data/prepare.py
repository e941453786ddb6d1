"""Documents to token stores, in parallel, resumable and atomic.

    OUT/plan.json             what is being prepared: another run must agree with it
    OUT/parts-HASH/           one file per finished part, until the stores are complete
    OUT/train  OUT/validation the stores (see sources/tokens.py)

1. The units of all sources, in order, are grouped into parts: a pure function of the data.
2. Every part is read, split, tokenised and written to one file, moved to its name when complete.
   Parts are independent, so workers and shards share them out, and a killed run finds its finished
   ones again.
3. Whoever sees all parts done joins them in order, dropping documents seen in an earlier part, into
   stores that appear by one rename each, with their manifest.

So the stores are byte for byte the same whatever the workers, the shards and the kills.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.data import tokenizer as tokenizers
from lm.data.corpus import Corpus, Part, plan_parts, read_part
from lm.data.progress import Progress, parallel
from lm.data.sources import Skipped
from lm.data.sources.token_writer import Block, Ragged, StoreWriter, encode_block
from lm.data.sources.tokens import MANIFEST


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
) -> "Prepared":
    """Returns the stores in `out`, after making what is missing of them.

    shard: (i, n) does every n-th part; whichever shard sees all parts done joins them.
    num_workers: processes; all cores if None. Raises ValueError for a missing or empty source, for
    a split without documents, and where `out` holds something else.
    """
    out = Path(out)
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard {index}/{count}: the first number counts from 0 to {count - 1}")
    loaded = tokenizers.load(tokenizer)
    parts = plan_parts(corpus.sources())
    plan = _claim(out, _plan(corpus, loaded, parts))
    folder = out / f"parts-{plan['hash'][:16]}"
    was_complete = _is_complete(out, corpus)
    if not was_complete:
        missing = [i for i in _missing(folder, parts) if i % count == index]
        folder.mkdir(exist_ok=True)
        job = _Job(corpus, tokenizer, loaded.fingerprint, str(folder))
        sizes = [sum(unit.size for _, unit in parts[i]) for i in missing]
        progress = Progress(sum(sizes), done=len(parts[index::count]) - len(missing))
        calls = [(job, i, parts[i]) for i in missing]
        for position, done in parallel(_write_part, calls, num_workers=num_workers):
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
                _join(out, folder, parts, corpus, loaded, plan)
    shutil.rmtree(folder, ignore_errors=True)
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


def _claim(out: Path, plan: dict) -> dict:
    """Returns the plan of `out`, now `plan` if it had none. Raises ValueError if it differs."""
    file = out / "plan.json"
    if not file.is_file():
        taken = [split for split in ("train", "validation") if (out / split).exists()]
        if taken:
            raise ValueError(f"{out / taken[0]} exists and was not made here; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / f"plan.json.{_unique()}.tmp"
        temporary.write_text(json.dumps(plan, indent=2) + "\n")
        temporary.replace(file)
    found = json.loads(file.read_text())
    different = [
        f"{key} (there {found.get(key)}, now {plan[key]})"
        for key in plan
        if key not in ("hash", "names") and found.get(key) != plan[key]
    ]
    if different:
        raise ValueError(
            f"{out} holds a preparation of other inputs: {', '.join(different)}; it was made from "
            f"{', '.join(found['names']['data'])} with tokenizer {found['names']['tokenizer']}. "
            "Choose another --out or remove it"
        )
    return found


def _is_complete(out: Path, corpus: Corpus) -> bool:
    return all((out / split / MANIFEST).is_file() for split in corpus.splits)


def _part_file(folder: str | os.PathLike, i: int) -> Path:
    return Path(folder) / f"part-{i:06d}.npz"


def _missing(folder: Path, parts: Sequence[Part]) -> list[int]:
    return [i for i in range(len(parts)) if not _part_file(folder, i).is_file()]


def _unique() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


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
    """Writes the file of part `i`: digests of its documents, blocks and skips by split."""
    tokenizer = _load(job.tokenizer, job.fingerprint)
    documents = {split: [] for split in job.corpus.splits}
    digests = {split: [] for split in job.corpus.splits}
    skipped = {split: Counter() for split in job.corpus.splits}
    order = {}  # digest -> its number in the part
    for split, item, digest in read_part(job.corpus, part):
        if isinstance(item, Skipped):
            skipped[split][item.reason] += 1
        else:
            documents[split].append(item)
            digests[split].append(order.setdefault(digest, len(order)))
    arrays = {
        "digests": np.frombuffer(b"".join(order), "<u8").reshape(-1, 2),
        "skipped": np.frombuffer(json.dumps(skipped).encode(), np.uint8),
    }
    num_bytes = num_tokens = 0
    for split in job.corpus.splits:
        block = encode_block(documents[split], tokenizer, fields=list(job.corpus.columns))
        arrays[f"{split}.digests"] = np.array(digests[split], np.int64)
        arrays[f"{split}.ids"], arrays[f"{split}.id_lengths"] = block.ids
        for name, tokens in block.tokens.items():
            arrays[f"{split}.tokens.{name}"], arrays[f"{split}.lengths.{name}"] = tokens
            arrays[f"{split}.bytes.{name}"] = block.num_bytes[name]
            num_bytes += int(block.num_bytes[name].sum())
            num_tokens += len(tokens.values)
    temporary = Path(job.folder) / f"part-{i:06d}.{_unique()}.tmp"
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(_part_file(job.folder, i))
    return _Done(num_bytes, num_tokens)


def _read_block(part, split: str, corpus: Corpus) -> Block:
    return Block(
        Ragged(part[f"{split}.ids"], part[f"{split}.id_lengths"]),
        {
            name: Ragged(part[f"{split}.tokens.{name}"], part[f"{split}.lengths.{name}"])
            for name in corpus.columns
        },
        {name: part[f"{split}.bytes.{name}"] for name in corpus.columns},
    )


def _join(
    out: Path,
    folder: Path,
    parts: Sequence[Part],
    corpus: Corpus,
    tokenizer: tokenizers.Tokenizer,
    plan: dict,
) -> None:
    """Writes the stores from the parts. Raises ValueError where a split has no documents."""
    digests, rows = [], {split: [] for split in corpus.splits}
    skipped = {split: Counter() for split in corpus.splits}
    for i in range(len(parts)):
        with np.load(_part_file(folder, i)) as part:
            digests.append(part["digests"])
            for split, counts in json.loads(part["skipped"].tobytes()).items():
                skipped[split].update(counts)
                rows[split].append(part[f"{split}.digests"])
    first = np.split(_first_occurrences(digests), np.cumsum([len(d) for d in digests])[:-1])
    kept = Counter()
    for split in corpus.splits:
        rows[split] = [first[i][numbers] for i, numbers in enumerate(rows[split])]
        kept[split] = sum(int(mask.sum()) for mask in rows[split])
        skipped[split]["duplicate"] += sum(len(mask) for mask in rows[split]) - kept[split]
        skipped[split] = +skipped[split]  # without counts of 0
    if not all(kept[split] for split in corpus.splits):
        (out / "plan.json").unlink()
        shutil.rmtree(folder)
        raise ValueError(_no_documents(kept, skipped, corpus))
    for split in reversed(corpus.splits):
        writer = StoreWriter(out / split, tokenizer, fields=list(corpus.columns))
        for i, mask in enumerate(rows[split]):
            with np.load(_part_file(folder, i)) as part:
                writer.add(_read_block(part, split, corpus).keep(mask))
        writer.close(
            tokenizer_name=plan["names"]["tokenizer"],
            source=plan["names"]["data"],
            split=split,
            skipped=skipped[split],
        )


def _first_occurrences(digests: Sequence[np.ndarray]) -> np.ndarray:
    """Returns bool [n]: whether a digest of the joined [n, 2] words is the first of its kind."""
    words = np.concatenate(digests)
    order = np.lexsort((words[:, 0], words[:, 1]))  # stable: the first of equals stays first
    is_repeat = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    first = np.ones(len(words), bool)
    first[order[1:][is_repeat]] = False
    return first


def _no_documents(kept: Counter, skipped: dict[str, Counter], corpus: Corpus) -> str:
    reasons = sum(skipped.values(), Counter())
    listed = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or "none"
    if not kept.total():
        return f"no documents in {', '.join(corpus.data)}; skipped: {listed}"
    empty = next(split for split in corpus.splits if not kept[split])
    return (
        f"none of the {kept.total()} documents of {', '.join(corpus.data)} falls into {empty} "
        f"(validation fraction {corpus.validation_fraction}; skipped: {listed}); change "
        "--validation-fraction (0 makes no validation store), or cut every document with "
        "--split=tail"
    )


def summary(manifests: dict[str, dict]) -> str:
    """Returns a table of the stores: documents, bytes, tokens, and what was skipped."""
    lines = [
        f"{'store':<22}{'documents':>11}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}  skipped"
    ]
    for split, manifest in manifests.items():
        skipped = ", ".join(f"{n:,} {reason}" for reason, n in manifest["skipped"].items())
        for name, sizes in manifest["fields"].items():
            label = split if list(manifest["fields"]) == ["text"] else f"{split}/{name}"
            ratio = sizes["num_bytes"] / sizes["num_tokens"]
            lines.append(
                f"{label:<22}{manifest['num_documents']:>11,}{sizes['num_bytes']:>16,}"
                f"{sizes['num_tokens']:>16,}{ratio:>13.3f}  {skipped or 'nothing'}"
            )
    return "\n".join(lines)
