"""A corpus: several sources, split into train and validation, grouped into parts of similar size.

Preparation and tokenizer training read documents through here, so both hold out the same ones.
"""

import argparse
import copy
import hashlib
import inspect
import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

import numpy as np

from lm.config.components import import_component
from lm.config.fields import Range, check_value
from lm.preparation import call_flags
from lm.preparation import filters as document_filters
from lm.preparation.filters.minhash import MinHash
from lm.preparation.pictures import FITS, MAX_PIXELS, PictureFormat
from lm.sources import IMAGE, KEY, Document, DocumentSource, Skipped
from lm.sources.file_source import FileSource
from lm.sources.tfds import TfdsSource

_MODULE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+):(.*)")  # PACKAGE.MODULE:ARGUMENT
SPLIT_FLAGS = ("validation_fraction", "split")
IMAGE_FLAGS = ("image", "image_size", "image_fit", "image_background", "image_max_pixels")
# which records alone do not read
STORE_FLAGS = (*SPLIT_FLAGS, "split_by", "filters", "near_duplicates", *IMAGE_FLAGS)


def _flag(default: object, sentence: str, *, repr: bool = True, **options: object) -> Any:
    """Return a field of `Corpus` with the description of its flag; options: of `add_argument`."""
    metadata = {"help": sentence, **options}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, repr=repr, metadata=metadata)


def _flag_of(f: Field[Any]) -> str:
    return f.metadata.get("flag", f"--{f.name.replace('_', '-')}")


@dataclass(frozen=True)
class Corpus:
    """The documents of several sources, and their split; with a flag for each field but `fold`.

    fold: (i, n) holds out the documents whose hash falls into the i-th of n equal parts, so that
      every document is held out in one of the n folds.
    """

    data: Sequence[str] = _flag(
        MISSING,
        "a file, folder or pattern (** recurses), locally or in a bucket (gs://, s3://), of "
        ".txt .md .py .jsonl .ndjson .json .tsv .csv .parquet .arrow .tar (WebDataset) .warc .wet, "
        "most also .gz or .zst; stdlib: the source of Python's standard library, stdlib:all: with "
        "its tests; tfds:NAME/CONFIG or tfds:/path; PACKAGE.MODULE:ARGUMENT: a source of your own "
        "(docs/extending.md). Repeatable; the order matters where documents are "
        "duplicates: the first stays",
        action="append",
        required=True,
    )
    columns: dict[str, str] = _flag(
        {"text": "text"},
        "store field and its column: a key or a path (message.content, answers.0), its number in "
        "tab-separated lines, or a template with columns of text in braces; a list of chat "
        "messages is the text of the dialogue (default: text). Repeatable: "
        "--field='source=Translate to Chinese: {1}' --field=target=2",
        flag="--field",
        action="append",
        metavar="FIELD[=COLUMN]",
    )
    separator: str = _flag(
        "",
        "separates the documents of one text file, such as '<|endoftext|>' or '\\n\\n' "
        "(default: a file is one document); white space around documents is dropped with it",
    )
    validation_fraction: float = _flag(
        0.05,
        "share of the corpus for validation; 0: no validation store (default: 0.05)",
        type=float,
        range=Range(ge=0, lt=1),
    )
    split: str = _flag(
        "hash",
        "hash: whole documents, by a hash of their id; tail: the last characters of every "
        "document, for a corpus of one or few (default: hash)",
        choices=("hash", "tail"),
    )
    split_by: str | None = _flag(
        None,
        "a column, or a template of some: documents with the same text there are in the same "
        "split, by its hash (default: each by its id)",
        metavar="COLUMN",
        repr=False,
    )
    fold: tuple[int, int] | None = None
    max_loss: float = _flag(
        0.05,
        "largest share of the files (by bytes) and of the records that may be skipped as "
        "unreadable: 0 to 1 (default: 0.05)",
        type=float,
        range=Range(ge=0, le=1),
        repr=False,  # by which folders of corpora are named: it changes no store
    )
    tfds_split: str = _flag("train", "TFDS splits, joined by + (default: train)")
    tfds_data_dir: str | None = _flag(
        None, "where TFDS keeps prepared data sets (default: TFDS's own choice)"
    )
    tfds_download: bool = _flag(
        False, "let TFDS download what is not prepared", action="store_true"
    )

    filters: Sequence[str] = _flag(
        [],
        "drops or changes documents: gopher_quality, gopher_repetition, c4, fineweb, language, "
        "pii, decontaminate, or a module of your own, with parameters: "
        "--filter='language keep=en,de'. Repeatable, applied in order (docs/corpora.md)",
        flag="--filter",
        dest="filters",
        action="append",
        metavar="NAME",
        repr=False,
    )
    near_duplicates: str | None = _flag(
        None,
        "drop documents that are similar to an earlier one, by MinHash; its parameters may "
        "follow: --near-duplicates='bands=20 rows=8 ngram=5 seed=0' (the default)",
        nargs="?",
        const="",
        metavar="KEY=VALUE",
        repr=False,
    )
    image: str | None = _flag(
        None,
        "the column of pictures: paths relative to the table, or the bytes of PNG, JPEG, WebP, GIF "
        "or BMP files; a list in the column of the text is several captions (docs/images.md)",
        metavar="COLUMN",
        repr=False,
    )
    image_size: int = _flag(
        64,
        "height and width of the stored pictures, which are resized to it (default: 64)",
        type=int,
        repr=False,
    )
    image_fit: str = _flag(
        "crop",
        "crop: the square in the middle of the picture; pad: all of it, with the background beside "
        "it (default: crop)",
        choices=FITS,
        repr=False,
    )
    image_background: str = _flag(
        "white",
        "colour beside pictures and behind transparent ones, as in CSS (default: white)",
        metavar="COLOR",
        repr=False,
    )
    image_max_pixels: int = _flag(
        MAX_PIXELS,
        "pictures that declare more pixels are skipped, and never decoded (default: 33,554,432)",
        type=int,
        repr=False,
    )

    def __post_init__(self):
        for f in fields(self):
            check_value(getattr(self, f.name), f.metadata, _flag_of(f))
        i, n = self.fold or (0, 2)
        errors = {
            "no data given: --data=stdlib, a file, a folder, a pattern or tfds:NAME": not self.data,
            f"fold {i} of {n}: there are at least two, from 0 on": not 0 <= i < n >= 2,
            "folds are of documents by their hash, and need a validation store": (
                self.fold and (self.split != "hash" or not self.validation_fraction)
            ),
            "split tail cuts a text in two: it cannot keep several fields together": (
                self.split == "tail" and len(self.columns) > 1
            ),
            "--split-by is of whole documents, and --split=tail cuts each": (
                self.split_by and self.split == "tail"
            ),
            "pictures are of whole documents of one field, and are not compared by their captions: "
            "give --image without --split=tail, a second --field and --near-duplicates": (
                self.image
                and (
                    self.split == "tail"
                    or len(self.columns) > 1
                    or self.near_duplicates is not None
                )
            ),
        }
        for f in fields(self):
            if f.name in IMAGE_FLAGS and not self.image and getattr(self, f.name) != f.default:
                errors[f"{_flag_of(f)} is of pictures: it needs --image=COLUMN"] = True
        if wrong := [message for message, is_wrong in errors.items() if is_wrong]:
            raise ValueError(wrong[0])
        self.picture_format  # noqa: B018 - raises ValueError for a wrong flag

    @property
    def picture_format(self) -> PictureFormat | None:
        """The form of the stored pictures; None where there are none."""
        if self.image is None:
            return None
        return PictureFormat(
            self.image_size, self.image_fit, self.image_background, self.image_max_pixels
        )

    @property
    def source_columns(self) -> dict[str, str]:
        """The columns that sources read: those of the fields, and of pictures and keys."""
        others = {IMAGE: self.image, KEY: self.split_by}
        return self.columns | {field: column for field, column in others.items() if column}

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "validation") if self.validation_fraction else ("train",)

    def sources(self) -> list[DocumentSource]:
        return [self._source(spec) for spec in self.data]

    def _source(self, spec: str) -> DocumentSource:
        if spec.startswith("tfds:"):
            tfds = (self.tfds_split, self.tfds_data_dir, self.tfds_download)
            return TfdsSource(spec.removeprefix("tfds:"), self.source_columns, *tfds)
        own = _MODULE.fullmatch(spec)
        if own and not os.path.lexists(spec):
            module = import_component(own[1], f"--data={spec}", needed=("build",))
            return module.build(own[2], self.source_columns)
        return FileSource(spec, self.source_columns, self.separator)

    def load_filters(self) -> list[document_filters.Filter]:
        """Return the filters of documents. Raises ValueError for a wrong flag."""
        return [document_filters.load(text) for text in self.filters]

    @property
    def min_hash(self) -> MinHash | None:
        """The keys of near-duplicates; None where those are kept. Raises ValueError."""
        if self.near_duplicates is None:
            return None
        flag = "--near-duplicates"
        name, words = call_flags.split(self.near_duplicates, flag)
        if name:
            raise ValueError(f"{flag}: {name!r} is no parameter KEY=VALUE")
        return MinHash(**call_flags.arguments(inspect.signature(MinHash), words, flag))

    def assign(self, document: Document) -> list[tuple[str, Document | Skipped]]:
        """Return the document with its split; both parts of it where `split` is "tail"."""
        if not self.cuts_documents:
            return [(self.split_of(document.split_key), document)]
        ((name, text),) = document.fields.items()
        cut = int(len(text) * (1 - self.validation_fraction))
        empty = Skipped(document.id, "empty")
        return [
            (split, Document(document.id, {name: part}) if part else empty)
            for split, part in (("train", text[:cut]), ("validation", text[cut:]))
        ]

    @property
    def cuts_documents(self) -> bool:
        """True if each document is cut into its splits."""
        return self.split == "tail" and self.validation_fraction > 0

    def split_of(self, key: str) -> str:
        """Return the split of a whole document: a pure function of its `split_key`."""
        [is_held_out] = self.is_held_out(np.array([key_hash(key)], np.uint64))
        return "validation" if is_held_out else "train"

    def is_held_out(self, hashes: np.ndarray) -> np.ndarray:
        """Return bool [n]: True where a whole document with this `key_hash`, uint64 [n], is of the
        validation split.
        """
        low, high = 0.0, self.validation_fraction if self.split == "hash" else 0.0
        if self.fold is not None:
            index, count = self.fold
            low, high = index / count, (index + 1) / count
        start, stop = (math.ceil(fraction * 2**64) for fraction in (low, high))  # exact
        # unsigned: a hash below `start` becomes one of the largest numbers
        return hashes - np.uint64(start) < np.uint64(stop - start)


def held_out(key: str, fraction: float) -> bool:
    """Return True if the hash of `key` falls into the fraction that is held out."""
    return key_hash(key) < fraction * 2**64


def key_hash(key: str) -> int:
    """Return a hash below 2**64."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")


def add_flags(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Add the flags that name a corpus to `parser`, but those of the fields `without`."""
    for f in fields(Corpus):
        if f.metadata and f.name not in without:
            options = {"default": [] if f.default is MISSING else f.default, **f.metadata}
            options = {k: v for k, v in options.items() if k not in ("flag", "range")}
            parser.add_argument(_flag_of(f), **options)


def from_flags(flags: argparse.Namespace) -> Corpus:
    """Return the corpus that the flags of `add_flags` name; without those of a split, not split."""
    given: dict[str, Any] = {"validation_fraction": 0.0}
    given |= {f.name: getattr(flags, f.name) for f in fields(Corpus) if f.name in flags}
    pairs = [text.partition("=")[::2] for text in flags.field or ["text"]]
    given["columns"] = {name: column.replace("\\n", "\n") or name for name, column in pairs}
    given["separator"] = _unescaped(flags.separator)
    return Corpus(**given)


def _unescaped(text: str) -> str:
    """Return the text with \\n, \\r and \\t, written as in a shell, as those characters."""
    for written, meant in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):
        text = text.replace(written, meant)
    return text
