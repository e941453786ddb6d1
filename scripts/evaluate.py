"""Evaluate the newest checkpoint of a run on its validation stores, or on others.

    python scripts/evaluate.py --workdir=runs/tiny-stdlib
    python scripts/evaluate.py --workdir=runs/tiny-stdlib --data=data/other/validation

Prints one JSON line for every store: loss in nats per token, perplexity, bits per byte, accuracy.
Sums are added up before the one division, so the figures don't depend on batch size or devices.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from lm import cli
from lm.telemetry import jsonl


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=cli.folder, required=True, help="folder of the run")
    parser.add_argument(
        "--data", action="append", help="token store to use instead of the run's; repeatable"
    )
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--batch-size", type=int, help="rows in a batch (default: as in training)")
    parser.add_argument(
        "--length",
        type=int,
        help="tokens in a row, which nothing before it is known of (default: as in training)",
    )
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="put no bos before documents, whose first tokens are then not scored: for weights "
        "trained so (GPT-2, Qwen); there are no bits per byte",
    )
    args = parser.parse_args()

    changes, flags = {}, {}
    if args.data:
        changes["data.validation"] = tuple(args.data)
        flags["config.data.validation"] = "--data"
    if args.length is not None:
        changes["data.length"] = args.length
        flags["config.data.length"] = "--length"
    if args.batch_size is not None:
        changes |= {"data.batch_size": args.batch_size, "data.batch_size_per_device": None}
        flags["config.data.batch_size"] = "--batch-size"
    with cli.named_by_flags(flags):
        _evaluate(args, changes)
    return 0


def _evaluate(args: argparse.Namespace, changes: Mapping[str, Any]) -> None:
    """Print the figures of every store, with the run's config changed so."""
    import jax

    from lm.config import conversion
    from lm.telemetry.progress import Progress
    from lm.training.evaluation import evaluate
    from lm.training.restore import restore_params
    from lm.training.stored_run import load

    experiment = load(args.workdir, jax.devices(), changes)
    if not experiment.config.data.validation:
        raise ValueError(
            f"config.data.validation of {args.workdir} is empty: there is nothing to evaluate on; "
            "name a token store with --data"
        )
    if args.no_bos:
        name = conversion.names(experiment.config_dict)["objective"]
        if name != "causal":
            raise ValueError(f"--no-bos is for config.objective.name=causal, this run's is {name}")
        experiment = experiment.variant({"objective.begins_with_bos": False})
    step, params = restore_params(experiment, args.workdir, args.step)
    progress = Progress()
    for source, values in evaluate(experiment, params, report=progress.show).items():
        progress.clear()
        print(jsonl.dumps({"step": step, "source": source, **values}, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
