"""Make canaries, secrets to plant in training data, and a token store that repeats them.

    python scripts/plant_canaries.py --format='my card number is #### ####' --tokenizer=bytes \\
        --out=data/canaries

In the format, # is a random digit and @ a random letter. OUT/train is a token store in which each
canary is as many documents as --counts says: a source to train on, beside others. OUT/canaries.json
is the key that scripts/probe.py reads, with the canaries in full and as many that are nowhere. Both
are functions of the flags. Nothing that is printed has a canary in full.
"""

from __future__ import annotations

from lm import cli


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--format", required=True, help="text with # for digits and @ for letters")
    add("--tokenizer", required=True, help="that of the run: bytes, or a file")
    add("--out", type=cli.folder, required=True, help="folder of the store and the key")
    counts = cli.list_of(int)
    add("--counts", type=counts, default=[1, 10, 100], help="repeats (default: 1,10,100)")
    add("--per-count", type=int, default=10, help="canaries of each count (default: 10)")
    add("--seed", type=int, default=0, help="another one makes other canaries")
    args = parser.parse_args()

    from lm.probes import canaries
    from lm.tokenizers import tokenizer as tokenizers

    made = canaries.make_canaries(args.format, args.counts, args.per_count, args.seed)
    number = canaries.plant(made, tokenizers.load(args.tokenizer), args.out)
    print(
        f"{len(made.canaries)} canaries `{made.masked}` ({made.log2_size:.1f} bits), "
        f"{args.per_count} of each count (0, {', '.join(map(str, sorted(args.counts)))}): "
        f"{number} documents in {args.out}/{canaries.STORE}"
    )
    print(f"key, to be kept as secret as the data: {args.out}/{canaries.KEY_FILE}")
    return 0


if __name__ == "__main__":
    cli.run(main)
