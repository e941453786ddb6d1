"""Train a SentencePiece tokenizer, or list the words, of the train split of a corpus.

    python scripts/train_tokenizer.py --data=stdlib --vocab-size=4096 --out=data/stdlib.model
    python scripts/train_tokenizer.py --data=wiki.train.tokens.txt --validation-fraction=0 \\
        --model-type=word --vocab-size=33278 --out=data/words.json
"""

import sys
import time

from lm import cli
from lm.preparation import corpus
from lm.preparation.tokenizer_training import train_tokenizer


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    corpus.add_flags(parser, without=("near_duplicates", *corpus.IMAGE_FLAGS))
    add = parser.add_argument
    add("--out", required=True, help="the .model file; of words: the .json file")
    add(
        "--vocab-size",
        type=int,
        default=4096,
        help="pieces, special ones included; of words: at most (default: 4096)",
    )
    add(
        "--model-type",
        choices=("bpe", "unigram", "word"),
        default="bpe",
        help="word: the words between white space, and <eos> for every newline, into a "
        "tokenizer.json (default: bpe)",
    )
    add(
        "--piece-span",
        choices=("line", "word"),
        default="line",
        help="a piece may span words of one line, or keeps to a word (default: line)",
    )
    add("--split-digits", action="store_true", help="every digit is a piece of its own")
    add(
        "--sample-bytes",
        type=int,
        default=32_000_000,
        help="train on about this much text, spread over the corpus (default: 32 MB; BPE takes "
        "50 times that in memory)",
    )
    flags = parser.parse_args()
    start = time.monotonic()
    print(f"training a {flags.model_type} tokenizer of {flags.vocab_size} pieces ...", flush=True)
    try:
        size = train_tokenizer(
            corpus.from_flags(flags),
            out=flags.out,
            vocab_size=flags.vocab_size,
            model_type=flags.model_type,
            piece_span=flags.piece_span,
            split_digits=flags.split_digits,
            sample_bytes=flags.sample_bytes,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"train_tokenizer: {error}")
    print(f"{flags.out}: trained on {size / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
