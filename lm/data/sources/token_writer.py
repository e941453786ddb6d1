"""Writer of token stores: documents to blocks of tokens, blocks to the files of `tokens.py`."""

import collections
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from lm import storage
from lm.data.sources import Document
from lm.data.sources.tokens import FORMAT, MANIFEST
from lm.data.tokenizer import Tokenizer

_BATCH = 1 << 20  # characters handed to the tokenizer at once


# n documents, by name: "ids" (UTF-8) and "tokens.FIELD" (eos included) are joined, "id_lengths" and
# "lengths.FIELD" their lengths, "bytes.FIELD" the UTF-8 bytes of the texts; lengths are int64 [n]
Block = Mapping[str, np.ndarray]


def token_dtype(tokenizer: Tokenizer) -> str:
    """Return the smallest of uint16 and uint32 that holds every id, little-endian."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def encode_block(
    documents: Sequence[Document], tokenizer: Tokenizer, *, fields: Sequence[str]
) -> Block:
    """Return the documents as tokens, each followed by eos."""
    ids = [document.id.encode(errors="surrogateescape") for document in documents]
    block = {"ids": np.frombuffer(b"".join(ids), np.uint8), "id_lengths": _lengths(ids)}
    dtype = token_dtype(tokenizer)
    eos = np.array([tokenizer.eos_id], dtype)
    for field in fields:
        texts = [document.fields[field] for document in documents]
        tokens = [
            np.append(encoded.astype(dtype), eos)
            for batch in _batches(texts)
            for encoded in tokenizer.encode_batch(batch)
        ]
        block[f"tokens.{field}"] = np.concatenate([np.empty(0, dtype), *tokens])
        block[f"lengths.{field}"] = _lengths(tokens)
        block[f"bytes.{field}"] = _lengths([text.encode() for text in texts])
    return block


def _lengths(items: Sequence[bytes | np.ndarray]) -> np.ndarray:
    return np.array([len(item) for item in items], np.int64)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield consecutive texts, of `_BATCH` characters or a little more together."""
    last = np.cumsum([len(text) for text in texts], dtype=np.int64) // _BATCH
    for _, group in itertools.groupby(zip(last.tolist(), texts, strict=True), lambda pair: pair[0]):
        yield [text for _, text in group]


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
        self._fields = list(fields)
        self._lengths: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        self._files: dict[str, _HashedFile] = {}

    def add(self, block: Block, keep: np.ndarray | None = None) -> None:
        """Append the documents of `block`; of the bool mask `keep` [n], where it is given."""
        self._add(block, keep, "ids.bin", "ids", "id_lengths")
        for field in self._fields:
            self._add(block, keep, f"{field}/tokens.bin", f"tokens.{field}", f"lengths.{field}")
            num_bytes = block[f"bytes.{field}"]
            self._lengths[f"bytes.{field}"].append(num_bytes if keep is None else num_bytes[keep])

    def _add(
        self, block: Block, keep: np.ndarray | None, file: str, values: str, lengths: str
    ) -> None:
        found, sizes = block[values], block[lengths]
        if keep is not None and not keep.all():
            found, sizes = found[np.repeat(keep, sizes)], sizes[keep]
        self._write(file, found)
        self._lengths[lengths].append(sizes)

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
        id_offsets = _offsets(self._lengths["id_lengths"])
        self._write("id_offsets.bin", id_offsets)
        sizes = {}
        for field in self._fields:
            offsets = _offsets(self._lengths[f"lengths.{field}"])
            num_bytes = np.concatenate([np.empty(0, np.int64), *self._lengths[f"bytes.{field}"]])
            self._write(f"{field}/offsets.bin", offsets)
            self._write(f"{field}/bytes.bin", num_bytes)
            sizes[field] = {"num_tokens": int(offsets[-1]), "num_bytes": int(num_bytes.sum())}
        tokenizer = self._tokenizer
        if tokenizer.file_name:
            self._write(tokenizer.file_name, np.frombuffer(tokenizer.model, np.uint8))
        entries = {name: file.close() for name, file in sorted(self._files.items())}
        manifest = {
            "format": FORMAT,
            "split": split,
            "source": list(source),
            "num_documents": len(id_offsets) - 1,
            "fields": sizes,
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
        """Append to a file of the store."""
        if name not in self._files:
            path = self._partial / name
            path.parent.mkdir(exist_ok=True)
            self._files[name] = _HashedFile(path)
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

    def write(self, values: np.ndarray) -> None:
        content = values.tobytes()
        self._file.write(content)
        self._hash.update(content)

    def close(self) -> dict:
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
            return {"size": file.tell(), "sha256": self._hash.hexdigest()}


def _offsets(lengths: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum().astype("<i8")
