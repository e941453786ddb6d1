"""Share of non-padding tokens in the packed rows of every objective, over whole token stores.

    python scripts/fill_rates.py --text=data/stdlib/train
    python scripts/fill_rates.py --text=data/stdlib/train --pairs=data/translation/train \\
        --labels=data/topics/train --length=512 --packing=best_fit

Prints a line for each objective and kind of model: the lengths of its rows, and the share of
non-padding tokens in the decoder's (or the only) stream and in the encoder's. --pairs is a store of
two fields, `source` and `target`; --labels one whose target is a class.

With one field in the encoder and one in the decoder, both are full where the lengths of the rows
have the ratio of the fields' tokens: a second line for seq2seq takes the encoder's length from it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lm import cli
from lm.config.components import component
from lm.config.schema import DataConfig
from lm.data.pipeline import evaluation_batches, make_source
from lm.data.tokens import TokenStore
from lm.objectives import ModelInterface

FIELDS = ("source", "target")
SPARE_IDS = 2048  # for sentinels and masks, beyond those of the tokenizer
BATCH = 256


class Case(NamedTuple):
    """An objective, the store that it reads, and the lengths that it fills."""

    name: str
    store: str
    length: int
    encoder_length: int | None = None
    is_causal: bool = True


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every objective, for each kind of model that it is for."""
    n = args.length
    for name in ("causal", "prefix", "span_corruption", "ul2", "denoising"):
        yield Case(name, args.text, n)
    yield Case("mlm", args.text, n, is_causal=False)
    yield Case("span_corruption", args.text, targets_of_spans(n), n)
    yield Case("ul2", args.text, n, n)
    yield Case("denoising", args.text, n, n)
    if args.pairs:
        source, target = num_tokens(args.pairs)
        yield Case("seq2seq", args.pairs, n)
        yield Case("seq2seq", args.pairs, n, n)
        yield Case("seq2seq", args.pairs, n, round(n * source / target))
    if args.labels:
        yield Case("classification", args.labels, n)
        yield Case("classification", args.labels, n, is_causal=False)
        source, target = num_tokens(args.labels)
        yield Case("classification", args.labels, round(n * target / source), n)


def num_tokens(pairs: str) -> tuple[int, int]:
    """Token counts of the two fields of a store."""
    source, target = (TokenStore.open(pairs, field=f).num_tokens for f in FIELDS)
    return source, target


def targets_of_spans(length: int) -> int:
    """The decoder's length for the text that fills an encoder of `length` in span corruption."""
    module = component("lm.objectives", "span_corruption")
    noise = module.make_noise(module.Config().noise_density, module.Config().mean_span)
    both = (noise.lengths(raw) for raw in range(2 * length, 1, -1))
    return next(targets for inputs, targets in both if inputs <= length)


def classes(path: str) -> dict[str, tuple[str, ...]]:
    """The fields of classification's config: the targets that a store has, a character for each."""
    store = TokenStore.open(path, field=FIELDS[1])
    tokenizer = store.tokenizer()
    ids = {store.document(i)[:-1].tobytes() for i in range(store.num_documents)}
    labels = sorted(tokenizer.decode(np.frombuffer(x, np.int32)) for x in ids)
    single = (chr(i) for i in range(33, 2**16) if len(tokenizer.encode(chr(i))) == 1)
    return {"labels": tuple(labels), "verbalizers": tuple(itertools.islice(single, len(labels)))}


def measure(case: Case, packing: str) -> str:
    """Measure a case; return its line."""
    fields = FIELDS if case.name in ("seq2seq", "classification") else ("text",)
    tokenizer = TokenStore.open(case.store, field=fields[0]).tokenizer()
    form = ModelInterface(
        case.length, case.encoder_length, case.is_causal, tokenizer.vocab_size + SPARE_IDS
    )
    module = component("lm.objectives", case.name)
    config = classes(case.store) if case.name == "classification" else {}
    objective = module.build(module.Config(**config), tokenizer, form)
    data = DataConfig(packing=packing, too_long="cut")
    source = make_source(case.store, data, objective.layout, tokenizer)
    filled, slots = np.zeros(2, np.int64), np.zeros(2, np.int64)
    for i, batch in enumerate(evaluation_batches(source, objective, batch_size=BATCH)):
        rows = min(BATCH, len(source) - i * BATCH)  # the last batch is made up of empty ones
        for at, stream in enumerate((batch.inputs, batch.encoder)):
            if stream is not None:
                filled[at] += np.count_nonzero(stream.segments)
                slots[at] += rows * stream.segments.shape[1]
    fill = [f"{h / n:6.1%}" if n else " " * 6 for h, n in zip(filled, slots, strict=True)]
    kind = (
        "encoder and decoder" if case.encoder_length else "decoder" if case.is_causal else "encoder"
    )
    lengths = f"{case.encoder_length}, {case.length}" if case.encoder_length else str(case.length)
    return f"{case.name:16} {kind:20} {lengths:>10} {len(source):7,} {fill[0]:>10} {fill[1]:>8}"


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--text", required=True, metavar="STORE", help="of one field, text")
    add("--pairs", metavar="STORE", help="of two fields, source and target")
    add("--labels", metavar="STORE", help="the same, where a target is one of few")
    add("--length", type=int, default=512, help="tokens in a row (default: 512)")
    add("--packing", default="split", help="of text: split or best_fit, as data.packing")
    args = parser.parse_args()
    print(
        f"{'objective':16} {'model':20} {'lengths':>10} {'rows':>7} {'stream':>10} {'encoder':>8}"
    )
    try:
        for case in cases(args):
            print(measure(case, args.packing), flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"fill_rates: {error}")


if __name__ == "__main__":
    main()
