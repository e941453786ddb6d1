"""The sections of a run's page: summary, warnings, evaluations, data, checkpoints, samples."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm.checkpoint import step_files
from lm.checkpoint.manifest import Damaged
from lm.config import conversion
from lm.config.tree import as_tuples, leaves
from lm.run_page import charts, thinning, timeline
from lm.run_page.folder import FAILED, UNKNOWN, RunFolder, duration
from lm.storage import files
from lm.storage.epaths import StoragePath
from lm.telemetry.jsonl import Record
from lm.telemetry.metrics import ERROR_SUFFIX, short_names
from lm.telemetry.progress import format_quantity
from lm.telemetry.spikes import spike_score

MAX_CHECKPOINTS = 40  # whose manifests are read, the newest
MAX_WARNINGS = 30  # of each kind
MAX_SAMPLED = 40  # samples of a prompt
MAX_TEXT = 4000  # characters of a sample or a report
_SAMPLE = re.compile(r"^--- ?(.*)$", re.MULTILINE)

Json = dict[str, Any]


def of_run(run: RunFolder, buckets: int = thinning.BUCKETS, *, whole: bool = True) -> Json:
    """All that the page shows of a run. whole: False leaves out what only the page of few runs
    shows: heat maps, samples, checkpoints.
    """
    state = run.state()
    line = timeline.make(run.goodput)
    checkpoints = _checkpoints(run.workdir) if whole else []
    return {
        "name": run.name,
        "workdir": run.workdir,
        "state": {"kind": state.kind, "text": state.text},
        "summary": summary(run, line),
        "row": row(run, line),
        "charts": charts.of_run(run, buckets),
        "scales": charts.scales(run.train),
        "skipped": [r["step"] for r in run.train if r.get("skipped")][:500],
        "timeline": line,
        "starts": timeline.starts(run.goodput, run.attempts),
        "evals": evaluations(run.evals) + evaluations(run.evaluations),
        "heat": charts.heat_maps(run.layers) if whole else [],
        "samples": samples(run) if whole else [],
        "sampled": sampled(run.evaluations) if whole else [],
        "data": data(run),
        "config": configured(run.config),
        "checkpoints": checkpoints,
        "warnings": list(warnings(run, line, checkpoints)),
        "profiles": list(profiles(run)) if whole else [],
    }


def _last(records: Sequence[Record], key: str) -> Any:
    return next((r[key] for r in reversed(records) if key in r), None)


def mean_loss(evals: Sequence[Record]) -> float | None:
    """The loss per token over all sources after the last step that has one; None before that."""
    losses = [r for r in evals if "loss" in r]
    last = [r for r in losses if r["step"] == losses[-1]["step"]]
    tokens = sum(r.get("tokens", 1.0) for r in last)
    return sum(r["loss"] * r.get("tokens", 1.0) for r in last) / tokens if tokens else None


def final_loss(run: RunFolder) -> float:
    """The loss by which runs are ranked; infinite for a run without one."""
    loss = mean_loss(run.evals)
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _bits_per_byte(evals: Sequence[Record]) -> float | None:
    """Those of the last evaluation; None where several sources have some."""
    found = [r for r in evals if "bits_per_byte" in r]
    return _last(found, "bits_per_byte") if len({r["source"] for r in found}) == 1 else None


def speed(records: Sequence[Record]) -> float | None:
    """Median tokens per second over the last half of the log windows."""
    found = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    return float(np.median(found[len(found) // 2 :])) if found else None


def energy(run: RunFolder) -> tuple[str, float] | None:
    """(name, value) of the last number that is recorded in kWh, by the records near the end."""
    for record in reversed(run.metrics[-100:]):
        for key, value in record.items():
            if "kwh" in key.lower() and isinstance(value, float):
                return key, value
    return None


def row(run: RunFolder, line: Json | None) -> Json:
    """The row of a run in the table of several: numbers, or None."""
    train, evals = run.train, run.evals
    values = {
        "step": run.step,
        "tokens": _last(train, "tokens_seen"),
        "parameters": run.overview.get("parameters"),
        "training loss": _last(train, "loss"),
        "validation loss": mean_loss(evals),
        "bits per byte": _bits_per_byte(evals),
        "learning rate": run.config.get("optimizer", {}).get("learning_rate"),
        "tokens/s": speed(train),
        "MFU": _last(train, "mfu"),
        "goodput": line and line["goodput"],
        "hours": line and line["wall"] / 3600,
        "starts": len(run.attempts) or None,
    }
    return {key: v if v is None else thinning.number(float(v)) for key, v in values.items()}


def summary(run: RunFolder, line: Json | None) -> list[list[str]]:
    """[label, value, note] of the tiles at the top."""
    train, evals, known = run.train, run.evals, run.overview
    tiles = []

    def add(label: str, value: object, note: str = "") -> None:
        if value is not None:
            tiles.append([label, str(value), note])

    total = run.num_steps
    share = f"{100 * run.step / total:.0f}% done" if total else ""
    add("steps", f"{run.step:,}" + (f" of {total:,}" if total else ""), share)
    if (seen := _last(train, "tokens_seen")) is not None:
        add("tokens seen", format_quantity(seen), "without padding")
    if "parameters" in known:
        trained = known["trained_parameters"]
        is_part = trained != known["parameters"]
        note = f"{format_quantity(trained)} trained" if is_part else _model_name(run)
        add("parameters", format_quantity(known["parameters"]), note)
    if (loss := _last(train, "loss")) is not None:
        add("training loss", f"{loss:.4f}", "nats per token, last log window")
    if (loss := mean_loss(evals)) is not None:
        step = next(r["step"] for r in reversed(evals) if "loss" in r)
        add("validation loss", f"{loss:.4f}", f"nats per token, after step {step:,}")
    if (bits := _bits_per_byte(evals)) is not None:
        add("bits per byte", f"{bits:.3f}", _compressors(run))
    if (score := spike_score([r["loss"] for r in train if "loss" in r])) is not None:
        norms = spike_score([r["grad_norm"] for r in train if "grad_norm" in r]) or 0.0
        note = f"of losses; of gradient norms {100 * norms:.2f}% (7 deviations off the last 1,000)"
        add("spike score", f"{100 * score:.2f}%", note)
    if (rate := speed(train)) is not None:
        add("tokens per second", format_quantity(rate), "median of the last half")
    if (mfu := _last(train, "mfu")) is not None:
        add("MFU", f"{100 * mfu:.1f}%", "of the devices' peak FLOP/s")
    if (flops := _last(train, "flops_seen")) is not None:
        add("training FLOPs", format_quantity(flops))
    if line:
        starts = len({r["began"] for r in run.goodput})
        note = f"of {duration(line['wall'])}, {starts} start{'s' * (starts > 1)}"
        add("goodput", f"{100 * line['goodput']:.1f}%", note)
    if (found := energy(run)) is not None:
        add("energy", f"{found[1]:.4g} kWh", found[0])
    if "devices" in known:
        count = known["processes"]
        add("devices", known["devices"], f"{count} processes" if count > 1 else "")
    if commit := (known.get("code") or {}).get("commit"):
        add("code", commit[:10], "with changes" if known["code"]["dirty"] else "")
    return tiles


def _model_name(run: RunFolder) -> str:
    names = [run.config.get(key, {}).get("name", "") for key in ("model", "objective", "optimizer")]
    return ", ".join(filter(None, names))


def _compressors(run: RunFolder) -> str:
    found = run.read_json("summary.json")
    keys = (("gzip", "gzip_bits_per_byte"), ("xz", "xz_bits_per_byte"))
    return ", ".join(f"{name} {found[key]:.3f}" for name, key in keys if found.get(key))


def evaluations(evals: Sequence[Record]) -> list[Json]:
    """The last value of every metric of every source, with its standard error, and the best."""
    found = []
    for source, name in short_names(sorted({r["source"] for r in evals})).items():
        own = [r for r in evals if r["source"] == source]
        keys = dict.fromkeys(k for r in own for k, v in r.items() if isinstance(v, float))
        for key in keys:
            if key in ("tokens", "seconds") or key.endswith(ERROR_SUFFIX):
                continue
            values = [(r["step"], r[key], r.get(key + ERROR_SUFFIX)) for r in own if key in r]
            finite = [v for v in values if math.isfinite(v[1])]
            low = min(finite, key=lambda v: v[1], default=None)
            high = max(finite, key=lambda v: v[1], default=None)
            step, value, error = values[-1]
            last = next(r for r in reversed(own) if key in r)
            part = f" of {last['total']:,}, partial" if "total" in last else ""
            found.append(
                {
                    "source": name,
                    "metric": key,
                    "step": step,
                    "examples": f"{last['n']:,}{part}" if "n" in last else "",
                    "value": thinning.number(value),
                    "error": None if error is None else thinning.number(error, 3),
                    "lowest": low and [thinning.number(low[1]), low[0]],
                    "highest": high and [thinning.number(high[1]), high[0]],
                }
            )
    return found


def samples(run: RunFolder) -> list[Json]:
    """[{"step", "title", "text"}], the newest first."""
    text = run.read_text("samples.txt")
    parts = _SAMPLE.split(text)
    pairs = list(zip(parts[1::2], parts[2::2], strict=True)) or ([("", text)] if text else [])
    step = run.read_json("summary.json").get("steps", run.step)
    return [{"step": step, "title": t, "text": x.strip()[:MAX_TEXT]} for t, x in pairs]


def sampled(evaluations: Sequence[Record]) -> list[Json]:
    """[{"name", "prompt", "rows": [[step, text]]}] of fixed prompts, the newest steps first; of
    many steps some MAX_SAMPLED at equal distances.
    """
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for record in reversed(evaluations):
        for row in record.get("samples", ()):
            if "prompt" in row:
                rows = found.setdefault((record["source"], row["prompt"]), [])
                rows.append((record["step"], row["text"][:MAX_TEXT]))
    return [
        {"name": name, "prompt": prompt, "rows": rows[:: -(-len(rows) // MAX_SAMPLED)]}
        for (name, prompt), rows in found.items()
    ]


def data(run: RunFolder) -> list[Json]:
    """The sources of training, with the epochs up to now and of the whole run."""
    total = run.num_steps or 0
    share = min(1.0, run.step / total) if total else 0.0
    names = short_names([s["source"] for s in run.overview.get("sources", [])])
    return [
        {
            "name": names[s["source"]],
            "path": s["source"],
            "rows": s["rows"],
            "share": thinning.number(s["share"], 4),
            "epochs": thinning.number(s["epochs"] * share, 3),
            "planned": thinning.number(s["epochs"], 3),
        }
        for s in run.overview.get("sources", [])
    ]


def configured(config: Json) -> dict[str, str]:
    return {path: repr(as_tuples(value)) for path, value in leaves(config)}


def explained(config: Json) -> dict[str, list[str]]:
    """{path: [default, sentence]}; {} where this code does not know a component of the config."""
    try:
        tree = conversion.from_json(json.dumps(config))
        return {p: [repr(as_tuples(d)), text] for p, _, d, text in conversion.explain(tree)}
    except (ValueError, ImportError, KeyError):
        return {}


def _checkpoints(workdir: str) -> list[Json]:
    directory, found = StoragePath(workdir) / "checkpoints", []
    for step in step_files.steps(directory)[: -MAX_CHECKPOINTS - 1 : -1]:
        folder = directory / str(step)
        entry: Json = {"step": step, "size": files.total_size(folder), "fault": "", "parent": ""}
        entry["verified"] = step_files.is_verified(folder)
        try:
            manifest = step_files.read_manifest(folder)
        except (Damaged, OSError, ValueError) as error:
            found.append({**entry, "fault": str(error)})
            continue
        saved = datetime.datetime.fromtimestamp(manifest.time, datetime.UTC)
        parent = manifest.parent
        entry["parent"] = f"{parent['workdir']}@{parent['step']}" if parent else ""
        entry |= {"saved": saved.isoformat(timespec="seconds")}
        found.append({**entry, "tokens": manifest.ledger.get("filled")})
    return found


def profiles(run: RunFolder) -> Iterator[Json]:
    """Summaries of profiles, as lm/telemetry/profiler.py writes them."""
    for name in run.names("profile"):
        if name.endswith(".json"):
            yield run.read_json(f"profile/{name}")


def warnings(run: RunFolder, line: Json | None, checkpoints: Sequence[Json]) -> Iterator[Json]:
    """{"level": "bad" or "mild", "title", "text"}, the worst first."""

    def warn(level: str, title: str, text: str = "") -> Json:
        return {"level": level, "title": title, "text": text[:MAX_TEXT]}

    state = run.state()
    if state.kind == FAILED:
        yield warn("bad", "The run has failed", state.text)
    if state.kind == UNKNOWN and run.attempts:
        yield warn("bad", "The run has no end", state.text)
    names = sorted(run.names("evidence"), key=lambda n: [int(x) for x in re.findall(r"\d+", n)])
    for name in names[:MAX_WARNINGS]:
        yield warn("bad", *_evidence(run, name))
    for entry in checkpoints:
        if entry["fault"]:
            yield warn("bad", f"The checkpoint of step {entry['step']} is damaged", entry["fault"])
    if bad := run.names("bad_checkpoints"):
        yield warn("bad", f"{_count(len(bad), 'checkpoint')} did not verify", ", ".join(bad))
    wrong = [
        f"step {r['step']}: {key} {value}"
        for r in run.metrics
        for key, value in r.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if wrong:
        yield warn("bad", f"{_count(len(wrong), 'value')} not finite", "; ".join(wrong[:10]))
    windows = [r for r in run.train if r.get("skipped")]
    if windows:
        count, steps = int(sum(r["skipped"] for r in windows)), [r["step"] for r in windows]
        text = f"in the log windows that end at steps {', '.join(map(str, steps[:20]))}"
        yield warn("bad", f"{_count(count, 'update')} skipped", text)
    if stacks := run.names("stacks"):
        yield warn("bad", "The run has hung", f"the stacks of its threads: {', '.join(stacks)}")
    lost = [a for a in run.attempts[:-1] if a.get("code") is None]
    if lost:
        text = "each was killed, crashed, or lost its machine; the next one went on from its last "
        text += "checkpoint: starts " + ", ".join(str(a["attempt"]) for a in lost[:20])
        yield warn("mild", f"{_count(len(lost), 'start')} ended without a word", text)
    if line:
        for phase, what in (
            ("data", "waiting for batches"),
            ("save", "saving"),
            ("redone", "steps that were done again after a restart"),
            ("down", "no process at all"),
        ):
            share = line["seconds"].get(phase, 0.0) / (line["wall"] or 1.0)
            if share > 0.1:
                yield warn("mild", f"{100 * share:.0f}% of the wall time went into {what}")


def _evidence(run: RunFolder, name: str) -> tuple[str, str]:
    """(title, text) of a report in RUN/evidence."""
    found, path = run.read_json(f"evidence/{name}"), f"evidence/{name}"
    if "verdict" in found:
        lines = [found["reason"]]
        for key, label in (("first", "first"), ("again", "done again"), ("float32", "in float32")):
            if outcome := found.get(key):
                bad = " (bad)" if outcome["bad"] else ""
                lines.append(
                    f"{label}: loss {_g(outcome['loss'])}, gradient norm "
                    f"{_g(outcome['grad_norm'])}{bad}"
                )
        for row in found.get("worst_rows", [])[:1]:
            for document in row["documents"][:1]:
                lines.append(
                    f"worst row {row['row']}: {row['source']}, document {document['id']}: "
                    f"{document['begins'][:200]!r}"
                )
        return f"Step {found['step']} was bad, because of: {found['verdict']}", "\n".join(
            [*lines, path]
        )
    told = found.get("attempts", [])
    errors = "\n".join(f"start {a['attempt']}: {a.get('error', '')}" for a in told)
    return f"{_count(len(told), 'start')} in a row failed", f"{errors}\n{path}"


def _g(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
