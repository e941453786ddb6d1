"""A cache of plans in a folder, by config, topology, code and versions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from lm import storage
from lm.config import conversion
from lm.config.tree import ConfigTree
from lm.planning import chips, plausibility
from lm.planning.plan import Decode, Plan, from_json, make, without_data
from lm.telemetry.progress import Progress


def cached(
    config: ConfigTree,
    name: str,
    *,
    config_name: str = "",
    decode: Decode | None = None,
    show: Progress | None = None,
    folder: Path | None = None,
) -> tuple[Plan, bool]:
    """(the plan of `make`, True if it was found in the folder)."""
    folder = folder or _folder()
    path = folder / f"{key(config, name, decode)}.json"
    if path.exists():
        return dataclasses.replace(from_json(path.read_text()), name=config_name), True
    plan = make(config, name, config_name=config_name, decode=decode, show=show)
    storage.write_atomically(path, plan.to_json())
    return plan, False


def key(config: ConfigTree, name: str, decode: Decode | None = None) -> str:
    """A hash of all that a plan depends on."""
    conversion.resolve(config)  # raises for a mistake before anything is looked up
    parts = {
        "config": json.loads(conversion.to_json(without_data(config))),
        "topology": name,
        "decode": None if decode is None else dataclasses.asdict(decode),
        "code": _code(),
        "versions": plausibility.versions(),
        "flags": {n: os.environ.get(n, "") for n in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "gpu_share": chips.gpu_share(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _code() -> str:
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "lm" / "plan"
