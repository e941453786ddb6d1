"""Text to token stores: reads, splits and tokenises documents into OUT/train and OUT/validation.

    python scripts/prepare_data.py --data=stdlib --tokenizer=bytes --out=data/stdlib
    python scripts/prepare_data.py --data='books/**/*.txt.gz' --tokenizer=bpe.model --out=data/books

Started again, an interrupted run goes on where it was. Many machines share the work on one file
system: machine i of n adds --shard i/n (from 0), and the last one to finish joins the parts.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lm.data import corpus, prepare


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    return int(index), int(count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    corpus.add_flags(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="bytes, a SentencePiece .model (scripts/train_tokenizer.py), or a Hugging Face "
        "tokenizer.json",
    )
    parser.add_argument("--out", required=True, help="folder of the stores")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="i/n", help="default: 0/1")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    flags = parser.parse_args()
    start = time.monotonic()
    try:
        result = prepare.prepare(
            corpus.from_flags(flags),
            tokenizer=flags.tokenizer,
            out=flags.out,
            shard=flags.shard,
            num_workers=flags.workers,
        )
    except ValueError as error:
        sys.exit(f"prepare_data: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare_data: interrupted; the same command goes on from here")
    if result.manifests:
        done = (
            "were already there"
            if result.was_complete
            else f"took {time.monotonic() - start:.1f} s"
        )
        print(f"{prepare.summary(result.manifests)}\nstores in {flags.out} {done}")


if __name__ == "__main__":
    main()
