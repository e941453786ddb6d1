"""Text to token stores: read, split and tokenize documents into OUT/train and OUT/validation.

    python scripts/prepare_data.py --data=stdlib --tokenizer=bytes --out=data/stdlib
    python scripts/prepare_data.py --data='books/**/*.txt.gz' --tokenizer=bpe.model --out=data/books

Started again, an interrupted run goes on where it was. --engine has many machines share the work.

For cross-validation --folds=5 makes five pairs of stores, in OUT/0 to OUT/4: every document is held
out, by the hash of its id, in one of them.
"""

import argparse
import dataclasses
import os
import sys
import time

from lm import cli
from lm.data.bins import Packing
from lm.preparation import corpus, prepare
from lm.storage.paths import expand_path, printable


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    corpus.add_flags(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="bytes, a SentencePiece .model (scripts/train_tokenizer.py), or a Hugging Face "
        "tokenizer.json",
    )
    parser.add_argument("--out", required=True, help="folder of the stores; gs:// and s3://, too")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument(
        "--engine",
        metavar="NAME [KEY=VALUE ...]",
        help="instead of processes here: 'slurm partition=cpu time=24:00:00', 'ray', or 'local "
        "workers=8', with the parameters of datatrove's executors (docs/corpora.md)",
    )
    parser.add_argument(
        "--rows",
        action="append",
        type=cli.list_of(int),
        default=[],
        metavar="LENGTH[,LENGTH]",
        help="store the plan of data.packing=best_fit for rows of so many tokens, else made at the "
        "first use; of several fields, which are then in the order of the objective: one "
        "length for all of them, or each one's own. Repeatable",
    )
    parser.add_argument(
        "--too-long",
        choices=("error", "cut", "drop"),
        default="error",
        help="data.too_long of the plans of --rows (default: error)",
    )
    parser.add_argument("--folds", type=int, default=1, help="pairs of stores, for all documents")
    flags = parser.parse_args()
    for name in ("workers", "folds"):
        if (value := getattr(flags, name)) is not None and value < 1:
            parser.error(f"--{name}={value}: give a number of at least 1")
    try:
        whole = corpus.from_flags(flags)
        if flags.folds == 1:
            _prepare(whole, flags.out, flags)
        else:
            for i in range(flags.folds):
                fold = dataclasses.replace(whole, fold=(i, flags.folds))
                _prepare(fold, os.path.join(expand_path(flags.out, "--out"), str(i)), flags)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"prepare_data: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare_data: interrupted; the same command goes on from here")


def _prepare(documents: corpus.Corpus, out: str, flags: argparse.Namespace) -> None:
    start = time.monotonic()
    result = prepare.prepare(
        documents,
        tokenizer=flags.tokenizer,
        out=out,
        num_workers=flags.workers,
        engine=flags.engine,
        packings=[
            Packing(tuple(documents.columns), tuple(lengths), flags.too_long)
            for lengths in flags.rows
        ],
    )
    took = f"took {time.monotonic() - start:.1f} s"
    done = "were already there" if result.was_complete else took
    print(f"{prepare.summary(result.manifests)}\nstores in {printable(out)} {done}")


if __name__ == "__main__":
    main()
