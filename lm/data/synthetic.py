"""Synthetic rows for tests and benchmarks: pure functions of (kind, seed, row).

random   Uniform tokens; nothing to learn: the loss stays at log(vocab_size). For objectives that
         take pictures, random pixels of any size; a row is then one document.
markov   Token k is followed by 2k or 2k + 1 (modulo vocab_size), equally likely, so all tokens are
         equally frequent. The best loss is log(2) for every token with a predecessor, from the
         previous token alone.
copy     A document repeats its first 8 tokens; everything after them is determined by them.
reverse  Of two fields: the target is the source backwards, both end in eos.
codes    Of two fields, as `lm.objectives.dalle` reads them: a caption, and as many codes as a row
         holds, 0 and 1, which repeat the parities of its tokens.
shapes   Pictures with captions: see `shapes`.
oracle   Sequences that fill their rows, of an LSTM with parameters from N(0, 1): see `oracle`.

Documents have random lengths and end with their row. Only reverse, codes and shapes have an eos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np

from lm.data.oracle import OracleRows
from lm.data.packing import check_rows
from lm.data.pairs import Pairs
from lm.data.rows import RowLayout, Rows, RowSource, Span
from lm.data.sampler import hash_words, scale_hash
from lm.data.shapes import ShapeRows
from lm.data.store_files import MemoryFiles
from lm.data.tokens import FORMAT, TokenStore
from lm.tokenizers.tokenizer import Tokenizer

KINDS = ("random", "markov", "copy")
_PERIOD = 8


@dataclass(frozen=True)
class Synthetic:
    """`num_rows` rows of `length` tokens below `vocab_size`; a `RowSource`.

    document_length: the mean number of tokens of a document, if rows were endless. image_size: of a
    picture of random pixels for each row, which is then one document of random length.
    """

    kind: str
    _: KW_ONLY
    vocab_size: int
    length: int
    num_rows: int = 65536
    document_length: int = 256
    seed: int = 0
    image_size: int | None = None
    bytes_per_token = None  # no text behind the tokens
    truncation_summary = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"synthetic data of kind {self.kind!r} does not exist; there are: "
                f"{', '.join(KINDS)}"
            )
        for name in ("vocab_size", "length", "num_rows"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"synthetic data needs a {name} of at least 1, got {value}")

    def __len__(self) -> int:
        return self.num_rows

    def read(self, rows: np.ndarray) -> Rows:
        """Return the rows with the indices `rows`: int64 [B]; IndexError outside of `[0, len)`."""
        rows = check_rows(rows, self.num_rows, f"synthetic:{self.kind}")
        columns = np.arange(self.length, dtype=np.int32)
        starts = scale_hash(self._hash(0, rows, columns), np.uint64(self.document_length)) == 0
        starts[:, :1] = True
        segments = np.cumsum(starts, 1, dtype=np.int32)
        begins = np.maximum.accumulate(starts * columns, axis=1)
        positions = columns - begins
        if self.kind == "markov":
            ids = self._walk(rows, columns)
        else:
            seen = begins + positions % _PERIOD if self.kind == "copy" else columns
            ids = scale_hash(self._hash(1, rows, seen), np.uint64(self.vocab_size)).astype(np.int32)
        previous, images = np.full_like(ids, -1), None
        if self.image_size is not None:
            lengths = 1 + scale_hash(self._hash(3, rows, columns[:1]), np.uint64(self.length))
            segments = (columns < lengths.astype(int)).astype(np.int32)
            ids, positions = ids * segments, columns * segments
            images = self._pictures(rows, self.image_size)
        return Rows(ids, segments, positions, previous, images=images)

    def documents(self, rows: np.ndarray) -> list[list[Span]]:
        """Return for each row its documents, numbered in the row."""
        read = self.read(rows)
        return [
            [
                Span(number, f"{self.kind}/{row}/{number}", 0, int(length))
                for number, length in enumerate(np.bincount(segments)[1:])
            ]
            for row, segments in zip(np.asarray(rows).tolist(), read.segments, strict=True)
        ]

    def _pictures(self, rows: np.ndarray, size: int) -> np.ndarray:
        """Return random pixels, uint8 [B, size, size, 3]."""
        words = self._hash(4, rows, np.arange(-(-size * size * 3 // 8)))
        return words.view(np.uint8)[:, : size * size * 3].reshape(-1, size, size, 3)

    def _hash(self, stream: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return hash_words(self.seed, stream, rows[:, None], columns)

    def _walk(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return int32 [B, T]: random walks on the graph of kind markov."""
        choices = (self._hash(1, rows, columns) >> np.uint64(63)).astype(np.int32)
        ids = np.empty((len(rows), self.length), np.int32)
        token = scale_hash(self._hash(2, rows, columns[:1]), np.uint64(self.vocab_size))[:, 0]
        token = token.astype(np.int32)
        for column in columns:
            ids[:, column] = token
            token = (2 * token + choices[:, column]) % self.vocab_size
        return ids


def reverse(layout: RowLayout, *, eos_id: int, num_rows: int = 4096, seed: int = 0) -> Pairs:
    """Return `num_rows` pairs of a random source of 1 to 15 tokens and its reverse."""
    tokens, offsets = _random_texts(15, eos_id, num_rows, seed)
    at = np.arange(len(tokens))
    document = np.searchsorted(offsets, at, "right") - 1
    backwards = offsets[document] + offsets[document + 1] - 2 - at
    target = tokens[np.where(tokens == eos_id, at, backwards)]
    return _pairs("reverse", layout, eos_id, [(tokens, offsets), (target, offsets)])


def codes(layout: RowLayout, *, eos_id: int, num_rows: int = 4096, seed: int = 0) -> Pairs:
    """Return `num_rows` captions of up to 15 tokens with codes of 0 and 1."""
    if len(layout.lengths) != 2:
        raise ValueError("synthetic:codes is for config.objective.name=dalle")
    longest, count = layout.lengths
    tokens, offsets = _random_texts(min(15, longest - 1), eos_id, num_rows, seed)
    column = np.arange(count) % (np.diff(offsets) - 1)[:, None]
    target = (tokens[offsets[:-1, None] + column] % 2).ravel().astype(np.int32)
    of_codes = np.arange(num_rows + 1) * count
    return _pairs("codes", layout, eos_id, [(tokens, offsets), (target, of_codes)])


def _random_texts(
    longest: int, eos_id: int, num_rows: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return texts of 1 to `longest` tokens and an eos, joined, and their offsets."""
    rng = np.random.default_rng([seed, num_rows])
    lengths = rng.integers(1, longest + 1, num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    tokens = rng.integers(0, min(eos_id, 256), offsets[-1]).astype(np.int32)
    tokens[offsets[1:] - 1] = eos_id
    return tokens, offsets


def _pairs(
    kind: str, layout: RowLayout, eos_id: int, fields: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Pairs:
    """Return documents of two fields, whose joined tokens and offsets are given."""
    num_rows = len(fields[0][1]) - 1
    ids = [f"{kind}/{i}".encode() for i in range(num_rows)]
    arrays = {
        "ids.bin": np.frombuffer(b"".join(ids), np.uint8),
        "id_offsets.bin": np.cumsum([0, *map(len, ids)]),
    }
    of_fields = dict(zip(layout.fields, fields, strict=True))
    for field, (values, offsets) in of_fields.items():
        arrays |= {f"{field}/tokens.bin": values, f"{field}/offsets.bin": offsets}
    shard = {
        "name": "",
        "num_documents": num_rows,
        "fields": {
            field: {"num_tokens": len(values), "num_bytes": 0}
            for field, (values, _) in of_fields.items()
        },
        "plans": {},
        "files": {name: {"size": x.nbytes, "sha256": ""} for name, x in arrays.items()},
    }
    manifest = shard | {
        "format": FORMAT, "dtype": "<i4", "tokenizer": {"eos_id": eos_id}, "shards": [shard]
    }  # fmt: skip
    path, files = f"synthetic:{kind}", MemoryFiles(arrays)
    return Pairs([TokenStore(path, field, files, manifest) for field in layout.fields], layout)


def make(path: str, layout: RowLayout, tokenizer: Tokenizer) -> RowSource:
    """Return the rows of `path`, "synthetic:KIND[:ROWS[:SEED]]", of shapes also with ":SPLIT"."""
    _, kind, *numbers = path.split(":")
    split = numbers.pop() if kind == "shapes" and len(numbers) == 3 else "all"
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(
            f"{path}: must be synthetic:KIND, synthetic:KIND:ROWS or synthetic:KIND:ROWS:SEED"
        )
    options = dict(zip(("num_rows", "seed"), map(int, numbers), strict=False))
    takes_images = layout.image_size is not None
    if kind == "shapes" if not takes_images else kind not in ("random", "shapes"):
        raise ValueError(
            f"{path}: of the synthetic kinds shapes has pictures, for objectives that take them, "
            "and random where they do"
        )
    if kind == "shapes":
        return ShapeRows(path, layout, tokenizer, split=split, **options)
    if len(layout.fields) == 2:
        if kind not in ("reverse", "codes"):
            raise ValueError(
                f"{path}: of the synthetic kinds only reverse and codes have two fields"
            )
        return {"reverse": reverse, "codes": codes}[kind](
            layout, eos_id=tokenizer.eos_id, **options
        )
    if kind == "oracle":
        size = layout.num_ids or tokenizer.vocab_size
        return OracleRows(layout, size, tokenizer.bos_id, **options)
    return Synthetic(
        kind,
        vocab_size=tokenizer.used_vocab_size,
        length=layout.length,
        image_size=layout.image_size,
        **options,
    )
