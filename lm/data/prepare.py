"""Documents to token stores, in parallel, resumable and atomic.

    OUT/plan.json             the inputs of the preparation: another run must agree with it
    OUT/parts-HASH/           one file per finished part, until the stores are complete
    OUT/train  OUT/validation the stores (see sources/tokens.py)

Parts, a pure function of the data, are independent: workers and shards share them out, and a
killed run resumes from the finished ones. The process that sees all parts finished joins them in
order, without repeated documents, and splits whole ones by the hash of their id. So the stores are
byte for byte the same whatever the workers, the shards and the kills.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.data.corpus import Corpus, Part, key_hash, plan_parts, read_part
from lm.data.joining import empty_split, join, part_file
from lm.data.skip_report import SkipReport
from lm.data.sources import Document, DocumentSource, Skipped, document_ids
from lm.data.sources.token_writer import encode_block
from lm.data.sources.tokens import MANIFEST
from lm.data.workers import run_in_processes
from lm.storage.files import write_atomically
from lm.storage.paths import expand_local_path, printable
from lm.telemetry.progress import SEPARATOR, Progress, format_duration, format_quantity
from lm.tokenizers import tokenizer as tokenizers

_PARTS_VERSION = 3  # to be raised when what a part holds changes


class Prepared(NamedTuple):
    """Manifests of the stores by split; empty while other shards have parts to do."""

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
) -> Prepared:
    """Make the stores in `out`, as far as they are missing, and return their manifests.

    shard: (i, n) does every n-th part; the shard that finishes last joins all parts.
    num_workers: processes; all cores if None. out_flag: the flag of `out`, for errors.

    Raises ValueError for a missing or empty source, for a split without documents, where a larger
    share of the data than `corpus.max_loss` is skipped, and where `out` holds something else.
    """
    out = Path(expand_local_path(os.fspath(out), out_flag))
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out_flag}={printable(str(out))} is a file, not a folder")
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
        _check_sources(corpus, sources, parts)
    plan = _record_plan(out, plan, out_flag)
    if not was_complete:
        missing = [i for i in _missing(folder, parts) if i % count == index]
        folder.mkdir(exist_ok=True)
        sizes = {i: sum(unit.size for _, unit in parts[i]) for i in range(index, len(parts), count)}
        job = (corpus, tokenizer, loaded.fingerprint, folder)
        calls = [(*job, i, parts[i]) for i in missing]
        _write_parts(calls, [sizes[i] for i in missing], sum(sizes.values()), num_workers)
        left = _missing(folder, parts)
        if left and not _is_complete(out, corpus):
            print(
                f"{len(left)} of {len(parts)} parts are left to other shards; "
                "the last one joins them"
            )
            return Prepared({}, was_complete=False)
        with _lock(out):
            if not _is_complete(out, corpus):
                join(out, folder, len(parts), corpus, loaded, plan, sources)
    for left in out.glob("parts-*"):
        shutil.rmtree(left, ignore_errors=True)
    manifests = {split: json.loads((out / split / MANIFEST).read_text()) for split in corpus.splits}
    return Prepared(manifests, was_complete)


def _plan(corpus: Corpus, tokenizer: tokenizers.Tokenizer, parts: Sequence[Part]) -> dict:
    """Return all that the stores depend on, and under "names" the tokenizer and data as given."""
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
        "units": _hash(units),
    }
    plan["hash"] = _hash(plan)
    plan["names"] = {"tokenizer": tokenizer.name, "data": list(corpus.data)}
    return plan


def inputs_hash(corpus: Corpus) -> str:
    """Return a hash of the documents of a corpus, by file sizes and times, and of their split."""
    units = [(i, *unit) for part in plan_parts(corpus.sources()) for i, unit in part]
    content = [dict(corpus.columns), corpus.separator, corpus.split, corpus.validation_fraction]
    return _hash([content, units])


def _parts_hash(plan: dict, corpus: Corpus) -> str:
    """Return a hash of what the parts depend on: the split only where it cuts documents."""
    keys = ["tokenizer", "columns", "separator", "num_units", "num_source_bytes", "units"]
    if corpus.cuts_documents:
        keys += ["split", "validation_fraction"]
    return _hash([_PARTS_VERSION, [plan[key] for key in keys]])


def _hash(content: dict | list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_sources(
    corpus: Corpus, sources: Sequence[DocumentSource], parts: Sequence[Part]
) -> None:
    """Raise ValueError for errors of the join that can be known without reading."""
    report, num_units = SkipReport(), sum(map(len, parts))
    # splits without documents, as far as ids tell
    empty = set(corpus.splits if len(parts) > 1 and not corpus.cuts_documents else ())
    for i, unit in itertools.chain.from_iterable(parts):
        ids = document_ids(sources[i], unit)
        if ids is None:
            empty.clear()
        elif ids == []:
            report.add(Skipped(unit.name, "other_file_type"), unit.size)
        for document_id in ids if ids and empty else ():
            empty.discard(corpus.split_of(document_id))
    total = sum(unit.size for part in parts for _, unit in part)
    errors = [report.limit_error(sys.maxsize, total, max_loss=corpus.max_loss)]
    errors += [empty_split(split, num_units, corpus, "") for split in sorted(empty)[:1]]
    if any(errors):
        raise ValueError("; and ".join(filter(None, errors)))


def _record_plan(out: Path, plan: dict, out_flag: str) -> dict:
    """Return the plan of `out`, now `plan` if it had none. Raises ValueError if it differs."""
    file = out / "plan.json"
    if not file.is_file():
        taken = [split for split in ("train", "validation") if (out / split).exists()]
        if taken:
            raise ValueError(
                f"{out / taken[0]} exists and was not made here; choose another {out_flag}"
            )
        write_atomically(file, json.dumps(plan, indent=2) + "\n")
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
    """Let one process at a time join the parts; a killed process releases its lock."""
    with open(out / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        (out / "lock").unlink(missing_ok=True)


@functools.cache
def _load(name: str, fingerprint: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.load(name)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"tokenizer {name} was changed during the preparation; start again")
    return tokenizer


def _write_parts(
    calls: Sequence[tuple], sizes: Sequence[int], total: int, num_workers: int | None
) -> None:
    """Call `_write_part` in processes, and show the progress of a shard of `total` bytes.

    sizes: bytes of the parts to write.
    """
    progress, start = Progress(), time.monotonic()
    num_tokens, left = 0, sum(sizes)
    for position, count in run_in_processes(_write_part, calls, num_workers=num_workers):
        num_tokens, left = num_tokens + count, left - sizes[position]
        seconds = max(time.monotonic() - start, 1e-3)
        parts = (
            f"{format_quantity(total - left)}B of {format_quantity(total)}B",
            f"{num_tokens / seconds:,.0f} tokens/s",
            f"{format_duration(seconds * left / max(sum(sizes) - left, 1))} left",
        )
        progress.show(SEPARATOR.join(parts), final=not left)


def _write_part(
    corpus: Corpus, tokenizer_name: str, fingerprint: str, folder: Path, i: int, part: Part
) -> int:
    """Write the file of part `i` and return the number of its tokens.

    The file has the digests of its documents, the block of their tokens, the number of each one's
    digest, the hash of its id and, where documents are cut, its split; and what was skipped.
    """
    tokenizer = _load(tokenizer_name, fingerprint)
    documents: list[Document] = []
    numbers, is_validation = [], []
    report, sizes = SkipReport(), {unit.name: unit.size for _, unit in part}
    order = {}  # digest -> its number in the part
    for split, item, digest in read_part(corpus, part):
        if isinstance(item, Skipped):
            report.add(item, sizes.get(item.id, 0))
        else:
            documents.append(item)
            numbers.append(order.setdefault(digest, len(order)))
            is_validation.append(split == "validation")
    block = encode_block(documents, tokenizer, fields=list(corpus.columns))
    content = io.BytesIO()
    np.savez(
        content,
        digests=np.frombuffer(b"".join(order), "<u8").reshape(-1, 2),
        skipped=np.frombuffer(report.to_json(), np.uint8),
        numbers=np.array(numbers, np.int64),
        hashes=np.array([key_hash(document.id) for document in documents], np.uint64),
        is_validation=np.array(is_validation, bool),
        allow_pickle=False,
        **block,
    )
    write_atomically(part_file(folder, i), content.getbuffer())
    return sum(len(block[f"tokens.{field}"]) for field in corpus.columns)


def summary(manifests: dict[str, dict]) -> str:
    """Return a table of the stores, with the first skipped records."""
    lines = [
        f"{'store':<22}{'documents':>11}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}  skipped"
    ]
    examples = []
    for split, manifest in manifests.items():
        skipped = ", ".join(f"{n:,} {reason}" for reason, n in manifest["skipped"].items())
        for reason, found in manifest.get("skipped_examples", {}).items():  # old stores have none
            examples.append(f"  {reason}: {', '.join(found)}")
        for name, sizes in manifest["fields"].items():
            label = split if list(manifest["fields"]) == ["text"] else f"{split}/{name}"
            ratio = sizes["num_bytes"] / sizes["num_tokens"]
            lines.append(
                f"{label:<22}{manifest['num_documents']:>11,}{sizes['num_bytes']:>16,}"
                f"{sizes['num_tokens']:>16,}{ratio:>13.3f}  {skipped or 'nothing'}"
            )
    return "\n".join(lines + (["skipped, the first of each:", *examples] if examples else []))
