"""A preparation as its tasks get it: the data, its parts, and the paths of its files."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.data.bins import Packing
from lm.data.store_files import MANIFEST
from lm.preparation.corpus import Corpus
from lm.preparation.parts import Part
from lm.sources import Document, Unit
from lm.storage import files as storage
from lm.tokenizers import tokenizer as tokenizers

_BUCKET_SOURCE, _MAX_BUCKETS = 1 << 28, 256  # bytes of source in a bucket of keys


@dataclass(frozen=True)
class Job:
    """A preparation, as every task gets it; picklable.

    plan: the content of OUT/plan.json. parts_hash: of what the parts depend on. packings: of which
    plans are stored in the shards.
    """

    corpus: Corpus
    tokenizer: str
    fingerprint: str
    out: str
    plan: dict[str, Any]
    parts_hash: str
    num_parts: int
    packings: tuple[Packing, ...] = ()

    @property
    def work(self) -> str:
        return f"{self.out}/parts-{self.parts_hash[:16]}"

    @property
    def contaminated(self) -> str:
        """The folder of what the filter `decontaminate` has dropped, a file for each part."""
        return f"{self.out}/contaminated-{self.parts_hash[:16]}"

    @property
    def split(self) -> str:
        return f"{self.work}/split-{self.plan['hash'][:16]}"

    @property
    def num_buckets(self) -> int:
        """The number of buckets of keys, a power of two."""
        keys = 1 if (min_hash := self.corpus.min_hash) is None else 1 + min_hash.bands
        wanted = max(self.plan["num_source_bytes"] * keys // _BUCKET_SOURCE, 1)
        return min(1 << (wanted - 1).bit_length(), _MAX_BUCKETS if keys == 1 else 4 * _MAX_BUCKETS)

    @property
    def fields(self) -> list[str]:
        return list(self.corpus.columns)

    @property
    def image_size(self) -> int | None:
        return self.corpus.image_size if self.corpus.image else None

    def is_complete(self) -> bool:
        return all(storage.exists(f"{self.out}/{s}/{MANIFEST}") for s in self.corpus.splits)

    def part(self, i: int) -> Part:
        """Return the units of part `i`."""
        [limits] = storage.read_ranges([(f"{self.work}/units.bin", 8 * i, 8 * i + 16)])
        start, stop = np.frombuffer(limits, "<i8").tolist()
        units = json.loads(storage.read_bytes(f"{self.work}/units.json", start, stop))
        return [(source, Unit(*unit)) for source, *unit in units]

    def part_sizes(self) -> list[int]:
        """Return the bytes of source of each part."""
        return json.loads(storage.read_bytes(f"{self.work}/sizes.json"))

    def write_parts(self, parts: Sequence[Part]) -> None:
        """Write the list of parts, of which a task reads its own."""
        lines = [json.dumps([[i, *unit] for i, unit in part]).encode() for part in parts]
        offsets = np.cumsum([0, *map(len, lines)]).astype("<i8")
        storage.write_atomically(f"{self.work}/units.json", b"".join(lines))
        storage.write_atomically(f"{self.work}/units.bin", offsets.tobytes())
        sizes = [sum(unit.size for _, unit in part) for part in parts]
        storage.write_atomically(f"{self.work}/sizes.json", json.dumps(sizes))

    def load_tokenizer(self) -> tokenizers.Tokenizer:
        return _load(self.tokenizer, self.fingerprint)

    def near_keys(self) -> Callable[[Document], np.ndarray] | None:
        """Return the function from a document to keys, uint64 [n], of which a near-duplicate has
        one, too; None: only equal documents are dropped.
        """
        if (min_hash := self.corpus.min_hash) is None:
            return None
        return lambda document: min_hash.keys("\n".join(document.fields.values()))


@functools.cache
def _load(name: str, fingerprint: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.load(name)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(f"tokenizer {name} was changed during the preparation; start again")
    return tokenizer
