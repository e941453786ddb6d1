"""Plan a run with the real compiler for absent devices: memory, traffic, time, mesh search.

    python scripts/plan.py --config=configs/llama3.py:70b --topology=v5p:8x8x8
    python scripts/plan.py --config=configs/gpt2.py:124m --topology=v5e:4x4 --json=plan.json \\
        --picture=plan.png --config.model.remat=full

Compiles the actual train step (with --decode the decode step) from shapes, so neither data nor
chips are needed. Reports memory by purpose, collectives by mesh axis, bounds of the step's time
with its bottleneck, warnings, and the cost of a checkpoint. TPU topologies need libtpu, GPU
topologies jax[cuda13]; see lm/compiled/topology.py for their names. Plans are kept in
~/.cache/lm/plan.

--search looks for the fastest mesh, remat policy and number of micro-batches, --largest-batch for
the most rows that fit, --fewest-chips for the smallest slice of this kind of chip, whatever shape
was given; the last two also with --decode. Each compiles a few plans and shows all of them.

The exit code is 0 where the step fits and 1 where it doesn't.
"""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

from lm import cli
from lm.storage.files import write_atomically
from lm.storage.paths import expand_path

RATE = "GB a second that a host moves to and from the storage of checkpoints (default: 1)"


def main() -> int:
    args = parse_args()
    from lm.planning import plan as plans
    from lm.planning import report
    from lm.telemetry import progress

    decode = plans.Decode(args.decode_batch, args.decode_length) if args.decode else None
    # a stream of its own: what the compiler writes to the other one is kept for the plan
    show = progress.Progress(os.fdopen(os.dup(2), "w"), pause=30)

    def make(config: Any, topology: str, decode: plans.Decode | None) -> plans.Plan:
        return plans.make(
            config,
            topology,
            config_name=args.config_name,
            decode=decode,
            show=show,
            folder=None if args.fresh else plans.cache_folder(),
        )

    plan = _find(args, make, decode, show)
    if plan is None:
        return 1
    print(report.page(plan), end="")
    if plan.save:
        print("\n" + report.checkpoint(plan.save, args.storage_gbs))
    if args.tokens:
        print("\n" + report.days(plan, args.tokens))
    if args.json:
        write_atomically(expand_path(args.json, "--json"), plan.to_json())
    if args.picture:
        from lm.planning import picture

        picture.save_picture(plan, args.picture)
        print(f"\npicture: {args.picture}")
    return 0 if plan.fits else 1


def parse_args() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config()
    add, yes = parser.add_argument, "store_true"
    topologies = "v5p:4x4x4, 2xv5e:16x16, h100:64, h100:8x4, cpu:8"
    add("--topology", required=True, metavar="NAME", help=f"devices: {topologies}")
    add("--decode", action=yes, help="plan a step of generation instead of training")
    add("--decode-batch", type=int, default=8, help="--decode: rows")
    add("--decode-length", type=int, default=2048, help="--decode: slots of the cache")
    add("--json", metavar="FILE", help="also write the plan to this file")
    add("--picture", metavar="FILE", help="also draw the plan to this PNG file")
    add("--fresh", action=yes, help="compile again, whatever is in the cache")
    add("--tokens", type=_number, help="also say how many days so many tokens take: 15T")
    add("--storage-gbs", type=_rate, default=1.0, metavar="GB/S", help=RATE)
    add("--search-compiles", type=int, default=4, help="--search: candidates to compile")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--search", action=yes, help="find the fastest mesh, remat and micro-batch")
    one("--largest-batch", action=yes, help="find the most rows of a device that fit")
    one("--fewest-chips", action=yes, help="find the smallest slice that fits")
    args = parser.parse_args()
    if args.search and args.decode:
        parser.error("--search ranks training steps only, not --decode")
    return args


def _find(args: argparse.Namespace, make: Any, decode: Any, show: Any) -> Any:
    """The plan that was asked for, by search or by its config; None where nothing fits."""
    from lm.planning import report, search, sizing

    target = args.config, args.topology, make
    if args.search:
        found = search.search(*target, num_compiled=args.search_compiles, show=show)
    elif args.largest_batch or args.fewest_chips:
        look = sizing.largest_batch if args.largest_batch else sizing.fewest_chips
        found = look(*target, decode=decode)
    else:
        return make(args.config, args.topology, decode)
    print(report.trials_page(found))
    return found.winner.plan if found.winner else None


def _rate(text: str) -> float:
    rate = _number(text)
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text} GB/s is no speed")
    return rate


def _number(text: str) -> float:
    """15T, 300B, 2.5e9."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    try:
        if text[-1:].upper() in scale:
            return float(text[:-1]) * scale[text[-1].upper()]
        return float(text)
    except ValueError:
        message = f"{text} is no number such as 15T, 300B or 2.5e9"
        raise argparse.ArgumentTypeError(message) from None


if __name__ == "__main__":
    cli.run(main)
