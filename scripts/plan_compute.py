"""Plan a budget: parameters, tokens, learning rate, batch, loss, days and cost.

    python scripts/plan_compute.py --fit=scaling.json --flops=1e21
    python scripts/plan_compute.py --fit=scaling.json --days=3 --plan=plan.json
    python scripts/plan_compute.py --fit=scaling.json --flops=1e21 --topology=v5p:4x4x4 \\
        --mfu=0.45 --price-per-chip-hour=2

scripts/fit_scaling_law.py makes the fit, `scripts/plan.py --json` the plan, whose MFU is an
interval: the budget of --days is what the lower end gives for sure. With --flops and a machine it
says how many days these take.

A plan for more than --max-extrapolation times the FLOPs of the largest run in the table is refused;
give a larger factor to make it all the same. The distance is always printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lm import cli
from lm.scaling.planner import MAX_EXTRAPOLATION, Machine
from lm.scaling.table import FLOPS_PER_PARAMETER_TOKEN
from lm.storage.files import write_atomically


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--fit", required=True, metavar="JSON", help="the artefact of fit_scaling_law.py")
    add("--flops", type=float, help="the budget, such as 1e21")
    add("--days", type=float, help="the budget, as days on a machine")
    add("--plan", metavar="JSON", help="the machine and its MFU: what plan.py --json wrote")
    add("--topology", help="the machine by name, such as v5p:4x4x4, with --mfu")
    add("--mfu", type=float, help="model FLOPs as a part of the machine's peak, 0 to 1")
    add("--price-per-chip-hour", type=float, help="in any currency")
    add("--unique-tokens", type=float, help="there are no more distinct tokens than these")
    add(
        "--flops-per-parameter-token",
        type=float,
        default=FLOPS_PER_PARAMETER_TOKEN,
        help="of the model to be trained (default: %(default)s)",
    )
    add(
        "--max-extrapolation",
        type=float,
        default=MAX_EXTRAPOLATION,
        help="times the FLOPs of the largest run in the table (default: %(default)g)",
    )
    add("--json", type=cli.file, metavar="FILE", help="also write the plan to this file")
    args = parser.parse_args()

    from lm.scaling import artefact, planner, report

    machine = _machine(args)
    if (args.flops is None) == (args.days is None):
        raise ValueError("give one budget: --flops, or --days with --plan or --topology")
    if args.days is not None and machine is None:
        raise ValueError("--days needs a machine: --plan=PLAN.json, or --topology with --mfu")
    if args.price_per_chip_hour is not None and machine is None:
        raise ValueError("--price-per-chip-hour needs a machine: --plan, or --topology with --mfu")
    result = artefact.from_json(Path(args.fit).read_text(), args.fit)
    flops = args.flops
    if machine is not None and args.days is not None:
        flops = machine.flops(args.days)
    plan = planner.plan(
        result,
        flops,
        unique_tokens=args.unique_tokens,
        factor=args.flops_per_parameter_token,
        max_extrapolation=args.max_extrapolation,
    )
    print(report.plan_page(plan, result, machine=machine, price=args.price_per_chip_hour), end="")
    if args.json:
        write_atomically(args.json, artefact.to_json(plan, indent=2))
    return 0


def _machine(args: argparse.Namespace) -> Machine | None:
    """The machine of --plan, or of --topology and --mfu; None if neither is given."""
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu={args.mfu:g}: model FLOPs as a part of the peak, between 0 and 1")
    if args.plan is not None and args.topology is not None:
        raise ValueError("--plan names its topology: give --plan or --topology, not both")
    from lm.compiled import topology

    if args.plan is not None:
        tree = json.loads(Path(args.plan).read_text())
        low, high = tree["derived"]["mfu"] if args.mfu is None else (args.mfu, args.mfu)
        peak = tree["peak_flops"]
        if peak is None or low is None or high is None:
            raise ValueError(
                f"{args.plan} has no MFU: {tree['topology']} has no published peak for its type"
                f"{topology.parse(tree['topology']).chip.dtype_with_peak()}"
            )
        return Machine(tree["num_chips"], peak * tree["num_devices"], (low, high))
    if args.topology is None:
        return None
    if args.mfu is None:
        raise ValueError(
            f"--topology={args.topology} needs --mfu, or --plan=PLAN.json in its place"
        )
    target = topology.parse(args.topology)
    peak = target.chip.peak_flops("bfloat16")
    if peak is None:
        raise ValueError(f"--topology={args.topology}: no published peak of its FLOP/s")
    return Machine(target.num_chips, peak * target.num_devices, (args.mfu, args.mfu))


if __name__ == "__main__":
    cli.run(main)
