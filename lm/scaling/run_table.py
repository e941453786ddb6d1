"""The result of a run, read from its folder as a row of a table; and tables of such rows.

The columns are those that lm/scaling fits: parameters with and without embeddings (counted by
lm/models/flops.py), tokens trained on, FLOPs of training, and the final loss on the validation
stores in nats per token.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lm.config import conversion
from lm.config.schema import Config
from lm.models import flops
from lm.reliability import data_ledger
from lm.storage.epaths import StoragePath
from lm.storage.files import write_atomically
from lm.telemetry import jsonl, metrics

Row: TypeAlias = dict[str, Any]  # a row of a table, or a record of a run's metrics


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


def read(workdir: str) -> Result | None:
    """The result of a run at its last evaluation; None before its first, and before the first log
    line of a fork, whose ledger starts where its parent's ends. FileNotFoundError where the folder
    holds no run.
    """
    config = _config(workdir)
    if config is None:
        raise FileNotFoundError(f"{workdir} holds no run: there is no config.json in it")
    records = metrics.read(workdir)
    evals = [r for r in records if r["kind"] == "eval"]
    if not evals:
        return None
    step = evals[-1]["step"]
    entries = data_ledger.read(workdir)
    tokens = _tokens_seen(records, entries, step)
    if tokens is None:
        return None
    count, entry = flops.parameters(config.model), entries[-1]
    return Result(
        run=StoragePath(workdir).name,
        parameters=count.total,
        non_embedding_parameters=count.non_embedding,
        tokens=tokens,
        flops=tokens * _flops_per_token(config, records),
        loss=mean_losses(evals)[step],
        learning_rate=config.optimizer.learning_rate,
        batch_size=(entry["filled"] + entry["padding"]) // config.data.length,
        seed=config.seed,
        step=step,
    )


def is_finished(workdir: str) -> bool:
    """True if the run in a folder has evaluated and saved after its last step; False too where its
    config gives its length in tokens or epochs.
    """
    config = _config(workdir)
    if config is None:
        return False
    steps = config.train.num_steps
    saved = (StoragePath(workdir) / "checkpoints" / str(steps)).exists()
    return saved and steps in mean_losses(metrics.read(workdir))


def _config(workdir: str) -> Config | None:
    path = StoragePath(workdir) / "config.json"
    return conversion.resolve(conversion.from_json(path.read_text())) if path.exists() else None


def mean_losses(records: Iterable[Row]) -> dict[int, float]:
    """{step: the mean loss over the scored tokens of all validation stores}, by the evaluations
    among the records of a run's metrics.
    """
    sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for record in records:
        if record["kind"] == "eval":
            sums[record["step"]] += record["tokens"] * np.array([record["loss"], 1.0])
    return {step: float(loss / tokens) for step, (loss, tokens) in sums.items()}


def _tokens_seen(records: Sequence[Row], entries: Sequence[Row], step: int) -> int | None:
    """Tokens trained on in the first `step` steps: the count of the log line nearest to it, and the
    ledger's of the steps between; None where neither has the tokens of a parent.
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


def _flops_per_token(config: Config, records: Sequence[Row]) -> float:
    """FLOPs per token as the run itself counted them, with its frozen parameters and adapters; of a
    run made before runs did, as if everything were trained.
    """
    counted = [r for r in records if r.get("flops_seen") and r["tokens_seen"]]
    if counted:
        return counted[-1]["flops_seen"] / counted[-1]["tokens_seen"]
    return flops.flops_per_token(config.model, config.data.length, config.data.encoder_length)


def rows(results: Sequence[Result]) -> list[Row]:
    """The columns of the table, one row for each result."""
    return [{name: getattr(result, name) for name in COLUMNS} for result in results]


def write(path: str | Path, table: Sequence[Row]) -> None:
    """Write rows with the same keys as CSV, or as lines of JSON where the name ends with .jsonl;
    the file is there whole or as it was.
    """
    if Path(path).suffix == ".jsonl":
        text = "".join(jsonl.line(row) for row in table)
    else:
        file = io.StringIO()
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in table)
        text = file.getvalue()
    write_atomically(path, text)


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
