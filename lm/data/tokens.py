"""The token store: tokenised documents on disk, with random access to tokens by position.

    STORE/manifest.json                written last; a folder without it is no store
    STORE/tokenizer.model              the tokenizer's own file (tokenizer.json; none for bytes)
    STORE/shard-00000/ids.bin          document ids, UTF-8, joined
    STORE/shard-00000/id_offsets.bin   int64 [num_documents + 1], byte offsets into ids.bin
    STORE/shard-00000/text/tokens.bin  uint16 (uint32 above 65,536 ids), all documents joined
    STORE/shard-00000/text/offsets.bin int64 [num_documents + 1], token offsets into tokens.bin
    STORE/shard-00000/text/index.bin   every 1,024th of the offsets: found without reading all
    STORE/shard-00000/text/bytes.bin   int64 [num_documents], UTF-8 bytes of each document
    STORE/shard-00000/best_fit-2048.bin  a packing plan of the shard, if one was asked for
    STORE/shard-00000/images.bin       of pictures with captions: uint8 [num_images, size, size, 3]
    STORE/shard-00000/image_index.bin  int64 [num_documents], the picture of each document

Every field has a folder like `text/`. A document is `tokens(text) + [eos]`, without bos: a
consumer shifts right with bos before the first token, so every token of the stream is predicted
exactly once and bits per byte = nats / ln 2 / bytes is exact. Integers are little-endian.

Opening reads the manifest, which has the counts, sizes and hashes of all shards. Documents and
tokens are numbered through all shards; a shard's files are opened when one of its numbers is asked
for, and ranges of them are read: local ones by `pread`, those of `gs://`, `s3://`, `http://` and
`file://` through TensorStore. A store of format 1 is one shard in the folder of the store itself.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data.store_files import BLOCK, MANIFEST, Array, StoreFiles, open_files
from lm.storage.paths import expand_path
from lm.tokenizers import tokenizer as tokenizers
from lm.tokenizers.special_tokens import DeclaredTokens

FORMAT = 2
_READ = BLOCK << 10  # numbers that are read at once of an index without blocks


class NoStore(ValueError):
    """There is no complete token store at a path."""


class Shard(NamedTuple):
    """A shard of one field: its folder ("" or "shard-00000/"), sizes by the names of its files
    (with the folder), and its packing plans by name, as the manifest has them. longest_document:
    tokens, of stores with pictures.
    """

    folder: str
    num_documents: int
    num_tokens: int
    sizes: dict[str, int]
    hashes: dict[str, str]
    plans: dict[str, Any]
    longest_document: int


class TokenStore:
    """One field of a token store, read-only and safe to read from several threads.

    num_documents, num_tokens, num_bytes: sizes of this field.
    offsets: document i is tokens offsets[i] to offsets[i + 1], eos included.
    shards, first_documents, first_tokens: the shards, and the numbers of their first documents and
    tokens, int64 [S + 1]. manifest: the content of manifest.json. image_size: height and width of
    the pictures, None where there are none.
    """

    def __init__(self, path: str, field: str, files: StoreFiles, manifest: dict):
        self.path = path
        self.field = field
        self.manifest = manifest
        self.files = files
        self.num_documents = int(manifest["num_documents"])
        self.num_tokens = int(manifest["fields"][field]["num_tokens"])
        self.num_bytes = int(manifest["fields"][field]["num_bytes"])
        self.image_size: int | None = manifest.get("images", {}).get("size")
        self.shards = list(_shards(manifest, field))
        counts = np.array([[s.num_documents, s.num_tokens] for s in self.shards], np.int64)
        self.first_documents, self.first_tokens = np.pad(counts, ((1, 0), (0, 0))).cumsum(0).T
        self.offsets = Offsets(self)

    @classmethod
    def open(cls, path: str | os.PathLike, *, field: str = "text") -> TokenStore:
        """Return the store at `path`, a folder or a URL; other files are checked when first read.

        Raises NoStore if there is no complete store, ValueError if it has no such field.
        """
        path = expand_path(os.fspath(path), "a token store")
        files = open_files(path)
        content = files.read(MANIFEST)
        if content is None:
            raise NoStore(f"{path}: {files.absence()}")
        manifest = json.loads(content)
        if manifest.get("format") not in (1, FORMAT):
            raise ValueError(
                f"{path}: token store format {manifest.get('format')}, this code reads 1 and "
                f"{FORMAT}; prepare the data again"
            )
        if field not in manifest["fields"]:
            raise ValueError(f"{path}: no field {field!r}; it has {', '.join(manifest['fields'])}")
        return cls(path, field, files, manifest)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens of positions `start` to `stop`, int32 [stop - start]."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"{self.path}: tokens {start} to {stop} are not within {self.num_tokens}"
            )
        return self.read_ranges([start], [stop])[0].astype(np.int32)

    def document(self, i: int) -> np.ndarray:
        """Return the tokens of document `i`, eos included."""
        start, stop = self.offsets[np.array([i, i + 1])].tolist()
        return self.tokens(start, stop)

    def read_ranges(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        """Return the tokens of ranges; a range may begin in one shard and end in another."""
        limits = np.array([starts, stops], np.int64).reshape(2, -1)
        first = np.searchsorted(self.first_tokens, limits[0], "right") - 1
        last = np.searchsorted(self.first_tokens, limits[1], "left") - 1
        first = np.minimum(first, len(self.shards) - 1)
        counts = np.maximum(last - first, 0) + 1
        owner = np.repeat(np.arange(len(first)), counts)
        shard = np.repeat(first - (counts.cumsum() - counts), counts) + np.arange(counts.sum())
        begin, end = self.first_tokens[shard], self.first_tokens[shard + 1]
        clipped = np.clip(limits[:, owner], begin, end) - begin
        names = [f"{self.shards[s].folder}{self.field}/tokens.bin" for s in shard.tolist()]
        sizes = {n: self.shards[s].sizes[n] for n, s in zip(names, shard.tolist(), strict=True)}
        found = self.files.ranges(names, self.manifest["dtype"], sizes, clipped.T)
        if len(found) == len(counts):
            return found
        ends = counts.cumsum()
        return [np.concatenate(found[e - n : e]) for e, n in zip(ends, counts, strict=True)]

    def images(self, documents: np.ndarray) -> np.ndarray:
        """Return the pictures of documents, uint8 [n, size, size, 3], of a store that has some."""
        assert self.image_size is not None, "only of stores with pictures"
        documents = np.asarray(documents, np.int64)
        shards = np.searchsorted(self.first_documents, documents, "right") - 1
        numbers = self.by_shard(
            lambda shard, chosen: self.array(shard, "image_index.bin", "<i8")[
                chosen - self.first_documents[shard]
            ],
            documents,
            self.first_documents,
        )
        names = [f"{self.shards[s].folder}images.bin" for s in shards.tolist()]
        sizes = {n: self.shards[s].sizes[n] for n, s in zip(names, shards.tolist(), strict=True)}
        shape = (self.image_size, self.image_size, 3)
        limits = (numbers[:, None] + np.arange(2)) * int(np.prod(shape))
        found = self.files.ranges(names, "u1", sizes, limits)
        return np.stack([np.empty(shape, np.uint8), *(x.reshape(shape) for x in found)])[1:]

    def document_ids(self, i: int) -> str:
        """Return the id of document `i`, bytes that are no UTF-8 as surrogates (`os.fsdecode`)."""
        shard, local = self._shard_of(i)
        folder = self.shards[shard].folder
        limits = self.array(shard, "id_offsets.bin", "<i8")[local + np.arange(2)]
        sizes = self.shards[shard].sizes
        [content] = self.files.ranges([f"{folder}ids.bin"], "u1", sizes, limits[None])
        return content.tobytes().decode(errors="surrogateescape")

    def document_bytes(self, i: int) -> int:
        """Return the UTF-8 bytes of document `i`."""
        shard, local = self._shard_of(i)
        return int(self.array(shard, f"{self.field}/bytes.bin", "<i8")[np.array([local])][0])

    def array(self, shard: int, name: str, dtype: str) -> Array:
        """Return a file of a shard."""
        name = self.shards[shard].folder + name
        return self.files.array(name, dtype, self.shards[shard].sizes[name])

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer that made this store, from the copy inside it."""
        entry = self.manifest["tokenizer"]
        if not entry["file"]:
            return tokenizers.from_bytes(entry["name"], b"")
        content = self.files.read(entry["file"])
        if content is None:
            raise ValueError(f"{self.path}/{entry['file']} is missing; prepare the store again")
        ids = {f"{kind}_token_id": entry.get(f"{kind}_id") for kind in ("bos", "eos", "pad")}
        tokenizer = tokenizers.from_bytes(entry["file"], content, DeclaredTokens(generation=ids))
        self.check_tokenizer(tokenizer)
        return tokenizer

    def check_tokenizer(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Raise ValueError unless `tokenizer` made this store, with the same eos."""
        entry = self.manifest["tokenizer"]
        if tokenizer.fingerprint != entry["fingerprint"]:
            raise ValueError(
                f"{self.path}: prepared with tokenizer {entry['name']} (fingerprint "
                f"{entry['fingerprint']}), not with {tokenizer.name} (fingerprint "
                f"{tokenizer.fingerprint}); use the first or prepare the data again"
            )
        if (end := entry.get("eos_id", tokenizer.eos_id)) != tokenizer.eos_id:
            raise ValueError(
                f"{self.path}: its documents end with token {end}, and {tokenizer.name}, by the "
                f"files beside it, ends them with {tokenizer.eos_id}; prepare the data again with "
                "that tokenizer"
            )

    def verify(self) -> None:
        """Read everything in blocks; raise ValueError unless every file has its content hash."""
        own = self.manifest["files"] if self.manifest["format"] == FORMAT else {}
        whole = {name: (entry["size"], entry["sha256"]) for name, entry in own.items()}
        for shard in self.shards:
            whole |= {name: (size, shard.hashes[name]) for name, size in shard.sizes.items()}
        for name, (size, expected) in whole.items():
            if (found := self.files.sha256(name, size)) != expected:
                raise ValueError(
                    f"{self.path}/{name}: content hash {found}, the manifest says {expected}; "
                    "the file is damaged: copy or prepare it again"
                )

    def by_shard(self, function: Any, values: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Return function(shard, its values), int64 [n], for values that are numbered by `first`.

        A value after the last shard is of the last.
        """
        shards = np.searchsorted(first, values, "right") - 1
        shards = np.minimum(shards, len(self.shards) - 1)
        groups = [(s, np.flatnonzero(shards == s)) for s in np.unique(shards).tolist()]
        found = self.files.map(lambda group: function(group[0], values[group[1]]), groups)
        result = np.empty(len(values), np.int64)
        for (_, where), part in zip(groups, found, strict=True):
            result[where] = part
        return result

    @property
    def eos_id(self) -> int:
        """The token that documents end with."""
        return int(self.manifest["tokenizer"]["eos_id"])

    def _shard_of(self, document: int) -> tuple[int, int]:
        """Return the shard of a document, and its number there."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"{self.path}: no document {document} in {self.num_documents}")
        shard = int(np.searchsorted(self.first_documents, document, "right")) - 1
        return shard, document - int(self.first_documents[shard])


class Offsets:
    """The positions where documents begin, and the end of the last, int64 [num_documents + 1]; read
    from the shards when they are asked for.
    """

    def __init__(self, store: TokenStore):
        self._store = store

    def __len__(self) -> int:
        return self._store.num_documents + 1

    def __getitem__(self, documents: int | np.integer | np.ndarray) -> Any:
        """Return the position where each document begins: int64, of the shape of `documents`."""
        asked, store = np.asarray(documents, np.int64), self._store
        if asked.size and not 0 <= asked.min() <= asked.max() < len(self):
            raise IndexError(f"{store.path}: no documents {asked.min()} to {asked.max()}")

        def read(shard: int, chosen: np.ndarray) -> np.ndarray:
            local = store.array(shard, f"{store.field}/offsets.bin", "<i8")
            return local[chosen - store.first_documents[shard]] + store.first_tokens[shard]

        found = store.by_shard(read, asked.ravel(), store.first_documents)
        return found.reshape(asked.shape)[()]

    def find(self, positions: np.ndarray) -> np.ndarray:
        """Return the documents that hold the tokens at `positions`, int64 [n]."""
        store = self._store

        def search(shard: int, chosen: np.ndarray) -> np.ndarray:
            found = self._search(shard, chosen - store.first_tokens[shard])
            return found + store.first_documents[shard]

        return store.by_shard(search, np.asarray(positions, np.int64), store.first_tokens)

    def of_shard(self, shard: int) -> np.ndarray:
        """Return the offsets of a shard's documents from the shard's first token, int64 [n + 1]."""
        return self._store.array(shard, f"{self._store.field}/offsets.bin", "<i8")[:]

    def _search(self, shard: int, positions: np.ndarray) -> np.ndarray:
        """Return the documents of a shard at positions of the shard."""
        offsets = self._store.array(shard, f"{self._store.field}/offsets.bin", "<i8")
        blocks = np.searchsorted(self._index(shard), positions, "right") - 1
        result = np.empty(len(positions), np.int64)
        for block in set(blocks.tolist()):
            chosen = np.flatnonzero(blocks == block)
            inside = np.arange(block * BLOCK, min((block + 1) * BLOCK, len(offsets)))
            found = np.searchsorted(offsets[inside], positions[chosen], "right")
            result[chosen] = block * BLOCK + found - 1
        return result

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - stores live as long as the process reads them
    def _index(self, shard: int) -> np.ndarray:
        name = f"{self._store.field}/index.bin"
        if self._store.shards[shard].folder + name in self._store.shards[shard].sizes:
            return self._store.array(shard, name, "<i8")[:]
        offsets = self._store.array(shard, f"{self._store.field}/offsets.bin", "<i8")
        steps = range(0, len(offsets), _READ)  # of format 1
        return np.concatenate([offsets[i : i + _READ][::BLOCK] for i in steps])


def _shards(manifest: dict, field: str) -> Iterator[Shard]:
    if manifest["format"] == 1:
        entries = [{"name": "", "plans": {}, **manifest}]
    else:
        entries = manifest["shards"]
    for entry in entries:
        folder = f"{entry['name']}/" if entry["name"] else ""
        files = {folder + name: file for name, file in entry["files"].items()}
        yield Shard(
            folder,
            int(entry["num_documents"]),
            int(entry["fields"][field]["num_tokens"]),
            {name: file["size"] for name, file in files.items()},
            {name: file["sha256"] for name, file in files.items()},
            entry["plans"],
            entry.get("images", {}).get("longest_document", 0),
        )
