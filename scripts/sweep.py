"""Train many runs of a config: a grid, random points, or a search that learns from its runs.

    python scripts/sweep.py --config=configs/smoke.py --workdir=runs/rates --slots=2 \\
        --grid=optimizer.learning_rate=1e-3,3e-3,1e-2 --seeds=3
    python scripts/sweep.py --config=configs/tiny.py --workdir=runs/search --adaptive=30 \\
        --range=optimizer.learning_rate=1e-4..1e-1:log --range=model.num_layers=2..6 \\
        --config.train.eval_every=100
    python scripts/sweep.py --config=configs/tiny.py --workdir=runs/widths --write=slurm \\
        --grid=config=configs/ladder.py:2,configs/ladder.py:3

Any key of the config can be an axis; the key `config` is the config's file. Flags
--config.KEY=VALUE go to all runs. With --seeds or --folds every point is done several times;
`{fold}` in a flag becomes the number of the fold (`scripts/prepare_data.py --folds=5` makes stores
for five).

Every run has a folder below --workdir, with a log. The same command, run again after whatever
happened, does what is left: finished runs are kept, interrupted ones go on. Failed and diverged
runs are recorded as such, and the sweep goes on without them. It ends with sweep.csv and
sweep.jsonl, a ranking and sweep.png. Its exit code is 1 if runs failed; a diverged one is a result.

--write=slurm, tpu_vm or gke writes the commands for a cluster instead of running them; later the
same command with --collect in place of --write starts nothing and ends with the table of what has
finished. Machines of Cloud TPUs and pods of GKE are deleted after a run: their runs are kept in a
bucket, --runs=gs://BUCKET/FOLDER.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm import cli

if TYPE_CHECKING:
    from lm.scaling.sweep.adaptive import Search


def main() -> int:
    from lm.reliability.stop_signals import STOPS
    from lm.scaling.sweep import cluster, pool, space
    from lm.scaling.sweep.pool import Outcome, Trial

    args = parse_args()
    settings = [f"--config.{setting}" for setting in args.settings]
    root, home = Path(args.workdir), args.runs or args.workdir
    grid = [space.parse(text) for text in args.grid]
    ranges = [space.parse(text) for text in args.range]
    if bool(ranges) != bool(args.random or args.adaptive) or (args.random and args.adaptive):
        raise ValueError("--range needs one of --random=COUNT and --adaptive=COUNT, and they it")
    if args.adaptive and (grid or args.seeds > 1 or args.folds > 1 or args.write or args.collect):
        raise ValueError(
            "--adaptive chooses its runs one by one: give all axes as --range, and repeat the best "
            "with --grid and --seeds or --folds; it writes no commands for a cluster"
        )
    if args.folds > 1 and not any("{fold}" in setting for setting in settings):
        raise ValueError("--folds needs {fold} in a flag, such as --config.data.train")
    if not (grid or ranges) and args.seeds * args.folds == 1:
        raise ValueError(
            "a sweep needs an axis: --grid=optimizer.learning_rate=1e-3,3e-3, a --range, --seeds "
            "or --folds; for a single run there is scripts/train.py"
        )
    if args.runs and not (args.write or args.collect):
        raise ValueError(f"--runs={args.runs} needs --write or --collect: here runs are in WORKDIR")
    space.check_config(args.config, [*grid, *ranges], settings)
    _claim(root, args, settings)

    search: Search | None = None
    if args.adaptive:
        from lm.scaling.sweep.adaptive import Search

        seed = args.search_seed
        search = Search(root, ranges, args.adaptive, seed, args.config, settings)
        runs, source = [], search.runs()
    else:
        points = space.grid(grid)
        if args.random:
            found = space.random_points(ranges, args.random, args.search_seed)
            points = [point | more for point in points for more in found]
        points = space.with_seeds_and_folds(points, args.seeds, args.folds)
        runs = [Trial(space.name(p), p, space.arguments(args.config, p, settings)) for p in points]
        source = iter(runs)
    if args.write:
        write = getattr(cluster, f"write_{args.write}")
        print(f"{len(runs)} runs in {write(root, runs, args.slots, home)}")
        return 0
    if args.collect:
        return 1 if _finish(root, runs, home) else 0

    done: list[Trial] = []

    def ended(run: Trial, outcome: Outcome) -> None:
        done.append(run)
        if search is not None:
            search.ended(run, outcome)
        total = len(runs) or args.adaptive
        print(f"[{len(done)}/{total}] {run.name}: {outcome.status} {outcome.message}", flush=True)

    def should_prune(run: Trial) -> bool:
        return search is not None and search.should_prune(run)

    stopped = pool.run_all(root, source, slots=args.slots, ended=ended, should_prune=should_prune)
    failed = _finish(root, sorted(done, key=lambda run: run.name) if search else runs, home)
    if stopped is not None:
        print(f"{stopped.name}: the same command goes on")
        return STOPS[stopped]
    return 1 if failed else 0


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config(read=False)
    add = parser.add_argument
    add(
        "--workdir",
        type=cli.folder,
        required=True,
        help="folder of the sweep; one folder below it for each run",
    )
    add("--grid", action="append", default=[], metavar="KEY=A,B", help="values of a key")
    add(
        "--range",
        action="append",
        default=[],
        metavar="KEY=LOW..HIGH[:log]",
        help="limits of a key, or KEY=A,B, for --random and --adaptive",
    )
    add("--random", type=int, metavar="N", help="N random points of the ranges, for each of a grid")
    add("--adaptive", type=int, metavar="N", help="N runs, each chosen by what is known by then")
    add("--search-seed", type=int, default=0, help="of --random and --adaptive (default: 0)")
    add("--seeds", type=int, default=1, help="runs of each point, with config.seed 0 and up")
    add("--folds", type=int, default=1, help="runs of each point, one for each fold")
    add("--slots", type=int, default=1, help="runs at a time (default: 1)")
    add("--write", choices=("slurm", "tpu_vm", "gke"), help="write commands for a cluster instead")
    add("--collect", action="store_true", help="make the table of what a cluster has done")
    add(
        "--runs",
        type=cli.folder,
        metavar="URL",
        help="folder of a cluster's runs (default: WORKDIR)",
    )
    args = parser.parse_args()
    if "://" in args.workdir:
        parser.error(f"--workdir={args.workdir}: a sweep is kept on this machine; see --runs")
    if args.write and args.collect:
        parser.error("--write comes before the runs, --collect after them")
    if min(args.seeds, args.folds, args.slots) < 1:
        parser.error("--seeds, --folds and --slots must be at least 1")
    return args


def _claim(root: Path, args: argparse.Namespace, settings: Sequence[str]) -> None:
    """Write ROOT/sweep.json, or check that the folder is that of the same sweep.

    Raises:
        ValueError: it is that of another one.
    """
    shared = ("config", "adaptive", "search_seed")
    spec: dict[str, Any] = {name: getattr(args, name) for name in shared}
    spec |= {"range": args.range if args.adaptive else [], "settings": list(settings)}
    spec["runs"] = args.runs
    path = root / "sweep.json"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(spec, indent=2) + "\n")
    found = {"runs": None, **json.loads(path.read_text())}
    lines = [f"{key}: {found[key]!r} -> {spec[key]!r}" for key in spec if found[key] != spec[key]]
    if lines:
        raise ValueError(
            f"{root} holds another sweep; use another --workdir (more values, points, seeds or "
            "folds may be added to this one):\n  " + "\n  ".join(lines)
        )


def _finish(root: Path, runs: Sequence[Any], home: str) -> bool:
    """Write the tables and the picture, and print the ranking; True if runs failed."""
    from lm.run_page import page
    from lm.scaling import run_table
    from lm.scaling.sweep import pool, report

    if not runs:
        return False
    table = report.collect(root, runs, home)
    for name in ("sweep.csv", "sweep.jsonl"):
        run_table.write(root / name, table)
    ranks = report.rank(runs, table)
    print("\n" + report.ranking(ranks) + "\n\n" + report.summary(table))
    files = "sweep.csv, sweep.jsonl"
    if any(r.losses for r in ranks):
        report.plot(ranks, root / "sweep.png")
        files += ", sweep.png"
    print(f"{files} in {root}")
    page.write_at_end(str(root))
    return any(row["status"] == pool.FAILED for row in table)


if __name__ == "__main__":
    cli.run(main)
