"""Train a ladder: for each size a long run, and cool-downs from its checkpoints for other lengths.

    python scripts/ladder.py --sizes=isoflop:4e11:2,isoflop:4e11:3 --fractions=0.25,0.5 \\
        --workdir=runs/ladder --out=docs/ladder.csv

Sizes are arguments of --config. A run of each fraction of the long run's steps shares all steps
with it up to its own decay, so only the decay is trained, and the result is bit for bit that of a
run of its own (lm/training/fork.py): with a decay of a fifth, fractions of a quarter, 0.4 and 0.63
cost 0.26 of a long run and not 1.28. The schedule must be wsd.

Flags --config.KEY=VALUE go to all runs. The same command, run again, goes on where it was; sizes
may be trained by different machines. --out gets a row for each finished run below --workdir;
lm/scaling fits it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm import cli
from lm.config import command_line
from lm.scaling.sweep.space import folder_name


def main() -> int:
    import jax

    from lm.config import conversion
    from lm.scaling import run_table
    from lm.training.loop import train

    args = parse_args()
    root = Path(args.workdir)
    runs = []
    for size in args.sizes.split(","):
        config: Any = command_line.load(f"{args.config}:{size}")
        for setting in args.settings:
            conversion.assign(config, setting)
        runs += plan(config, size, args.fractions, root)
    for name, config in runs:
        folder = root / name
        if is_finished(folder, config.train.num_steps):
            continue
        print(f"\n{name}: {config.train.num_steps} steps", flush=True)
        if code := train(config, str(folder), jax.devices()):
            return code
    folders = sorted(path.parent for path in root.glob("*/config.json"))
    table = [run_table.read(str(path)) for path in folders if is_finished(path, _length(path))]
    out = args.out or root / "ladder.csv"
    run_table.write(out, run_table.rows([result for result in table if result is not None]))
    print(f"\n{len(table)} runs in {out}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config("configs/ladder.py", "a file with get_config(size)", read=False)
    add = parser.add_argument
    add("--sizes", required=True, help="arguments of get_config, by commas: one long run each")
    add("--fractions", type=_fractions, default=(0.25, 0.5), help="lengths of the other runs")
    add("--workdir", type=cli.local_path, required=True, help="folder of the runs' folders")
    add(
        "--out", type=cli.local_path, help="the table, .csv or .jsonl (default: WORKDIR/ladder.csv)"
    )
    return parser.parse_args()


def _fractions(text: str) -> tuple[float, ...]:
    values = tuple(sorted(map(float, text.split(","))))
    if not 0 < values[0] <= values[-1] < 1:
        raise argparse.ArgumentTypeError("fractions are between 0 and 1")
    return values


def plan(config: Any, size: str, fractions: Sequence[float], root: Path) -> list[tuple[str, Any]]:
    """[(name, config)] of the long run of a size, and of its cool-downs."""
    schedule, steps = config.optimizer.schedule, config.train.num_steps
    if schedule.kind != "wsd" or steps is None:
        raise ValueError(
            f"--sizes={size}: cool-downs need config.optimizer.schedule.kind=wsd "
            f"({schedule.kind}) and config.train.num_steps ({steps})"
        )
    share = 0.2 if schedule.decay_steps is None else schedule.decay_steps / steps
    lengths = [*(round(steps * fraction) for fraction in fractions), steps]
    decays = [max(1, round(share * length)) for length in lengths]
    starts = [length - decay for length, decay in zip(lengths, decays, strict=True)]
    name = folder_name(size.replace(":", "-"))
    runs = []
    for length, decay, start in reversed(list(zip(lengths, decays, starts, strict=True))):
        mine = config.copy_and_resolve_references()
        mine.train.num_steps = length
        mine.optimizer.schedule.decay_steps = decay
        if length == steps:
            mine.checkpoint.at = tuple(starts[:-1])
        else:
            mine.init.branch_from, mine.init.step = str(root / f"{name}-{steps}"), start
        runs.append((f"{name}-{length}", mine))
    return runs


def is_finished(folder: Path, num_steps: int | None) -> bool:
    """True if the folder has the final evaluation of a run of so many steps."""
    from lm.scaling import run_table

    if not (folder / "config.json").exists():
        return False
    result = run_table.read(str(folder))
    return result is not None and result.step == num_steps


def _length(folder: Path) -> int | None:
    from lm.config import conversion

    config = conversion.resolve(conversion.from_json((folder / "config.json").read_text()))
    return config.train.num_steps


if __name__ == "__main__":
    cli.run(main)
