"""The table of runs that scaling laws are fitted to: read, checked, and reduced to the best runs.

A row is one finished measurement: parameters, tokens, FLOPs and the loss in nats per token. The
caller states how parameters are counted, and the artefact keeps it with every constant.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

# What counts as N, and the column that it is read from.
COUNTING = {"total": "parameters", "non_embedding": "non_embedding_parameters"}
NEEDED = ("parameters", "tokens", "flops", "loss")
# Settings that laws are fitted for, and distinct tokens of a run that repeats its data.
OPTIONAL = ("learning_rate", "batch_size", "unique_tokens")
# Training takes about 6 FLOPs for each parameter and token (arXiv:2001.08361): more with long rows
# of narrow models, less with embedding tables. Tiny models without their embeddings reach 10 times
# as much; a mistake in units is a factor of 1000.
FLOPS_PER_PARAMETER_TOKEN = 6.0
FLOPS_RATIO = 30.0  # the largest factor between that and a table's
SAME = 1.001  # factor within which sizes are one size, and token counts one count

Record = Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Points:
    """Columns of equal length n: runs, or what is read between runs."""

    parameters: np.ndarray  # float64 [n]
    tokens: np.ndarray  # float64 [n]
    flops: np.ndarray  # float64 [n], of the whole run
    loss: np.ndarray  # float64 [n], nats per token

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, which: np.ndarray | tuple[np.ndarray, np.ndarray | int]) -> Self:
        """The rows at these positions, or where this mask is True; of columns with two axes, the
        pairs of positions.
        """
        columns = {k: v[which] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(self, **columns)


@dataclasses.dataclass(frozen=True)
class Table(Points):
    """Runs, with their parameters counted as `counting` says."""

    rows: np.ndarray  # int [n], positions in the file, from 1, for messages
    counting: str  # a key of COUNTING
    learning_rate: np.ndarray | None = None
    batch_size: np.ndarray | None = None
    unique_tokens: np.ndarray | None = None

    def sizes(self) -> np.ndarray:
        """The number of each row's size, from the smallest: int [n]. Parameters that were read from
        a picture or counted in two ways differ in their last digits.
        """
        return groups(self.parameters)

    def cells(self) -> np.ndarray:
        """The number of each row's pair of size and token count: int [n]."""
        return _numbers(self.sizes(), groups(self.tokens))

    def settings(self) -> np.ndarray:
        """The number of each row's learning rate and batch size: int [n]."""
        kept = [c for c in (self.learning_rate, self.batch_size) if c is not None]
        return _numbers(*kept) if kept else np.zeros(len(self), int)

    def best(self) -> Table:
        """The runs of the setting with the least mean loss, for each pair of parameters and tokens.

        A law of the loss is one of well-chosen learning rates and batches. Seeds of one setting all
        stay.
        """
        cells = self.cells()
        kinds = _numbers(cells, self.settings())
        mean, best = means(self.loss, kinds), []
        for cell in range(cells.max() + 1):
            of_cell = np.unique(kinds[cells == cell])
            best.append(of_cell[mean[of_cell].argmin()])
        return self.take(np.isin(kinds, best))

    def flops_ratio(self) -> np.ndarray:
        """FLOPs for each parameter and token: float64 [n]."""
        return self.flops / (self.parameters * self.tokens)


def _numbers(*columns: np.ndarray) -> np.ndarray:
    """The number of each row among the distinct rows of columns [n]: int [n]."""
    distinct = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    return distinct[1].reshape(-1)


def groups(values: np.ndarray) -> np.ndarray:
    """The number of each value's group, from the smallest: int [n]. A group holds values up to SAME
    times its least one.
    """
    found, least, number = np.zeros(len(values), int), -np.inf, -1
    for i in np.argsort(values):
        if number < 0 or values[i] > SAME * least:
            number, least = number + 1, values[i]
        found[i] = number
    return found


def means(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The mean of each group of values: [n], by the numbers that `groups` gave."""
    return np.bincount(numbers, values) / np.bincount(numbers)


@dataclasses.dataclass(frozen=True)
class Source:
    """The file that a table was read from, for the artefact."""

    path: str
    sha256: str  # of the file's bytes
    num_rows: int
    unfinished: int  # rows left out since their `status` is another than finished
    non_finite: int  # rows left out since their loss is no number, on request


def read(
    path: str,
    *,
    counting: str,
    columns: Mapping[str, str] | None = None,
    drop_non_finite: bool = False,
    vocab_size: int | None = None,
) -> tuple[Table, Source]:
    """Read and check a CSV, JSONL or Parquet file with a header.

    columns: names in the file for those of Table, {"parameters": "n_params"}. Rows whose column
    `status` is not "finished" are left out, and counted. vocab_size: losses above its logarithm are
    refused.

    Raises:
        ValueError: a column is missing, a value is no number, or the rows are refused.
    """
    names = {name: name for name in (*NEEDED, *OPTIONAL, "status")}
    names["parameters"] = COUNTING[counting]
    if unknown := set(columns or {}) - set(names):
        raise ValueError(f"--columns: no column is called {sorted(unknown)}; there are {[*names]}")
    names |= columns or {}
    content = Path(path).read_bytes()
    records = _records(path, content)
    if not records:
        raise ValueError(f"{path} has no rows")
    has = records[0].keys()
    if missing := [names[n] for n in NEEDED if names[n] not in has]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(has)} "
            "(--columns=parameters=NAME,... gives theirs)"
        )
    found = [n for n in OPTIONAL if any(r.get(names[n]) not in ("", None) for r in records)]
    finished = [
        (i, r)
        for i, r in enumerate(records, 1)
        if names["status"] not in has or r[names["status"]] == "finished"
    ]
    values = {
        name: np.array([_number(path, i, names[name], r) for i, r in finished], float)
        for name in (*NEEDED, *found)
    }
    table = Table(**values, rows=np.array([i for i, _ in finished], int), counting=counting)
    finite = np.isfinite(table.loss)
    if drop_non_finite:
        table = table.take(finite)
    _check_values(path, table, vocab_size)
    _check_duplicates(path, table, [records[i - 1] for i in table.rows])
    source = Source(
        path=str(path),
        sha256=hashlib.sha256(content).hexdigest(),
        num_rows=len(records),
        unfinished=len(records) - len(finished),
        non_finite=int((~finite).sum()),
    )
    return table, source


def check(table: Table, *, num_constants: int) -> None:
    """Raise ValueError where `num_constants` cannot be told from these rows."""
    sizes, counts = (means(v, groups(v)) for v in (table.parameters, table.tokens))
    if len(sizes) < 3 or len(counts) < 3:
        raise ValueError(
            f"the table has {_count(len(sizes), 'size')} (parameters {_list(sizes)}) and "
            f"{_count(len(counts), 'token count')} ({_list(counts)}): a floor and a slope in each "
            "need at least 3 and 3"
        )
    cells = int(table.cells().max()) + 1
    if cells < num_constants + 3:
        raise ValueError(
            f"the table has {cells} different pairs of parameters and tokens: {num_constants} "
            f"constants and their intervals need at least {num_constants + 3}"
        )


def _check_values(path: str, table: Table, vocab_size: int | None) -> None:
    if not len(table):
        raise ValueError(f"{path}: no row is left that is finished and has a finite loss")

    def refuse(bad: np.ndarray, name: str, reason: str) -> None:
        if bad.any():
            values = _list(getattr(table, name)[bad])
            raise ValueError(f"{path}: {name} of {_rows(table, bad)} is {values}{reason}")

    refuse(
        ~np.isfinite(table.loss),
        "loss",
        ": a run that diverged measures nothing (--drop-non-finite leaves such rows out and counts "
        "them)",
    )
    for name in (*NEEDED, *OPTIONAL):
        if (column := getattr(table, name)) is not None:
            positive = np.isfinite(column) & (column > 0)
            refuse(~positive, name, ", and must be finite and above 0")
    if vocab_size is not None:
        refuse(
            table.loss > math.log(vocab_size) + 0.1,
            "loss",
            f", but guessing among {vocab_size} tokens costs {math.log(vocab_size):.3f} nats: is "
            "it in bits? (1 bit = 0.6931 nats)",
        )
    _check_flops(path, table)
    if table.unique_tokens is not None:
        few = table.unique_tokens < 1e-3 * table.tokens
        refuse(
            few,
            "unique_tokens",
            f" of {_list(table.tokens[few])} tokens: more than 1000 epochs; are the units the "
            "same?",
        )


def _check_flops(path: str, table: Table) -> None:
    ratio = table.flops_ratio() / FLOPS_PER_PARAMETER_TOKEN
    bad = np.abs(np.log(ratio)) > math.log(FLOPS_RATIO)
    if not bad.any():
        return
    i = int(np.argmax(np.abs(np.log(ratio))))
    which = "every row" if bad.all() else _rows(table, bad)
    raise ValueError(
        f"{path}: flops of {which} {'is' if bad.all() or bad.sum() == 1 else 'are'} more than "
        f"{FLOPS_RATIO:g} times off 6 x parameters x tokens: row {table.rows[i]} has "
        f"{table.flops[i]:.4g} against 6 x {table.parameters[i]:.4g} x {table.tokens[i]:.4g} = "
        f"{table.flops[i] / ratio[i]:.4g}, a factor of {ratio[i]:.3g}; are parameters, tokens and "
        "FLOPs in units of one, and FLOPs those of the whole run?"
    )


def _check_duplicates(path: str, table: Table, records: Sequence[Record]) -> None:
    rows = defaultdict(list)
    for row, record in zip(table.rows, records, strict=True):
        rows[tuple(sorted((k, str(v)) for k, v in record.items() if k != "run"))].append(row)
    twice = [(first, other) for first, *others in rows.values() for other in others]
    if twice:
        pairs = ", ".join(f"{a} = {b}" for a, b in twice[:5])
        raise ValueError(
            f"{path}: {len(twice)} of {len(records)} rows are there twice (rows {pairs}): they "
            "would make the intervals too narrow"
        )


def _records(path: str, content: bytes) -> Sequence[Record]:
    suffix = Path(path).suffix
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    if suffix == ".jsonl":
        return [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    if suffix == ".csv":
        return list(csv.DictReader(content.decode().splitlines()))
    raise ValueError(f"{path}: a table is a .csv, .jsonl or .parquet file, not {suffix or 'this'}")


def _number(path: str, row: int, name: str, record: Record) -> float:
    value = record.get(name, "missing")
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        shown = repr(value) if name in record else value
        raise ValueError(f"{path}, row {row}: {name} is {shown}, which is no number") from None


def _rows(table: Table, mask: np.ndarray) -> str:
    rows = table.rows[mask]
    text = ", ".join(str(r) for r in rows[:6]) + (", ..." if len(rows) > 6 else "")
    return f"row {text}" if len(rows) == 1 else f"rows {text} ({len(rows)} of {len(table)})"


def _list(values: np.ndarray) -> str:
    return ", ".join(f"{v:.4g}" for v in values[:6]) + (", ..." if len(values) > 6 else "")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
