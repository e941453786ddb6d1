"""A quick probe of grammar: BLiMP's minimal pairs (github.com/alexwarstadt/blimp).

    python scripts/blimp.py --workdir=runs/gpt2 --data=BLiMP.zip
    python scripts/blimp.py --workdir=runs/gpt2 --data=BLiMP.zip --limit=100 --json=blimp.json \\
        --published=models_summary.jsonl

Prints how often the acceptable sentence of a pair is the more probable one, in percent: for each of
12 phenomena, and overall, the mean over paradigms; 50 is chance. --published adds columns from the
authors' file of results.
"""

from __future__ import annotations

import dataclasses
import sys
import time

from lm import cli
from lm.storage.files import write_atomically
from lm.telemetry import jsonl


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workdir", type=cli.folder, required=True, help="folder of the run")
    add("--data", required=True, help="BLiMP.zip, or a folder with its .jsonl files")
    add("--step", type=int, help="checkpoint to use (default: the newest)")
    add("--limit", type=int, help="pairs of each paradigm (default: all 1,000)")
    add("--published", metavar="FILE", help="models_summary.jsonl")
    add(
        "--json",
        type=cli.file,
        metavar="FILE",
        help="where to write the accuracies, of paradigms too",
    )
    args = parser.parse_args()

    import jax

    from lm.evaluation import blimp
    from lm.generation.score import Scorer
    from lm.telemetry.progress import Progress
    from lm.training.restore import restore_params
    from lm.training.stored_run import load

    pairs = blimp.read(args.data, limit=args.limit)
    published = blimp.read_published(args.published) if args.published else {}
    experiment = load(args.workdir, jax.devices())
    step, params = restore_params(experiment, args.workdir, args.step)
    scorer = Scorer(experiment.model, params, experiment.tokenizer)
    progress, start = Progress(), time.perf_counter()
    accuracy = blimp.evaluate(
        scorer, pairs, report=lambda done, count: progress.show(f"BLiMP · sentence {done}/{count}")
    )
    progress.clear()
    seconds = time.perf_counter() - start
    print(f"step {step}: {accuracy.pairs} pairs in {seconds:.0f} s", file=sys.stderr)
    print(blimp.table(accuracy, published))
    if args.json:
        text = jsonl.dumps({"step": step, **dataclasses.asdict(accuracy)}, indent=2)
        write_atomically(args.json, text + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
