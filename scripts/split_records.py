"""Split the records of a task into OUT/train.jsonl and OUT/test.jsonl by the hash of a key.

    python scripts/split_records.py --data=pairs.tsv --field=source={1} --field=target={2} \\
        --key=source --out=data/translation
    python scripts/split_records.py --data=dev-v1.1.json --format=squad --out=data/answering \\
        --field='source=question: {question} text: {context}' --field=target=answer
    python scripts/split_records.py --data=stdlib --format=packages --out=data/topics \\
        --field=source=text --field=target=package --label=email --label=xml

Records with one key are never in both, and the same key is always in the same one.
scripts/prepare_data.py makes a store of train, scripts/predict.py evaluates a run on test.
"""

import sys

from lm import cli
from lm.preparation import corpus, examples


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    corpus.add_flags(parser, without=corpus.STORE_FLAGS)
    add("--format", choices=examples.FORMATS, default="records", help="default: records")
    add("--key", default="", metavar="FIELD", help="of records: the field that decides (default: "
        "the place in the file)")  # fmt: skip
    add("--label", action="append", default=[], help="keep records with this target; repeatable")
    add("--test-fraction", type=float, default=0.1, help="default: 0.1")
    add("--train-limit", type=int, default=0, metavar="N", help="most records of train (0: all)")
    add("--out", type=cli.local_path, required=True, help="folder of the two files")
    flags = parser.parse_args()
    try:
        documents = corpus.from_flags(flags)
        found = examples.read(documents, flags.format, flags.key)
        if flags.label:
            found = examples.keep_labels(found, "target", set(flags.label))
        counts = examples.write(
            found,
            flags.out,
            test_fraction=flags.test_fraction,
            train_limit=flags.train_limit,
            max_loss=documents.max_loss,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"split_records: {error}")
    for split, count in counts.items():
        skipped = ", ".join(f"{n:,} {reason}" for reason, n in count.items() if reason != "records")
        print(f"{split:<6}{count['records']:>9,} records, skipped: {skipped or 'nothing'}")


if __name__ == "__main__":
    main()
