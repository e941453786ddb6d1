"""List, verify, compare and show the checkpoints of a run, without its model.

    python scripts/checkpoint.py ls runs/tiny
    python scripts/checkpoint.py verify runs/tiny --step=2000
    python scripts/checkpoint.py diff runs/a@2000 runs/b
    python scripts/checkpoint.py show runs/tiny

`verify` reads all files back; it ends with code 44 if one is bad. `diff` ends with 0 where all bits
are equal and with 1 where not; `relative` is the norm of the difference over that of A. A run's
folder stands for its newest checkpoint, FOLDER@STEP for another one.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Iterator
from typing import Any

from lm import cli


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", help="one line for each checkpoint")
    ls.add_argument("workdir", type=cli.folder, help="folder of the run")
    verify = commands.add_parser("verify", help="read all files back and compare checksums")
    verify.add_argument("workdir", type=cli.folder, help="folder of the run")
    verify.add_argument("--step", type=int, help="checkpoint to verify (default: all)")
    diff = commands.add_parser("diff", help="compare two checkpoints, leaf by leaf")
    diff.add_argument("a", metavar="A[@STEP]")
    diff.add_argument("b", metavar="B[@STEP]")
    show = commands.add_parser("show", help="what a checkpoint says of itself, and its parameters")
    show.add_argument("checkpoint", metavar="WORKDIR[@STEP]")
    args = parser.parse_args()
    if args.command == "ls":
        return _ls(args.workdir)
    if args.command == "verify":
        return _verify(args.workdir, args.step)
    if args.command == "diff":
        return _diff(args.a, args.b)
    return _show(args.checkpoint)


def _folders(workdir: str, step: int | None = None) -> list[Any]:
    """The folders of all checkpoints of a run, ascending, or of the one at `step`.

    Raises:
        FileNotFoundError: there is none.
    """
    from lm.checkpoint import step_files
    from lm.storage.epaths import StoragePath

    directory = StoragePath(workdir).resolve() / "checkpoints"
    steps = step_files.steps(directory)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}; train first")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; there are {steps}")
    return [directory / str(s) for s in (steps if step is None else [step])]


def _find(text: str) -> Any:
    """The folder that WORKDIR[@STEP] means."""
    workdir, at, step = text.rpartition("@")
    if at and step.isdigit():
        return _folders(workdir, int(step))[0]
    return _folders(text)[-1]


def _ls(workdir: str) -> int:
    from lm.checkpoint import step_files
    from lm.checkpoint.manifest import Damaged
    from lm.storage import files
    from lm.telemetry import progress

    folders = _folders(workdir)
    rows = [("step", "saved", "size", "verified", "tokens", "parent")]
    for folder in folders:
        verified = "yes" if step_files.is_verified(folder) else "no"
        try:
            manifest = step_files.read_manifest(folder)
        except Damaged as error:
            rows.append((folder.name, "?", _size(files.total_size(folder)), "BAD", "?", str(error)))
            continue
        tokens, parent = manifest.ledger.get("filled"), manifest.parent
        rows.append(
            (
                folder.name,
                _time(manifest.time),
                _size(files.total_size(folder)),
                verified,
                "-" if tokens is None else progress.format_quantity(tokens),
                "-" if parent is None else f"{parent['workdir']}@{parent['step']}",
            )
        )
    _print_table(rows)
    bad = folders[0].parent.parent / "bad_checkpoints"
    if bad.exists():
        names = ", ".join(sorted(path.name for path in bad.iterdir()))
        print(f"set aside in {bad}: {names}")
    return 0


def _verify(workdir: str, step: int | None) -> int:
    from lm.checkpoint import step_files, verification
    from lm.checkpoint.manifest import Damaged
    from lm.exit_codes import Exit

    code = 0
    for folder in _folders(workdir, step):
        start = time.monotonic()
        try:
            manifest = step_files.read_manifest(folder)
            num_bytes = verification.verify(folder, manifest)
        except Damaged as fault:
            code = int(Exit.CORRUPT)
            print(f"step {folder.name}: BAD: {fault}")
            continue
        size, seconds = _size(num_bytes), time.monotonic() - start
        leaves = len(manifest.leaves)
        print(f"step {folder.name}: good; {leaves} leaves, {size} read in {seconds:.1f} s")
    return code


def _diff(a: str, b: str) -> int:
    from lm.checkpoint import comparison, step_files

    folders = [_find(a), _find(b)]
    left, right = (step_files.read_manifest(folder).leaves for folder in folders)
    same_kind = {n: x for n, x in left.items() if n in right and str(right[n]) == str(x)}
    unequal = {name: leaf for name, leaf in same_kind.items() if right[name] != leaf}
    found = comparison.distances(folders, unequal)
    rows = [("leaf", "bits", "largest", "relative")]
    for name in [*left, *(n for n in right if n not in left)]:
        if name in found:
            rows.append(
                (name, "differ", f"{found[name].largest:.3g}", f"{found[name].relative:.3g}")
            )
        elif name in same_kind:
            rows.append((name, "equal", "", ""))
        elif name in left and name in right:
            rows.append((name, f"{left[name]} / {right[name]}", "", ""))
        else:
            rows.append((name, f"only in {'A' if name in left else 'B'}", "", ""))
    _print_table(rows)
    equal = len(same_kind) - len(unequal)
    others = len(rows) - 1 - equal
    print(f"A {folders[0]}\nB {folders[1]}\n{equal} leaves are equal, {others} are not")
    return int(others > 0)


def _show(checkpoint: str) -> int:
    from lm.checkpoint import comparison, step_files
    from lm.storage import files
    from lm.telemetry import progress

    folder = _find(checkpoint)
    manifest = step_files.read_manifest(folder)
    rows = [
        ("folder", str(folder)),
        ("step", str(manifest.step)),
        ("saved", _time(manifest.time)),
        ("size", _size(files.total_size(folder))),
        ("verified", "yes" if step_files.is_verified(folder) else "no"),
    ]
    for section in ("ledger", "code", "parent", "config"):
        rows += _flat(section, getattr(manifest, section))
    _print_table(rows)
    print()
    params = {n: x for n, x in manifest.leaves.items() if n.startswith("params.")}
    table = [("parameter", "shape", "dtype", "norm")]
    for name, distance in comparison.distances([folder], params).items():
        shape, dtype = str(list(params[name].shape)), params[name].dtype
        table.append((name.removeprefix("params."), shape, dtype, f"{distance.norm_of_a:.6g}"))
    _print_table(table)
    count = sum(math.prod(leaf.shape) for leaf in params.values())
    others = len(manifest.leaves) - len(params)
    print(f"{progress.format_quantity(count)} parameters; {others} leaves of the optimizer's state")
    return 0


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """(dotted path, text) of everything in a nested dict."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}", inner)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(f"{x:<{width}}" for x, width in zip(row, widths, strict=True))
        print(line.rstrip())


def _time(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


if __name__ == "__main__":
    cli.run(main)
