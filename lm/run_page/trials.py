"""The runs of a sweep, and the keys of the config along which they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from lm.config.tree import leaves
from lm.run_page import content, thinning
from lm.run_page.folder import CONFIG_FILE, RunFolder
from lm.storage import files
from lm.telemetry import jsonl

# Keys in which runs differ without being other points of a search.
_AROUND = ("checkpoint.", "log.", "loader.", "data.tokenizer")
_RESULTS = "parameters"  # the first column of a sweep's table after those of its points
MAX_AXES = 12

Json = dict[str, Any]


def folders(sweep: str) -> list[str]:
    """The folders of the runs of a sweep, those without a config left out."""
    spec = json.loads(files.read_bytes(f"{sweep}/sweep.json"))
    home = spec.get("runs") or sweep
    paths = [f"{home}/{name}" for name in files.list_names(home)]
    return [path for path in paths if files.exists(f"{path}/{CONFIG_FILE}")]


def of_sweep(sweep: str, runs: Sequence[RunFolder]) -> Json:
    """{"axes": keys, "rows": [{"name", "status", "loss", "message", "values"}]} of a sweep's table;
    of one under way, which has none yet, from its runs' folders.
    """
    table = jsonl.read(f"{sweep}/sweep.jsonl")
    if not table:
        return _of_runs(runs)
    keys = list(table[0])[2:]
    keys = keys[: keys.index(_RESULTS)] if _RESULTS in keys else keys
    rows = [
        {
            "name": row["run"],
            "status": row["status"],
            "loss": _number(row.get("loss")),
            "message": row.get("message", ""),
            "values": [_value(row.get(key)) for key in keys],
        }
        for row in table
    ]
    return {"axes": keys, "rows": rows}


def _of_runs(runs: Sequence[RunFolder]) -> Json:
    """As `of_sweep`, along the config's keys in which the runs differ."""
    configs = [dict(leaves(run.config)) for run in runs]
    paths = dict.fromkeys(path for config in configs for path in config)
    differing = [path for path in paths if len({repr(c.get(path)) for c in configs}) > 1]
    keys = [path for path in differing if not path.startswith(_AROUND)][:MAX_AXES]
    rows = []
    for run, config in zip(runs, configs, strict=True):
        outcome = run.read_json("outcome.json")
        rows.append(
            {
                "name": run.name,
                "status": outcome.get("status", run.state().kind),
                "loss": _number(content.final_loss(run)),
                "message": outcome.get("message", ""),
                "values": [_value(config.get(key)) for key in keys],
            }
        )
    return {"axes": keys, "rows": rows}


def _value(value: object) -> float | int | str | None:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return str(value)
    return _number(value)


def _number(value: float | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else thinning.number(value)
