"""Check this machine's GPU and measure it in minutes, part by part; small on a CPU.

    python scripts/gpu_check.py --plans=docs/gpu_plans.json       # on a GPU, at most 8 minutes
    python scripts/gpu_check.py --parts=kernels,train-124m        # some parts, by their beginnings
    python scripts/gpu_check.py --small                           # all parts, tiny: as on a CPU
    python scripts/gpu_check.py --make-plans=docs/gpu_plans.json  # with a GPU's compiler alone

Every part is a process with a time box, at whose end it is killed. Each of its rows is written at
once, as a line of JSON to --out and of a table to stdout; a summary with the goals follows. Parts,
the most valuable first:

    machine       device, versions, usable memory beside the plans'
    kernels       attention by kernel against float64, with gradients, and its time
    experts       grouped products of experts against a loop over groups, and their time
    matmul        matrix products, HBM
    train-*       step time, MFU against matrix products of the same process, memory, and the plan's
    resume        bits of a run that was killed and resumed, with and without deterministic kernels
    moe-*         the step of a mixture of experts
    checkpoint    save and restore, with host memory
    precision-*   the step in int8 and fp8
    flags         flags of lm/parallel/compiler_flags.py, on and off in turn
    memory        XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 and 0.92 in turn

--plans names what --make-plans wrote on a machine with the GPU's compiler. Exit code 0 where all
parts ended well and all goals that were measured are met.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lm import cli
from scripts.gpu import rows, shapes

SMALL_BOX = 120.0
# for small shapes on a CPU, whose times say nothing: most of its time is LLVM's otherwise
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    seconds: float  # its time box
    is_small: bool = True  # also with --small


PARTS = (
    Part("machine", 45),
    Part("kernels", 90),
    Part("experts", 40),
    Part("matmul", 30),
    Part("train-124m-1024", 60),
    Part("train-1.3b-2048", 70),
    Part("resume", 150),
    Part("moe-olmoe", 60),
    Part("train-350m-1024", 50, is_small=False),
    Part("checkpoint", 50),
    Part("train-1.3b-8192", 60, is_small=False),
    Part("train-124m-8192", 50, is_small=False),
    Part("precision-int8", 60, is_small=False),
    Part("precision-fp8", 60),
    Part("flags", 75),
    Part("train-350m-2048", 50, is_small=False),
    Part("train-350m-8192", 50, is_small=False),
    Part("train-124m-2048", 50, is_small=False),
    Part("train-1.3b-1024", 60, is_small=False),
    Part("memory", 90),
)


def main() -> int:
    args = parse_args()
    if args.make_plans:
        names = [p.name.partition("-")[2] for p in args.parts]
        names = [name for name in shapes.SHAPES if name in names]
        shapes.make_plans(args.make_plans, args.topology, names, args.small)
        return 0
    if args.part:
        plans = shapes.read_plans(args.plans)
        measure(args.part, rows.Check(rows.Writer(args.out, args.part), args.small, plans))
        return 0
    return run_all(args)


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    out = Path(os.environ.get("OUT") or ".") / "gpu_check.jsonl"
    add("--out", type=Path, default=out, help="appended to; default: gpu_check.jsonl in $OUT or .")
    add("--parts", type=cli.list_of(str), help="names or their beginnings; default: all")
    add("--budget", type=float, default=480, help="seconds of all parts together; default: 480")
    add("--small", action="store_true", help="tiny shapes, as always on a CPU")
    add("--plans", type=Path, metavar="FILE", help="plans to compare with")
    add("--make-plans", type=Path, metavar="FILE", help="compile for --topology, write the plans")
    add("--topology", default="h200:1", help="--make-plans: default h200:1")
    add("--part", help=argparse.SUPPRESS)  # of the process that measures it
    args = parser.parse_args()
    wanted = args.parts or [""]
    if args.plans is not None and not args.plans.exists():
        parser.error(f"--plans={args.plans}: no such file")
    for name in wanted:
        if not any(part.name.startswith(name) for part in PARTS):
            parser.error(f"--parts: no {name}; there are: {', '.join(p.name for p in PARTS)}")
    args.parts = [p for p in PARTS if any(p.name.startswith(name) for name in wanted)]
    return args


def run_all(args: argparse.Namespace) -> int:
    """Run the parts in their order, each in its box, and print the summary."""
    began = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    start = args.out.stat().st_size if args.out.exists() else 0
    machine, *others = PARTS
    todo = [machine, *(part for part in args.parts if part in others)]
    while todo:
        part = todo.pop(0)
        left = args.budget - (time.monotonic() - began)
        box = min(SMALL_BOX if args.small else part.seconds, left)
        if left < 5:
            status = f"not started: --budget={args.budget:g} is used up"
        else:
            status = run_boxed(command(args, part), box)
        if status:
            rows.Writer(args.out, part.name).add("", {}, failed=status)
        if part is machine:
            found = [row["figures"] for row in rows.read(args.out, start)]
            args.small |= any(figures.get("platform") == "cpu" for figures in found)
            todo = [p for p in todo if p.is_small or not args.small]
            if any(figures.get("platform") == "cpu" for figures in found):
                os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}"
    text, is_good = rows.summary(rows.read(args.out, start))
    print(f"\n{text}\n{args.out}, {time.monotonic() - began:.0f} s")
    return 0 if is_good else 1


def measure(part: str, check: rows.Check) -> None:
    """Measure a part in this process."""
    from scripts.gpu import kernels, resume, steps

    kind, _, name = part.partition("-")
    if kind in ("train", "moe"):
        steps.step(check, name)
    elif kind == "precision":
        steps.precision(check, name)
    else:
        {
            "machine": kernels.machine,
            "kernels": kernels.kernels,
            "experts": kernels.experts,
            "matmul": kernels.matmul,
            "resume": resume.resume,
            "checkpoint": steps.checkpoint,
            "flags": steps.flags,
            "memory": steps.memory_fraction,
        }[kind](check)


def command(args: argparse.Namespace, part: Part) -> list[str]:
    """The process that measures a part."""
    words = [sys.executable, str(Path(__file__).resolve()), f"--part={part.name}"]
    words += [f"--out={args.out}"] + ["--small"] * args.small
    return words + ([f"--plans={args.plans}"] if args.plans else [])


def run_boxed(words: list[str], seconds: float) -> str:
    """Run a process for so long at most, then kill it and those it started.

    Returns "" where it ended well, else how it ended.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, stderr=errors, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            status = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            status = f"killed at the end of its {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    return f"{status}: {lines[-1]}" if status and lines else status


if __name__ == "__main__":
    cli.run(main)
