"""Predict the targets of a task's records with a run, and measure them beside naive baselines.

    python scripts/predict.py --workdir=runs/translation --data=data/translation/test.jsonl \\
        --train=data/translation/train.jsonl --metrics=bleu --num-beams=4
    python scripts/predict.py --workdir=runs/topics --data=data/topics/test.jsonl \\
        --train=data/topics/train.jsonl --metrics=classes
    python scripts/predict.py --workdir=runs/answering --data=data/answering/test.jsonl \\
        --train=data/answering/train.jsonl --metrics=answers --references=answers

The run's objective is seq2seq (texts are generated: greedily, or by beams) or classification (the
label whose token is the likeliest). Records are those of scripts/split_records.py, or any that
prepare_data.py reads, with --field where columns have other names than the fields of the objective.

Writes a line of JSON for each record (default: WORKDIR/predictions.jsonl), and prints a table.
Metrics, in percent: `bleu` BLEU and chrF (sacrebleu), `rouge` ROUGE (rouge-score), `answers` exact
match and F1 as SQuAD defines them, `classes` accuracy, mean recall and mean F1 of the classes
(scikit-learn). Chinese is measured by characters. Baselines see --train and the sources: copying,
the first sentence, the sentence nearest to the question, the commonest target, phrases looked up,
and the target of the nearest source by words.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from lm import cli
from lm.evaluation import task_records
from lm.preparation import corpus as corpora
from lm.sources import Document
from lm.storage.files import write_atomically
from lm.telemetry import jsonl


def main() -> int:
    args = parse_args()
    import jax

    from lm.evaluation import task_baselines, task_metrics
    from lm.evaluation.predict import GREEDY, predict, task_config
    from lm.generation.beam import BeamSearch
    from lm.telemetry.progress import Progress
    from lm.training.restore import restore_params
    from lm.training.stored_run import load

    experiment = load(args.workdir, jax.devices())
    step, params = restore_params(experiment, args.workdir, args.step)
    source, target = task_config(experiment, args.task).fields
    if not args.field:
        args.field = [source, target]
    names = [source, target, args.references or target]
    if args.references:
        args.field = [*args.field, args.references]
    records = read(args, args.data, names)[: args.limit]
    train = read(args, args.train, names[:2]) if args.train else []
    sources = [record.fields[source] for record in records]
    references = task_records.references(records, target, args.references or "")
    progress, begun = Progress(), time.perf_counter()
    search = GREEDY
    if args.num_beams:
        search = BeamSearch(args.num_beams, length_penalty=args.length_penalty)
    found = predict(
        experiment,
        params,
        sources,
        task=args.task,
        max_new_tokens=args.max_new_tokens,
        search=search,
        batch_size=args.batch_size,
        report=lambda done, count: progress.show(f"predicting · record {done}/{count}"),
    )
    progress.clear()
    seconds = time.perf_counter() - begun
    cut = sum(prediction.is_cut for prediction in found)
    print(
        f"step {step}: {len(found)} records in {seconds:.0f} s, {cut} with a source that was cut",
        file=sys.stderr,
    )
    out, lines = args.out or f"{args.workdir}/predictions.jsonl", []
    for record, prediction in zip(records, found, strict=True):
        line: dict[str, Any] = {"id": record.id, **record.fields, "prediction": prediction.text}
        if prediction.probability is not None:
            line["probability"] = prediction.probability
        lines.append(jsonl.dumps(line, ensure_ascii=False) + "\n")
    write_atomically(out, "".join(lines))
    rows = {f"{args.workdir} @ {step}": [prediction.text for prediction in found]}
    pairs = [(d.fields[source], d.fields[target]) for d in train]
    wanted = {name: 0 for metric in args.metrics for name in task_baselines.OF_METRIC[metric]}
    for name in wanted:
        if pairs or name not in task_baselines.NEED_TRAIN:
            progress.show(f"baseline · {name}")
            rows[name] = task_baselines.BASELINES[name](pairs, sources)
    progress.clear()
    measured = {
        name: {
            figure: value
            for metric in args.metrics
            for figure, value in task_metrics.METRICS[metric](texts, references).items()
        }
        for name, texts in rows.items()
    }
    print(table(measured))
    print(f"predictions in {out}", file=sys.stderr)
    return 0


def read(args: argparse.Namespace, data: list[str], names: list[str]) -> list[Document]:
    """The records of some files; what is none is counted aloud."""
    flags = argparse.Namespace(**{**vars(args), "data": data})
    records, skipped = task_records.read(corpora.from_flags(flags), names)
    if skipped:
        print(f"{', '.join(data)}: no records: {skipped}", file=sys.stderr)
    return records


def table(measured: dict[str, dict[str, float]]) -> str:
    """A line of figures for each row of predictions."""
    figures = list(next(iter(measured.values())))
    width = max(map(len, measured)) + 2
    rendered = [" " * width + "".join(f"{name:>11}" for name in figures)]
    for name, values in measured.items():
        rendered.append(f"{name:<{width}}" + "".join(f"{values[f]:>11.2f}" for f in figures))
    return "\n".join(rendered)


def parse_args() -> argparse.Namespace:
    from lm.evaluation.task_metrics import METRICS

    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workdir", type=cli.folder, required=True, help="folder of the run")
    corpora.add_flags(parser, without=corpora.STORE_FLAGS)
    add("--train", action="append", help="records that baselines may know; repeatable")
    add(
        "--metrics",
        action="append",
        required=True,
        choices=METRICS,
        help="what to measure; repeatable",
    )
    add("--references", metavar="FIELD", help="field with a reference in each of its lines")
    add("--task", help="of a run of several tasks: which one")
    add("--step", type=int, help="checkpoint to use (default: the newest)")
    add("--limit", type=int, metavar="N", help="only the first N records")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of a text; default: 64")
    add("--num-beams", type=int, default=0, metavar="N", help="beam search, not greedy")
    add("--length-penalty", type=float, default=1.0, metavar="P", help="of beams; default: 1")
    add("--batch-size", type=int, default=32, metavar="N", help="texts at once; default: 32")
    add("--out", type=cli.file, help="default: WORKDIR/predictions.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
