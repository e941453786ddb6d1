"""What the folder of a run says about it, as a row of a table; and tables of such rows.

The columns are those that lm/scaling fits: parameters with and without embeddings (counted by
lm/models/flops.py), tokens trained on, FLOPs of training, and the final loss on the validation
stores in nats per token.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from lm.config import conversion
from lm.config.schema import Config
from lm.models import flops
from lm.reliability import data_ledger
from lm.telemetry import jsonl, metrics


@dataclasses.dataclass(frozen=True)
class Result:
    """A run and its evaluation after `step` steps."""

    run: str
    parameters: int
    non_embedding_parameters: int
    tokens: int
    flops: float
    loss: float
    learning_rate: float
    batch_size: int
    seed: int
    step: int


COLUMNS = tuple(f.name for f in dataclasses.fields(Result) if f.name != "step")


def read(workdir: str, name: str | None = None) -> Result | None:
    """The result of a run, of its last evaluation; None before its first, and before the first log
    line of a fork, whose ledger begins where its parent's ends.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run: there is no config.json in it")
    config = conversion.resolve(conversion.from_json(path.read_text()))
    records = metrics.read(workdir)
    evals = [r for r in records if r["kind"] == "eval"]
    if not evals:
        return None
    step, loss = evals[-1]["step"], mean_losses(evals)[evals[-1]["step"]]
    entries = data_ledger.read(workdir)
    tokens = _tokens_seen(records, entries, step)
    if tokens is None:
        return None
    count = flops.parameters(config.model)
    data = config.data
    entry = entries[-1]
    return Result(
        run=name or epath.Path(workdir).name,
        parameters=count.total,
        non_embedding_parameters=count.non_embedding,
        tokens=tokens,
        flops=tokens * _flops_per_token(config, records),
        loss=loss,
        learning_rate=config.optimizer.learning_rate,
        batch_size=(entry["filled"] + entry["padding"]) // data.length,
        seed=config.seed,
        step=step,
    )


def is_finished(workdir: str) -> bool:
    """True if the run in a folder has evaluated and saved after its last step; False too where its
    config gives its length in tokens or epochs.
    """
    folder = epath.Path(workdir)
    if not (folder / "config.json").exists():
        return False
    config = conversion.resolve(conversion.from_json((folder / "config.json").read_text()))
    steps = config.train.num_steps
    evaluated = any(r["kind"] == "eval" and r["step"] == steps for r in metrics.read(workdir))
    return evaluated and (folder / "checkpoints" / str(steps)).exists()


def mean_losses(evals: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Step -> the mean loss over the scored tokens of all validation stores, of the records of
    evaluations.
    """
    sums: dict[int, tuple[float, float]] = {}
    for r in evals:
        loss, tokens = sums.get(r["step"], (0.0, 0.0))
        sums[r["step"]] = loss + r["loss"] * r["tokens"], tokens + r["tokens"]
    return {step: loss / tokens for step, (loss, tokens) in sums.items()}


def _tokens_seen(
    records: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]], step: int
) -> int | None:
    """Tokens trained on in the first `step` steps: the count of the log line nearest to it, and the
    ledger's of the steps between; None where neither knows what a parent has trained on.
    """
    logged = {r["step"]: r["tokens_seen"] for r in records if r["kind"] == "train"}
    if not entries or entries[0]["step"] == 0:
        logged.setdefault(0, 0)
    if not logged:
        return None
    near = min(logged, key=lambda at: abs(at - step))
    low, high = sorted((near, step))
    between = sum(e["filled"] for e in entries if low <= e["step"] < high)
    return int(logged[near]) + (between if near < step else -between)


def _flops_per_token(config: Config, records: Sequence[Mapping[str, Any]]) -> float:
    """FLOPs per token as the run itself counted them, which knows its frozen parameters and
    adapters; of a run made before runs did, as if everything were trained.
    """
    counted = [r for r in records if r.get("flops_seen") and r["tokens_seen"]]
    if counted:
        return counted[-1]["flops_seen"] / counted[-1]["tokens_seen"]
    return flops.flops_per_token(config.model, config.data.length, config.data.encoder_length)


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The columns of the table, one row for each result."""
    return [{name: getattr(result, name) for name in COLUMNS} for result in results]


def write(path: str | Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the same keys as CSV, or as lines of JSON where the name ends with .jsonl;
    the file is there whole or as it was.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        text = "".join(jsonl.line(row) for row in table)
    else:
        text_file = io.StringIO()
        writer = csv.DictWriter(text_file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _text(value) for key, value in row.items()} for row in table)
        text = text_file.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.parent / (path.name + ".new")
    new.write_text(text)
    new.replace(path)


def _text(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
