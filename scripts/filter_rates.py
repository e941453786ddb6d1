"""Throughput of filters of documents, and the shares that they drop, on a corpus of your own.

    python scripts/filter_rates.py --data=stdlib
    python scripts/filter_rates.py --data='web/*.jsonl.gz' --filter=pii --filter='language keep=de'

One core, in its CPU time; the text is read first, so that reading is not in the numbers. A document
that a filter drops costs those after it nothing in the row of all.
"""

import itertools
import sys
import time
from collections.abc import Iterator

from lm import cli
from lm.preparation import corpus, filters, parts
from lm.preparation.filters.minhash import MinHash
from lm.sources import Document, Skipped
from lm.telemetry.progress import format_quantity

_DEFAULT = [name for name in filters.NAMES if name != "decontaminate"]


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    corpus.add_flags(
        parser, without=(*corpus.SPLIT_FLAGS, "split_by", "near_duplicates", *corpus.IMAGE_FLAGS)
    )
    parser.add_argument(
        "--max-bytes", type=int, default=10_000_000, help="of text that is read (default: 10 MB)"
    )
    flags = parser.parse_args()
    try:
        documents = list(_read(corpus.from_flags(flags), flags.max_bytes))
        for row in _rows(documents, flags.filters or _DEFAULT):
            print(row, flush=True)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"filter_rates: {error}")


def _read(whole: corpus.Corpus, max_bytes: int) -> Iterator[Document]:
    for item in parts.read_all(whole):
        if isinstance(item, Document):
            max_bytes -= _size(item)
            yield item
        if max_bytes <= 0:
            return


def _size(document: Document) -> int:
    return sum(len(text.encode()) for text in document.fields.values())


def _rows(documents: list[Document], names: list[str]) -> Iterator[str]:
    size = sum(map(_size, documents))
    yield f"{len(documents):,} documents, {format_quantity(size)}B; one core"
    yield f"{'filter':<44}{'MB/s':>8}{'core hours/TB':>15}{'dropped':>9}  masked"
    loaded = [filters.load(name) for name in names]
    for keep in loaded:
        keep(documents[0])  # loads what is loaded late
    for name, chosen in [*zip(names, [[keep] for keep in loaded], strict=True), ("(all)", loaded)]:
        start = time.process_time()
        items = [filters.apply(chosen, document) for document in documents]
        seconds = time.process_time() - start
        dropped = sum(isinstance(item, Skipped) for item in items) / len(items)
        yield f"{name:<44}{_rate(size, seconds)}{dropped:>9.1%}  {_masked(items)}"
    keys = MinHash().keys
    start = time.process_time()
    for document in documents:
        keys("\n".join(document.fields.values()))
    yield f"{'(keys of near-duplicates)':<44}{_rate(size, time.process_time() - start)}"


def _rate(size: int, seconds: float) -> str:
    return f"{size / seconds / 1e6:>8.2f}{1e12 / size * seconds / 3600:>15,.0f}"


def _masked(items: list[Document | Skipped]) -> str:
    pairs = sorted(
        itertools.chain.from_iterable(item.masked for item in items if isinstance(item, Document))
    )
    groups = itertools.groupby(pairs, key=lambda pair: pair[0])
    return ", ".join(f"{sum(n for _, n in group):,} {kind}" for kind, group in groups)


if __name__ == "__main__":
    main()
