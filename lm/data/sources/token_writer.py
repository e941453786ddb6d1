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

from lm.data.sources import Document
from lm.data.sources.tokens import FORMAT, MANIFEST
from lm.storage.files import write_atomically
from lm.tokenizers.tokenizer import Tokenizer

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


def write_blocks(
    path: str | os.PathLike,
    blocks: Iterable[tuple[Block, np.ndarray]],
    tokenizer: Tokenizer,
    *,
    fields: Sequence[str],
    tokenizer_name: str,
    source: Sequence[str] = (),
    split: str = "",
    skipped: Mapping[str, int] = MappingProxyType({}),
    skipped_examples: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Write the store at `path`, of the documents where the bool mask of each block is true.

    It is written beside its path and moved there, complete; what an interrupted writer has left is
    removed. The same documents in the same order give the same bytes. skipped, skipped_examples:
    the number of skipped records by reason, and the first ids.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files: dict[str, _HashedFile] = {}
    columns: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def append(name: str, values: np.ndarray) -> None:
        if name not in files:
            (partial / name).parent.mkdir(exist_ok=True)
            files[name] = _HashedFile(partial / name)
        files[name].write(values)

    joined = [("ids.bin", "ids", "id_lengths")]
    joined += [(f"{field}/tokens.bin", f"tokens.{field}", f"lengths.{field}") for field in fields]
    for block, keep in blocks:
        for file, values, lengths in joined:
            found = block[values]
            append(file, found if keep.all() else found[np.repeat(keep, block[lengths])])
        for name in (*(lengths for _, _, lengths in joined), *(f"bytes.{f}" for f in fields)):
            columns[name].append(block[name][keep])
    id_offsets = _offsets(columns["id_lengths"])
    append("id_offsets.bin", id_offsets)
    sizes = {}
    for field in fields:
        offsets = _offsets(columns[f"lengths.{field}"])
        num_bytes = np.concatenate(columns[f"bytes.{field}"])
        append(f"{field}/offsets.bin", offsets)
        append(f"{field}/bytes.bin", num_bytes)
        sizes[field] = {"num_tokens": int(offsets[-1]), "num_bytes": int(num_bytes.sum())}
    if tokenizer.file_name:
        append(tokenizer.file_name, np.frombuffer(tokenizer.model, np.uint8))
    entries = {name: file.close() for name, file in sorted(files.items())}
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
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)


def write_store(
    path: str | os.PathLike,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    fields: Sequence[str] = ("text",),
) -> None:
    """Write a small store of `documents`, without splits: for tests and experiments."""
    documents = list(documents)
    block = encode_block(documents, tokenizer, fields=fields), np.ones(len(documents), bool)
    write_blocks(path, [block], tokenizer, fields=fields, tokenizer_name=tokenizer.name)


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
