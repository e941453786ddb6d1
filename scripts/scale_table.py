"""Compile shipped configs for the machines they are meant for; the table goes to docs/scale.md.

    python scripts/scale_table.py                  # every row: about two minutes of compiling each
    python scripts/scale_table.py --only=llama3    # rows whose config or topology contains this

Rows that are not made, or that this machine has no compiler for, stay as they are. Plans are cached
(see scripts/plan.py), so a second run is immediate, and a run that was cut short goes on.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from lm import cli
from lm.config import command_line

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Row:
    config: str  # FILE:ARG of configs/
    topology: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def _batch(rows: int) -> dict[str, Any]:
    return {"data.batch_size": None, "data.batch_size_per_device": rows}


FULL = {"model.remat": "full"}
ROWS = (
    Row("gpt2:124m", "v5e:4x4", _batch(16)),
    Row("gpt2:1.5b", "v5e:16x16", {"mesh.data": 4, "mesh.fsdp": 64, **FULL, **_batch(4)}),
    Row(
        "gpt3:175b",
        "v5p:8x8x16",
        {"mesh.data": 4, "mesh.fsdp": 32, "model.vocab_size": 50304, **FULL, **_batch(2)},
    ),
    Row("llama2:7b", "v5p:4x4x4", {"mesh.data": 1, "mesh.fsdp": 64, **FULL, **_batch(2)}),
    Row("llama3:8b", "v5p:4x4x4", {"mesh.data": 2, "mesh.fsdp": 32, **FULL, **_batch(2)}),
    Row("llama3:8b", "v6e:16x16", {"mesh.data": 1, "mesh.fsdp": -1, **FULL, **_batch(1)}),
    Row("llama3:8b", "tpu7x:4x4x4", {"mesh.data": 4, "mesh.fsdp": 32, **FULL, **_batch(2)}),
    Row(
        "llama3:8b",
        "2xv5e:16x16",
        {"mesh.data": 2, "mesh.slices": 2, "mesh.fsdp": 256, **FULL, **_batch(1)},
    ),
    Row("llama3:8b", "h100:8x8", {"mesh.data": 1, "mesh.fsdp": -1, **FULL, **_batch(1)}),
    Row("llama3:70b", "v5p:8x8x8", {"mesh.data": 16, "mesh.fsdp": 32, **FULL, **_batch(2)}),
    Row(
        "llama3:405b",
        "v5p:8x16x16",
        {"mesh.data": 8, "mesh.fsdp": 32, "mesh.tensor": 8, **FULL, "data.batch_size": 512},
    ),
    Row("qwen3:32b", "v6e:16x16", {"mesh.data": 1, "mesh.fsdp": -1, **FULL, **_batch(1)}),
    Row(
        "mixtral:8x7b",
        "v5p:4x4x4",
        {"mesh.data": 1, "mesh.fsdp": 8, "mesh.expert": 8, "data.length": 4096, **_batch(2)},
    ),
    Row("bert:large", "v5e:4x4", {"data.batch_size": 512}),
    Row("t5:11b", "v5p:4x4x4", {"mesh.data": 2, "mesh.fsdp": 32, "data.batch_size": 1024}),
)
HEAD = """# Shipped configs, compiled for the machines they are meant for

Made by `python scripts/scale_table.py` with the compilers of jax {jax} and libtpu {libtpu}. Memory
is that of one device: arguments, the heap that the compiler assigned with its gaps, and code. Step
time and MFU are bounds: an operation of the compiled schedule hides all of its HBM traffic behind
its products, or none. They come from published peaks and the compiler's own program, and know
nothing of clocks, stragglers and kernels below peak. Compile times are of two cores that others
kept busy, which also lengthens the seconds of processor time (CPU) where they are given.

| config | topology | mesh | rows × length | HBM used, of | step | MFU | binds | compiled in |
|---|---|---|---|---|---|---|---|---|
"""


def line(row: Row, plan: Any) -> str:
    """One row of the table."""
    gib = 2**30
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    capacity = f"{plan.capacity / gib:.0f} GiB" if plan.capacity else "?"
    most, least = plan.mfu(plan.times.upper_bound_s), plan.mfu(plan.times.lower_bound_s)
    mfu = "" if most is None or least is None else f"{most:.0%} to {least:.0%}"
    verdict = f"{plan.memory.total / gib:.1f}, {capacity}" + ("" if plan.fits else " **too much**")
    cells = (
        row.config,
        row.topology,
        mesh,
        f"{plan.rows} × {plan.length}",
        verdict,
        f"{plan.times.lower_bound_s:.2f} to {plan.times.upper_bound_s:.2f} s" if plan.fits else "",
        mfu if plan.fits else "",
        plan.times.bottleneck if plan.fits else "",
        f"{plan.compile_seconds:.0f} s ({plan.compile_cpu_seconds:.0f} CPU)",
    )
    return "| " + " | ".join(cells) + " |"


def _make(row: Row) -> Any:
    from lm.planning import plan

    file, *arg = row.config.split(":")
    config: Any = command_line.load(":".join([str(ROOT / "configs" / f"{file}.py"), *arg]))
    config.update_from_flattened_dict(dict(row.changes))
    name, folder = f"configs/{row.config}", plan.cache_folder()
    return plan.make(config, row.topology, config_name=name, folder=folder)


def _key(line: str) -> str:
    """Key of a row of the table: its config and topology."""
    return "|".join(cell.strip() for cell in line.split("|")[1:3])


def _write(path: Path, head: str, made: list[str]) -> None:
    """Put the rows that were made in place of those there were, and leave the others, and what
    people wrote below the table.
    """
    text = path.read_text() if path.exists() else head
    start = text.index("\n|---") + 1
    end = text.index("\n\n", start) if "\n\n" in text[start:] else len(text)
    rows = {_key(line): line for line in (*text[start:end].splitlines()[1:], *made)}
    order = [f"{row.config}|{row.topology}" for row in ROWS]
    table = "\n".join(rows[key] for key in order if key in rows)
    path.write_text(head + table + (text[end:] or "\n"))


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose config or topology contains this")
    parser.add_argument("--out", default=str(ROOT / "docs/scale.md"), help="file of the table")
    args = parser.parse_args()

    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    failed = 0
    chosen = [row for row in ROWS if args.only in f"{row.config} {row.topology}"]
    for number, row in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {row.config} on {row.topology} ...", flush=True)
        began = time.perf_counter()
        try:
            plan = _make(row)
        except ValueError as error:  # no compiler for it here, or sizes that don't fit
            failed += 1
            print(f"  {error}", file=sys.stderr)
            continue
        print(f"  {line(row, plan)}  ({time.perf_counter() - began:.0f} s)", flush=True)
        failed += not plan.fits
        _write(Path(args.out), HEAD.format(**versions), [line(row, plan)])
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
