"""Documents to token stores, in parallel, resumable and atomic, on this machine's processes.

    OUT/plan.json             the inputs of the preparation: another run must agree with it
    OUT/parts-HASH/           what finished tasks have written, until the stores are complete
    OUT/train  OUT/validation the stores (see sources/tokens.py)

The work is divided into stages of independent tasks (see stages.py): processes and machines take
them in any order, and a killed run resumes from the finished ones. Repeated documents are dropped,
and whole ones split by the hash of their id. So the stores are byte for byte the same whatever the
workers, the shards and the kills. OUT may be in a bucket.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from lm.data.bins import Packing
from lm.data.store_files import MANIFEST
from lm.preparation import engines, filters
from lm.preparation.corpus import Corpus
from lm.preparation.job import Job
from lm.preparation.parts import Part, plan_parts
from lm.preparation.sharding import empty_split
from lm.preparation.skip_report import SkipReport
from lm.preparation.stages import Stage, stages
from lm.preparation.workers import Workers
from lm.sources import DocumentSource, Skipped, document_ids, skipped_files
from lm.storage import files as storage
from lm.storage import lease
from lm.storage.paths import expand_path, is_url, printable
from lm.telemetry.progress import SEPARATOR, Progress, format_duration, format_quantity
from lm.tokenizers import tokenizer as tokenizers

_PARTS_VERSION = 4  # to be raised when what a part holds changes
_MANY_TASKS = 8  # of a stage, whose progress is then shown


class Prepared(NamedTuple):
    """Manifests of the stores by split."""

    manifests: dict[str, dict]
    was_complete: bool


def prepare(
    corpus: Corpus,
    *,
    tokenizer: str,
    out: str | os.PathLike,
    num_workers: int | None = None,
    engine: str | None = None,
    out_flag: str = "--out",
    packings: Sequence[Packing] = (),
) -> Prepared:
    """Make the stores in `out`, as far as they are missing, and return their manifests.

    num_workers: processes; all cores if None. engine: runs the tasks in their place (engines.py).
    out_flag: the flag of `out`, for errors. packings: of which a plan is stored in each shard.

    Raises ValueError for a missing or empty source, for a split without documents, where a larger
    share of the data than `corpus.max_loss` is skipped, where `out` holds something else, and where
    another process is at it.
    """
    if engine is not None:
        engines.parse(engine)
    job = begin(corpus, tokenizer=tokenizer, out=out, out_flag=out_flag, packings=packings)
    if was_complete := job.is_complete():
        return Prepared(finish(job), was_complete)
    try:
        with (
            lease.lock(f"{job.out}/lock"),
            Workers(num_workers) if engine is None else engines.Engine(engine, job.work) as workers,
        ):
            if not job.is_complete():  # by a command that held the lock a moment ago
                first, *others = stages(job)
                _tokenize(job, workers, first)
                for stage in others:
                    _run(workers, stage)
    except lease.Locked as error:
        raise ValueError(f"{printable(os.fspath(out))}: {error} is preparing it") from None
    return Prepared(finish(job), was_complete)


def begin(
    corpus: Corpus,
    *,
    tokenizer: str,
    out: str | os.PathLike,
    out_flag: str = "--out",
    packings: Sequence[Packing] = (),
) -> Job:
    """Record the plan in `out` and return the job of its stages; raises as `prepare`."""
    folder = expand_path(os.fspath(out), out_flag).rstrip("/") or "/"
    if not is_url(folder) and os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{out_flag}={printable(folder)} is a file, not a folder")
    loaded = tokenizers.load(tokenizer)
    for fields, lengths, _ in packings:
        if min(lengths) < 1 or len(lengths) not in (1, len(fields)):
            raise ValueError(
                f"--rows={','.join(map(str, lengths))}: give one positive length, or one for each "
                f"of the {len(fields)} fields"
            )
    sources = corpus.sources()
    for spec, source in zip(corpus.data, sources, strict=True):
        data = getattr(source, "whole_folder", None)
        if data and _is_in(folder, data):
            raise ValueError(
                f"{out_flag}={printable(folder)} is in the folder of --data={printable(spec)}, and "
                f"what is written there would be data, too: name another {out_flag}, or a pattern "
                f"of files, such as --data='{printable(spec)}/*.txt'"
            )
    parts = plan_parts(sources, with_pictures=corpus.image is not None)
    plan = _plan(corpus, loaded, parts, packings)
    parts_hash = _parts_hash(plan, corpus)
    is_new = not storage.exists(f"{folder}/plan.json")
    job = Job(
        corpus, tokenizer, loaded.fingerprint, folder, plan, parts_hash, len(parts), (*packings,)
    )
    if is_new or not job.is_complete():
        _check_sources(corpus, sources, parts)
    job = dataclasses.replace(job, plan=_record_plan(folder, plan, out_flag))
    if not job.is_complete() and not storage.exists(f"{job.work}/skipped.json"):
        report = SkipReport()
        for item in itertools.chain.from_iterable(map(skipped_files, sources)):
            report.add(item)
        job.write_parts(parts)
        storage.write_atomically(f"{job.work}/skipped.json", report.to_json())
    return job


def _is_in(path: str, folder: str) -> bool:
    """Return True for a folder and what is below it."""
    if not is_url(path):
        path, folder = os.path.realpath(path), os.path.realpath(folder)
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def finish(job: Job) -> dict[str, dict]:
    """Remove the files of the work, and return the manifests of the stores by split."""
    for name in storage.list_names(job.out):
        is_old = name.startswith("contaminated-") and f"{job.out}/{name}" != job.contaminated
        if name.startswith("parts-") or name == "lock" or is_old:
            storage.delete(f"{job.out}/{name}")
    files = {split: f"{job.out}/{split}/{MANIFEST}" for split in job.corpus.splits}
    return {split: json.loads(storage.read_bytes(file)) for split, file in files.items()}


def _tokenize(job: Job, workers: Workers | engines.Engine, stage: Stage) -> None:
    """Run the first stage, and show its progress."""
    sizes, missing, num_tokens = job.part_sizes(), stage.missing(), 0
    total, left = sum(sizes), sum(sizes[i] for i in missing)
    progress, start, all_left = Progress(), time.monotonic(), left
    for i, count in workers.run(stage.run, missing):
        num_tokens, left = num_tokens + count, left - sizes[i]
        seconds = max(time.monotonic() - start, 1e-3)
        parts = [f"{format_quantity(total - left)}B of {format_quantity(total)}B"]
        if num_tokens:  # engines do not say how many
            parts += [
                f"{num_tokens / seconds:,.0f} tokens/s",
                f"{format_duration(seconds * left / max(all_left - left, 1))} left",
            ]
        progress.show(SEPARATOR.join(parts), final=not left)
    _check_done(stage, missing)


def _run(workers: Workers | engines.Engine, stage: Stage) -> None:
    missing, progress = stage.missing(), Progress()
    for done, _ in enumerate(workers.run(stage.run, missing), 1):
        if len(missing) > _MANY_TASKS:
            progress.show(f"{stage.name}: {done} of {len(missing)}", final=done == len(missing))
    _check_done(stage, missing)


def _check_done(stage: Stage, missing: Sequence[int]) -> None:
    """Raise ValueError if tasks of those that were missing still are: an engine doesn't say so."""
    if missing and (left := stage.missing()):
        raise ValueError(
            f"stage {stage.name}: {len(left)} of {stage.num_tasks()} tasks have failed"
        )


def _plan(
    corpus: Corpus,
    tokenizer: tokenizers.Tokenizer,
    parts: Sequence[Part],
    packings: Sequence[Packing],
) -> dict:
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
    if packings:
        plan["rows"] = [packing.name for packing in packings]
    if corpus.filters:
        plan["filters"] = [filters.identity(text) for text in corpus.filters]
    if (min_hash := corpus.min_hash) is not None:
        plan["near_duplicates"] = dataclasses.asdict(min_hash)
    if corpus.split_by is not None:
        plan["split_by"] = corpus.split_by
    if (pictures := corpus.picture_format) is not None:
        plan["images"] = {"column": corpus.image, **pictures.identity()}
    plan["hash"] = _hash(plan)
    plan["names"] = {"tokenizer": tokenizer.name, "data": list(corpus.data)}
    return plan


def inputs_hash(corpus: Corpus) -> str:
    """Return a hash of the documents of a corpus, by file sizes and times, and of their split."""
    units = [(i, *unit) for part in plan_parts(corpus.sources()) for i, unit in part]
    content = [dict(corpus.columns), corpus.separator, corpus.split, corpus.validation_fraction]
    content += [filters.identity(text) for text in corpus.filters]
    if corpus.source_columns != corpus.columns:
        content += [corpus.source_columns]
    return _hash([content, units])


def _parts_hash(plan: dict, corpus: Corpus) -> str:
    """Return a hash of what the parts depend on: the split only where it cuts documents."""
    keys = ["tokenizer", "columns", "separator", "num_units", "num_source_bytes", "units"]
    changes = ("filters", "near_duplicates", "split_by", "images")
    keys += [key for key in changes if key in plan]
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
        if ids is None or corpus.split_by:
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


def _record_plan(out: str, plan: dict, out_flag: str) -> dict:
    """Return the plan of `out`, now `plan` if it had none. Raises ValueError if it differs."""
    file = f"{out}/plan.json"
    if not storage.exists(file):
        taken = [split for split in ("train", "validation") if storage.exists(f"{out}/{split}")]
        if taken:
            raise ValueError(
                f"{out}/{taken[0]} exists and was not made here; choose another {out_flag}"
            )
        storage.write_atomically(file, json.dumps(plan, indent=2) + "\n")
    found = json.loads(storage.read_bytes(file))
    different = [
        f"other {key}"
        if key in ("units", "tokenizer", "filters")  # a hash says nothing
        else f"{key} (there {found.get(key)}, now {plan.get(key)})"
        for key in dict.fromkeys([*plan, *found])
        if key not in ("hash", "names") and found.get(key) != plan.get(key)
    ]
    if different:
        raise ValueError(
            f"{out} holds a preparation of other inputs: {', '.join(different)}; it was made from "
            f"{', '.join(found['names']['data'])} with tokenizer {found['names']['tokenizer']}. "
            f"Choose another {out_flag}, or remove it if it is of no use any more"
        )
    return found


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
    for split, manifest in manifests.items():
        if images := manifest.get("images"):
            size, count = images["size"], images["num_images"]
            lines.append(f"{split}: {count:,} pictures of {size} x {size}")
    if masked := next(iter(manifests.values())).get("masked"):
        lines.append(f"masked: {', '.join(f'{n:,} {kind}' for kind, n in masked.items())}")
    return "\n".join(lines + (["skipped, the first of each:", *examples] if examples else []))
