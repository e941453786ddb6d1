"""A corpus: several sources, split into train and validation, cut into parts of similar size.

Preparation and tokenizer training read documents through here, so both agree on what is held out.
"""

import argparse
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from lm.config import imported
from lm.data.sources import Document, DocumentSource, Skipped, Unit
from lm.data.sources.text import TextSource
from lm.data.sources.tfds import TfdsSource

_MODULE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+):(.*)")  # PACKAGE.MODULE:ARGUMENT
_MIN_PART, _MAX_PART = 1 << 20, 1 << 26  # bytes of source in a part
FEW_DOCUMENTS = 100
_MAX_PARTS = 1024  # reached before parts grow beyond _MIN_PART


@dataclass(frozen=True)
class Corpus:
    """Which documents, and how they are split.

    data: each "stdlib", "stdlib:all", "tfds:NAME/CONFIG", a file, a folder, a pattern, or
      "PACKAGE.MODULE:ARGUMENT", whose `build(argument, columns)` returns a `DocumentSource`.
    columns: store field -> column of jsonl, tables or TFDS, or a template (see sources/records.py).
    separator: between documents of one text file; empty: a file is one document.
    validation_fraction: 0 makes no validation store.
    split: "hash" sends whole documents by a hash of their id, "tail" the last characters of each
      document, for a corpus of few documents.
    fold: (i, n) holds out the documents whose hash falls into the i-th of n equal parts, in place
      of those below the fraction; so every document is held out in one of the n folds.
    """

    data: Sequence[str]
    columns: dict[str, str] = field(default_factory=lambda: {"text": "text"})
    separator: str = ""
    validation_fraction: float = 0.05
    split: str = "hash"
    fold: tuple[int, int] | None = None
    tfds_split: str = "train"
    tfds_data_dir: str | None = None
    tfds_download: bool = False

    def __post_init__(self):
        if not self.data:
            raise ValueError(
                "no data given: --data=stdlib, a file, a folder, a pattern or tfds:NAME"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation fraction {self.validation_fraction} must be at least 0 and below 1"
            )
        if self.split not in ("hash", "tail"):
            raise ValueError(f"split {self.split!r} must be hash or tail")
        if self.fold is not None:
            index, count = self.fold
            if not 0 <= index < count or count < 2:
                raise ValueError(f"fold {index} of {count}: there are at least two, from 0 on")
            if self.split != "hash" or not self.validation_fraction:
                raise ValueError(
                    "folds are of documents by their hash, and need a validation store"
                )
        if self.split == "tail" and len(self.columns) > 1:
            raise ValueError(
                "split tail cuts a text in two: it cannot keep several fields together"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "validation") if self.validation_fraction else ("train",)

    def sources(self) -> list[DocumentSource]:
        return [self._source(spec) for spec in self.data]

    def _source(self, spec: str) -> DocumentSource:
        if spec.startswith("tfds:"):
            return TfdsSource(
                spec.removeprefix("tfds:"),
                self.columns,
                self.tfds_split,
                self.tfds_data_dir,
                self.tfds_download,
            )
        own = _MODULE.fullmatch(spec)
        if own and not os.path.lexists(spec):
            module = imported(own[1], f"--data={spec}", needed=("build",))
            return module.build(own[2], self.columns)
        return TextSource(spec, self.columns, self.separator)

    def assign(self, document: Document) -> list[tuple[str, Document]]:
        """Returns the document with its split; both parts of it where `split` is "tail"."""
        if self.split == "hash" or not self.validation_fraction:
            return [(self.split_of(document.id), document)]
        ((name, text),) = document.fields.items()
        cut = int(len(text) * (1 - self.validation_fraction))
        return [
            ("train", Document(document.id, {name: text[:cut]})),
            ("validation", Document(document.id, {name: text[cut:]})),
        ]

    def split_of(self, document_id: str) -> str:
        """Returns the split of a whole document: a pure function of its id."""
        if self.fold is not None:
            index, count = self.fold
            below = held_out(document_id, index / count)
            is_held_out = held_out(document_id, (index + 1) / count) and not below
        else:
            is_held_out = self.split == "hash" and held_out(document_id, self.validation_fraction)
        return "validation" if is_held_out else "train"


def choose_split(corpus: Corpus) -> Corpus:
    """Returns the corpus with the last characters of each document held out where it has fewer than
    `FEW_DOCUMENTS` of one field, in place of whole documents: by their hash none of a few may be
    held out, or most of the text.
    """
    if corpus.split == "tail" or corpus.fold or len(corpus.columns) > 1:
        return corpus
    read = (item for part in plan_parts(corpus.sources()) for _, item, _ in read_part(corpus, part))
    documents = (item for item in read if isinstance(item, Document))
    few = sum(1 for _ in itertools.islice(documents, FEW_DOCUMENTS)) < FEW_DOCUMENTS
    return replace(corpus, split="tail") if few and corpus.validation_fraction else corpus


def held_out(key: str, fraction: float) -> bool:
    """Returns whether a key belongs to the fraction that is held out: a pure function of it."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


Part = list[tuple[int, Unit]]  # number of the source, unit


def plan_parts(sources: Sequence[DocumentSource]) -> list[Part]:
    """Returns the units of all sources, in order, grouped into parts of similar size."""
    units = [(i, unit) for i, source in enumerate(sources) for unit in source.units()]
    total = sum(unit.size for _, unit in units)
    limit = min(max(total // _MAX_PARTS, _MIN_PART), _MAX_PART)
    parts: list[Part] = [[]]
    size = 0
    for i, unit in units:
        if parts[-1] and size + unit.size > limit:
            parts.append([])
            size = 0
        parts[-1].append((i, unit))
        size += unit.size
    return parts


def read_part(corpus: Corpus, part: Part) -> Iterator[tuple[str, Document | Skipped, bytes]]:
    """Yields (split, document or what was skipped, digest of the whole document) in order.

    A document that is the same as an earlier one of the part is skipped.
    """
    sources = corpus.sources()
    seen = set()
    for i, unit in part:
        for item in sources[i].read(unit):
            if isinstance(item, Skipped):
                yield corpus.split_of(item.id), item, b""
                continue
            digest = _digest(item)
            for split, document in corpus.assign(item):
                if digest in seen:
                    yield split, Skipped(item.id, "duplicate"), b""
                elif not all(document.fields.values()):
                    yield split, Skipped(item.id, "empty"), b""
                else:
                    yield split, document, digest
            seen.add(digest)


def _digest(document: Document) -> bytes:
    """Returns 16 bytes that are the same only for documents with the same fields."""
    content = hashlib.sha256()
    for text in document.fields.values():
        encoded = text.encode()
        content.update(len(encoded).to_bytes(8, "big"))
        content.update(encoded)
    return content.digest()[:16]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a corpus and its split to `parser`."""
    add_source_flags(parser)
    add = parser.add_argument
    add(
        "--validation-fraction",
        type=float,
        default=0.05,
        help="share of the corpus for validation; 0: no validation store (default: 0.05)",
    )
    add(
        "--split",
        choices=("hash", "tail"),
        default="hash",
        help="hash: whole documents, by a hash of their id; tail: the last characters of every "
        "document, "
        "for a corpus of one or few (default: hash)",
    )


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name the sources of a corpus to `parser`."""
    add = parser.add_argument
    add(
        "--data",
        action="append",
        required=True,
        help="a file, folder or pattern (** recurses) of .txt .md .py .jsonl .tsv, also .gz or "
        ".zst; stdlib: the source of Python's standard library, stdlib:all: with its tests; "
        "tfds:NAME/CONFIG or tfds:/path; PACKAGE.MODULE:ARGUMENT: a source of your own "
        "(docs/extending.md). Repeatable; the order matters where documents are "
        "duplicates: the first stays",
    )
    add(
        "--field",
        action="append",
        default=[],
        metavar="FIELD[=COLUMN]",
        help="store field and its column in jsonl or TFDS, its number in tab-separated lines, or a "
        "template with columns in braces (default: text). Repeatable: "
        "--field='source=Translate to Chinese: {1}' --field=target=2",
    )
    add(
        "--separator",
        default="",
        help="what stands between the documents of one text file, such as '<|endoftext|>' or "
        "'\\n\\n' "
        "(default: a file is one document); white space around documents is dropped with it",
    )
    add("--tfds-split", default="train", help="TFDS splits, joined by + (default: train)")
    add("--tfds-data-dir", help="where TFDS keeps prepared data sets (default: TFDS's own choice)")
    add("--tfds-download", action="store_true", help="let TFDS download what is not prepared")


def from_flags(flags: argparse.Namespace) -> Corpus:
    """Returns the corpus that the flags of `add_flags` name."""
    return replace(
        from_source_flags(flags),
        validation_fraction=flags.validation_fraction,
        split=flags.split,
    )


def from_source_flags(flags: argparse.Namespace) -> Corpus:
    """Returns the corpus that the flags of `add_source_flags` name, not split."""
    columns = {}
    for text in flags.field or ["text"]:
        name, _, column = text.partition("=")
        columns[name] = column.replace("\\n", "\n") or name
    return Corpus(
        data=flags.data,
        columns=columns,
        separator=flags.separator.replace("\\n", "\n").replace("\\t", "\t"),
        validation_fraction=0.0,
        tfds_split=flags.tfds_split,
        tfds_data_dir=flags.tfds_data_dir,
        tfds_download=flags.tfds_download,
    )
