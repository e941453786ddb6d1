"""Writer of token stores: documents to blocks of tokens, blocks to the files of `tokens.py`."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from lm import storage
from lm.data.sources import Document
from lm.data.sources.tokens import FORMAT, MANIFEST
from lm.data.tokenizer import Tokenizer

_BATCH = 1 << 20  # characters handed to the tokenizer at once


class RaggedArray(NamedTuple):
    """Rows of different lengths: their concatenated values, and the lengths, int64 [n]."""

    values: np.ndarray
    lengths: np.ndarray

    def keep(self, rows: np.ndarray) -> "RaggedArray":
        """Return the rows where the bool mask `rows` is true."""
        if rows.all():
            return self
        return RaggedArray(self.values[np.repeat(rows, self.lengths)], self.lengths[rows])


class Block(NamedTuple):
    """n documents: ids (UTF-8), and by field tokens (eos included) and bytes, int64 [n]."""

    ids: RaggedArray
    tokens: dict[str, RaggedArray]
    num_bytes: dict[str, np.ndarray]

    def keep(self, rows: np.ndarray) -> "Block":
        """Return the documents where the bool mask `rows` is true."""
        return Block(
            self.ids.keep(rows),
            {field: tokens.keep(rows) for field, tokens in self.tokens.items()},
            {field: num_bytes[rows] for field, num_bytes in self.num_bytes.items()},
        )


def token_dtype(tokenizer: Tokenizer) -> str:
    """Return the smallest of uint16 and uint32 that holds every id, little-endian."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def encode_block(
    documents: Sequence[Document], tokenizer: Tokenizer, *, fields: Sequence[str]
) -> Block:
    """Return the documents as tokens, each followed by eos."""
    ids = [document.id.encode(errors="surrogateescape") for document in documents]
    dtype = token_dtype(tokenizer)
    eos = np.array([tokenizer.eos_id], dtype)
    tokens, num_bytes = {}, {}
    for field in fields:
        texts = [document.fields[field] for document in documents]
        values, lengths = [np.empty(0, dtype)], []
        for batch in _batches(texts):
            for encoded in tokenizer.encode_batch(batch):
                values += [encoded.astype(dtype), eos]
                lengths.append(len(encoded) + 1)
        tokens[field] = RaggedArray(np.concatenate(values), np.array(lengths, np.int64))
        num_bytes[field] = np.array([len(text.encode()) for text in texts], np.int64)
    id_bytes = np.frombuffer(b"".join(ids), np.uint8)
    return Block(
        RaggedArray(id_bytes, np.array([len(i) for i in ids], np.int64)), tokens, num_bytes
    )


def _batches(texts: Sequence[str]) -> Iterable[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class StoreWriter:
    """A writer of a store beside `path`, which `close` moves there, complete.

    Blocks are appended in order; the same blocks give the same bytes. The files of an interrupted
    writer are removed by the next one.
    """

    def __init__(self, path: str | os.PathLike, tokenizer: Tokenizer, *, fields: Sequence[str]):
        self._path = Path(path)
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._tokenizer = tokenizer
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files = {"ids.bin": _HashedFile(self._partial / "ids.bin")}
        self._id_lengths: list[np.ndarray] = []
        self._lengths: dict[str, list[np.ndarray]] = {field: [] for field in fields}
        self._num_bytes: dict[str, list[np.ndarray]] = {field: [] for field in fields}
        for field in fields:
            (self._partial / field).mkdir()
            name = f"{field}/tokens.bin"
            self._files[name] = _HashedFile(self._partial / name)

    def add(self, block: Block) -> None:
        """Append the documents of `block`."""
        self._files["ids.bin"].write(block.ids.values)
        self._id_lengths.append(block.ids.lengths)
        for field, tokens in block.tokens.items():
            self._files[f"{field}/tokens.bin"].write(tokens.values)
            self._lengths[field].append(tokens.lengths)
            self._num_bytes[field].append(block.num_bytes[field])

    def close(
        self,
        *,
        tokenizer_name: str,
        source: Sequence[str],
        split: str,
        skipped: Mapping[str, int],
        skipped_examples: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """Write the offsets and, last, the manifest, and move the store to its path.

        skipped, skipped_examples: the number of skipped records by reason, and the first ids.
        """
        id_offsets = _offsets(self._id_lengths)
        self._write("id_offsets.bin", id_offsets)
        fields = {}
        for field, lengths in self._lengths.items():
            offsets = _offsets(lengths)
            num_bytes = np.concatenate([np.empty(0, np.int64), *self._num_bytes[field]])
            self._write(f"{field}/offsets.bin", offsets)
            self._write(f"{field}/bytes.bin", num_bytes)
            fields[field] = {"num_tokens": int(offsets[-1]), "num_bytes": int(num_bytes.sum())}
        tokenizer = self._tokenizer
        if tokenizer.file_name:
            self._write(tokenizer.file_name, np.frombuffer(tokenizer.model, np.uint8))
        entries = {name: file.close() for name, file in sorted(self._files.items())}
        manifest = {
            "format": FORMAT,
            "split": split,
            "source": list(source),
            "num_documents": len(id_offsets) - 1,
            "fields": fields,
            "skipped": dict(sorted(skipped.items())),
            "skipped_examples": {k: list(v) for k, v in sorted(skipped_examples.items()) if v},
            "dtype": token_dtype(tokenizer),
            "tokenizer": {
                "name": tokenizer_name,
                "file": tokenizer.file_name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "bos_id": tokenizer.bos_id,
                "eos_id": tokenizer.eos_id,
                "pad_id": tokenizer.pad_id,
            },
            "content_hash": hashlib.sha256(json.dumps(entries).encode()).hexdigest(),
            "files": entries,
        }
        storage.write_atomically(self._partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        if self._path.exists():
            shutil.rmtree(self._path)
        self._partial.rename(self._path)

    def _write(self, name: str, values: np.ndarray) -> None:
        self._files[name] = _HashedFile(self._partial / name)
        self._files[name].write(values)


def write_store(
    path: str | os.PathLike,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    fields: Sequence[str] = ("text",),
) -> None:
    """Write a small store of `documents`, without splits: for tests and experiments."""
    writer = StoreWriter(path, tokenizer, fields=fields)
    writer.add(encode_block(list(documents), tokenizer, fields=fields))
    writer.close(tokenizer_name=tokenizer.name, source=[], split="", skipped={})


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, values: np.ndarray) -> None:
        content = values.tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._size += len(content)

    def close(self) -> dict:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self._size, "sha256": self._hash.hexdigest()}


def _offsets(lengths: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum().astype("<i8")
