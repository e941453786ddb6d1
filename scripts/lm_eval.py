"""Evaluate a run with EleutherAI's lm-evaluation-harness: pip install lm_eval.

    python scripts/lm_eval.py --workdir=runs/tiny-stdlib --tasks=tasks/capitals.yaml
    python scripts/lm_eval.py --workdir=runs/gpt2 --tasks=lambada_openai,arc_easy --limit=200

A task is a YAML file, or the name of one that the harness brings; those fetch their data sets. A
file that names its data by `dataset_path: json` and `dataset_kwargs: {data_files: ...}` needs no
network. Scores are printed as a table, and with --json all of them are written, also for each
document with --samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lm import cli
from lm.storage.files import write_atomically
from lm.telemetry import jsonl


def main() -> int:
    args = parse_args()
    import jax
    import lm_eval  # noqa: F401 (before the run is read: it may not be installed)
    from lm_eval.utils import make_table

    from lm.evaluation import lm_eval_adapter
    from lm.generation.chat import DEFAULT, Chat, read
    from lm.generation.generator import Generator
    from lm.generation.score import Scorer
    from lm.training.restore import restore_params
    from lm.training.stored_run import load

    experiment = load(args.workdir, jax.devices())
    step, params = restore_params(experiment, args.workdir, args.step)
    tokenizer = experiment.tokenizer
    start = None if args.bos is None else (tokenizer.bos_id,) if args.bos else ()
    chat = None
    if args.apply_chat_template:
        beside = Path(tokenizer.name).parent
        chat = Chat(tokenizer, read(args.chat_template or str(beside)) or DEFAULT)
    parts = (experiment.model, params, tokenizer)
    ends = tokenizer.stop_ids if chat is None else (chat.end_id, *tokenizer.stop_ids)
    model = lm_eval_adapter.make_model(
        Scorer(*parts, start=start),
        Generator(*parts, start=start, stop_ids=ends),
        chat=chat,
        batch_size=args.batch_size,
    )
    results = lm_eval_adapter.evaluate(
        model, args.tasks.split(","), num_fewshot=args.num_fewshot, limit=args.limit
    )
    print(make_table(results))
    if args.json:
        kept = {"step": step, "results": results["results"], "n-samples": results["n-samples"]}
        if args.samples:
            kept["samples"] = results["samples"]
        write_atomically(args.json, jsonl.dumps(kept, indent=2, default=str) + "\n")
    return 0


def parse_args() -> Any:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workdir", type=cli.folder, required=True, help="folder of the run")
    add("--tasks", required=True, help="names or YAML files, with commas between them")
    add("--step", type=int, help="checkpoint to use (default: the newest)")
    add("--limit", type=int, help="documents of each task (default: all)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each document")
    add("--batch-size", type=int, default=16, help="texts that are generated together")
    add(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin every text with bos, or not (default: as the files of an import say, else with "
        "bos, as in training here)",
    )
    add("--apply-chat-template", action="store_true", help="ask in a dialogue")
    add("--chat-template", metavar="FILE", help="as in scripts/generate.py")
    add("--json", type=cli.file, metavar="FILE", help="where to write the scores")
    add("--samples", action="store_true", help="--json: every document too")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
