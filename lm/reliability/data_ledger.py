"""Data ledger: hashes and token counts of the batch of every step, one line a step.

    {"step": 12, "records": "9f...", "content": "03...", "filled": 4000, "padding": 96,
     "scored": 4000, "chain": "5c..."}

`step` is the number, from 0, that `batch_at` gets. `records` is a hash of the ids of its records
and `content` one of every bit of the batch (`lm.training.train_step.fingerprint`). `chain` hashes
all lines up to its own: two runs with the same one saw the same data in the same order. A step that
is redone must consume what it consumed before.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Mapping

import numpy as np

from lm.checkpoint.checksums import hexadecimal
from lm.exit_codes import Exit, RunError
from lm.storage.epaths import StoragePath
from lm.telemetry import jsonl
from lm.telemetry.jsonl import Record

LEDGER_FILE = "ledger.jsonl"
COUNTS = ("filled", "padding", "scored")


class LedgerMismatch(RunError):
    """A step consumed something else than when it was done before."""

    code = Exit.MISMATCH


def read(workdir: str) -> list[Record]:
    """The lines of a run's ledger, without a last one that a kill has cut."""
    return jsonl.read(StoragePath(workdir) / LEDGER_FILE)


def chain_at(workdir: str, steps: int) -> str | None:
    """The chain after so many steps of a run; None if its ledger has not come so far."""
    found = (entry["chain"] for entry in read(workdir) if entry["step"] == steps - 1)
    return next(found, None)


def start_totals() -> Record:
    """The totals before step 0."""
    return {"steps": 0, **dict.fromkeys(COUNTS, 0), "chain": "0" * 16}


class Ledger:
    """Record of all steps in order; all processes compare, the `active` one writes."""

    def __init__(
        self, workdir: str, totals: Record, *, compare: bool = True, active: bool = True
    ) -> None:
        """totals: those of the checkpoint that the run resumes from.

        compare: False where the config of the data was changed on purpose; lines of later steps are
        then dropped.
        """
        self._totals = dict(totals)
        self._path = StoragePath(workdir) / LEDGER_FILE
        written = read(workdir)
        start = totals["steps"]
        before = next((e for e in reversed(written) if e["step"] == start - 1), None)
        if compare and before is not None and before["chain"] != totals["chain"]:
            raise LedgerMismatch(
                f"{self._path}: the checkpoint at step {start} says chain {totals['chain']}, the "
                f"ledger {before['chain']}: they are not of the same run"
            )
        kept = written if compare else [e for e in written if e["step"] < start]
        self._before = {e["step"]: e for e in kept if e["step"] >= start}
        self._recent: collections.deque[Record] = collections.deque(maxlen=10_000)
        self._written = kept[-1]["step"] if kept else -1
        self._file = jsonl.Writer(self._path, kept, active=active)

    def record(self, step: int, info: Mapping[str, np.ndarray], batch_tokens: int) -> None:
        """Add step number `step`.

        info: of `lm.training.train_step`, on the host. batch_tokens: with padding.

        Raises:
            LedgerMismatch: the step was done before and consumed something else.
        """
        if step != self._totals["steps"]:
            raise AssertionError(f"step {step} after {self._totals['steps']} steps")
        filled = int(info["filled"])
        entry = {
            "step": step,
            "records": hexadecimal(info["records"]),
            "content": hexadecimal(info["content"]),
            "filled": filled,
            "padding": batch_tokens - filled,
            "scored": int(info["scored"]),
        }
        link = f"{self._totals['chain']} {json.dumps(entry)}".encode()
        entry["chain"] = hashlib.blake2b(link, digest_size=8).hexdigest()
        before = self._before.pop(step, None)
        if before is not None and before != entry:
            changed = [f"{k}: {before[k]} -> {entry[k]}" for k in entry if before[k] != entry[k]]
            raise LedgerMismatch(
                f"{self._path}: step {step} consumed something else than before "
                f"({', '.join(changed)}): the data or the code that reads it has changed"
            )
        self._totals["steps"] = step + 1
        self._totals["chain"] = entry["chain"]
        for name in COUNTS:
            self._totals[name] += entry[name]
        self._recent.append(entry)
        if step > self._written:
            self._file.append(entry)
            self._written = step

    def roll_back(self, totals: Record) -> None:
        """Go back to the totals of an earlier checkpoint, from which steps are redone."""
        self._before |= {e["step"]: e for e in self._recent if e["step"] >= totals["steps"]}
        self._totals = dict(totals)

    def totals(self) -> Record:
        """Steps, filled, padding and scored tokens up to now, and the chain."""
        return dict(self._totals)

    def flush(self) -> None:
        """Return when all steps are stored, as before a checkpoint that refers to them."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()
