"""Writer of token stores: documents to blocks of tokens, blocks to shards, shards to a manifest.

A block is an Arrow record batch of some documents, as `encode_block` makes it. Blocks go to disk
between the stages of a preparation, and lose documents that are not kept by `RecordBatch.filter`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lm.data.bins import Packing, make_plan
from lm.data.plans import plan_entry, to_bytes
from lm.data.store_files import BLOCK, MANIFEST
from lm.data.tokens import FORMAT
from lm.preparation import arrow_files
from lm.sources import Document
from lm.storage import files as storage
from lm.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1 << 20  # characters handed to the tokenizer at once


def token_dtype(tokenizer: Tokenizer) -> str:
    """Return the smallest of uint16 and uint32 that holds every id, little-endian."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def encode_block(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    fields: Sequence[str],
    image_size: int | None = None,
) -> pa.RecordBatch:
    """Return the documents as tokens, each followed by eos: the columns `id`, and `tokens.FIELD`
    and `bytes.FIELD` (UTF-8 bytes of the text) of every field; `image`, the pixels, where there is
    an image_size.
    """
    import pyarrow as pa

    ids = [document.id.encode(errors="surrogateescape") for document in documents]
    columns: dict[str, pa.Array] = {"id": arrow_files.bytes_column(ids)}
    dtype = token_dtype(tokenizer)
    eos = np.array([tokenizer.eos_id], dtype)
    for field in fields:
        texts = [document.fields[field] for document in documents]
        tokens = []
        for batch in _batches(texts):
            for encoded in tokenizer.encode_batch(batch):
                tokens += [encoded.astype(dtype), eos]
        values = np.concatenate([np.empty(0, dtype), *tokens])
        lengths = [len(encoded) + 1 for encoded in tokens[::2]]
        columns[f"tokens.{field}"] = pa.LargeListArray.from_arrays(
            arrow_files.column(_offsets(lengths)), arrow_files.column(values)
        )
        num_bytes = np.array([len(text.encode()) for text in texts], np.int64)
        columns[f"bytes.{field}"] = arrow_files.column(num_bytes)
    if image_size is not None:
        pixels = b"".join(document.pixels() for document in documents)
        kind, buffers = pa.binary(3 * image_size**2), [None, pa.py_buffer(pixels)]
        columns["image"] = pa.Array.from_buffers(kind, len(documents), buffers)
    return pa.RecordBatch.from_arrays([*columns.values()], [*columns])


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield consecutive texts, of `_BATCH` characters or a little more together."""
    last = np.cumsum([len(text) for text in texts], dtype=np.int64) // _BATCH
    for _, group in itertools.groupby(zip(last.tolist(), texts, strict=True), lambda pair: pair[0]):
        yield [text for _, text in group]


def document_sizes(block: pa.RecordBatch, fields: Sequence[str]) -> np.ndarray:
    """Return the bytes that each document takes in a shard, int64 [n]."""
    sizes = 8 + np.diff(_limits(block, "id")[0])
    for field in fields:
        offsets, values = _limits(block, f"tokens.{field}")
        sizes += 16 + np.diff(offsets) * values.itemsize
    return sizes if "image" not in block.schema.names else sizes + 8 + _pixels(block).shape[1]


def _pixels(block: pa.RecordBatch) -> np.ndarray:
    """Return the pixels of each document, uint8 [n, 3 * size * size]."""
    column = block.column("image")
    width, content = column.type.byte_width, column.buffers()[1]
    values = np.frombuffer(content, np.uint8, len(column) * width, column.offset * width)
    return values.reshape(-1, width)


def _limits(block: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets [n + 1] of a column of lists or bytes from its first, and its values."""
    column = block.column(name)
    if not len(column):
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    if name == "id":
        _, offsets, data = column.buffers()
        offsets = np.frombuffer(offsets, np.int64)[column.offset :][: len(column) + 1]
        values = np.frombuffer(data or b"", np.uint8)
    else:
        offsets, values = map(arrow_files.numbers, (column.offsets, column.values))
    return offsets - offsets[0], values[offsets[0] : offsets[-1]]


def write_shard(
    store: str | os.PathLike,
    number: int,
    blocks: Iterable[pa.RecordBatch],
    *,
    fields: Sequence[str],
    packings: Sequence[Packing] = (),
    image_size: int | None = None,
) -> dict[str, Any]:
    """Write a shard of the store at `store`; return its entry in the manifest.

    Every file is there whole or not at all. packings: of which a plan is stored beside the tokens.
    image_size: of the pictures, None where there are none. A picture of consecutive documents is
    written once.
    """
    name = f"shard-{number:05d}"
    columns: dict[str, list[np.ndarray]] = {"id": []}
    entries: dict[str, dict] = {}
    with contextlib.ExitStack() as stack:

        def create(file: str) -> _HashedFile:
            return _HashedFile(stack.enter_context(storage.writing(f"{store}/{name}/{file}")))

        joined = {"id": create("ids.bin")}
        joined |= {f"tokens.{field}": create(f"{field}/tokens.bin") for field in fields}
        columns |= {column: [] for column in joined}
        columns |= {f"bytes.{field}": [] for field in fields}
        images = None if image_size is None else _ImageFile(create("images.bin"))
        for block in blocks:
            if images is not None:
                images.write(_pixels(block))
            for column, file in joined.items():
                offsets, values = _limits(block, column)
                file.write(values)
                columns[column].append(np.diff(offsets))
            for field in fields:
                columns[f"bytes.{field}"].append(
                    arrow_files.numbers(block.column(f"bytes.{field}"))
                )
        none = np.zeros(0, np.int64)
        found = {column: np.concatenate([none, *parts]) for column, parts in columns.items()}
        entries["ids.bin"] = joined["id"].entry()
        small = {"id_offsets.bin": _offsets(found["id"])}
        counts = {}
        for field in fields:
            entries[f"{field}/tokens.bin"] = joined[f"tokens.{field}"].entry()
            offsets, num_bytes = _offsets(found[f"tokens.{field}"]), found[f"bytes.{field}"]
            small[f"{field}/offsets.bin"] = offsets
            small[f"{field}/index.bin"] = offsets[::BLOCK]
            small[f"{field}/bytes.bin"] = num_bytes
            counts[field] = {"num_tokens": int(offsets[-1]), "num_bytes": int(num_bytes.sum())}
        if images is not None:
            entries["images.bin"] = images.file.entry()
            small["image_index.bin"] = images.index()
        plans = {}
        for packing in packings:
            plan = make_plan(packing, [small[f"{field}/offsets.bin"] for field in packing.fields])
            plans[packing.name] = plan_entry(plan)
            small[f"{packing.name}.bin"] = np.frombuffer(to_bytes(plan), "<i8")
        for file, values in small.items():
            hashed = create(file)
            hashed.write(values.astype("<i8"))
            entries[file] = hashed.entry()
    about_images = {}
    if images is not None:
        longest = max((int(found[f"tokens.{field}"].max(initial=0)) for field in fields), default=0)
        about_images = {"images": {"num_images": images.count, "longest_document": longest}}
    return {
        "name": name,
        "num_documents": len(found["id"]),
        "fields": counts,
        **about_images,
        "plans": plans,
        "files": dict(sorted(entries.items())),
    }


def write_manifest(
    store: str | os.PathLike,
    shards: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    tokenizer_name: str,
    fields: Sequence[str],
    source: Sequence[str] = (),
    split: str = "",
    skipped: Mapping[str, int] = MappingProxyType({}),
    skipped_examples: Mapping[str, Sequence[str]] = MappingProxyType({}),
    masked: Mapping[str, int] = MappingProxyType({}),
    images: Mapping[str, Any] = MappingProxyType({}),
    codes: Mapping[str, Any] = MappingProxyType({}),
    dtype: str | None = None,
) -> None:
    """Complete the store of these shards; what earlier attempts have left in its folder goes.

    skipped, skipped_examples: the number of skipped records by reason, and the first ids. masked:
    what filters have masked in the documents of all splits, by kind. images: `size` of the
    pictures, and how they were made; empty where there are none. codes: the origin of codes of
    pictures. dtype: of the tokens; None: of the tokenizer's ids.
    """
    files = {}
    if tokenizer.file_name:
        storage.write_atomically(f"{store}/{tokenizer.file_name}", tokenizer.model)
        digest = hashlib.sha256(tokenizer.model).hexdigest()
        files[tokenizer.file_name] = {"size": len(tokenizer.model), "sha256": digest}
    of_shards = {f"{shard['name']}/{name}" for shard in shards for name in shard["files"]}
    storage.keep_only(store, {*files, *of_shards})
    keys = ("num_tokens", "num_bytes")
    manifest = {
        "format": FORMAT,
        "split": split,
        "source": list(source),
        "num_documents": sum(shard["num_documents"] for shard in shards),
        "fields": {
            field: {key: sum(shard["fields"][field][key] for shard in shards) for key in keys}
            for field in fields
        },
        **_about_images(images, shards),
        **({"codes": dict(codes)} if codes else {}),
        "skipped": dict(sorted(skipped.items())),
        "skipped_examples": {k: list(v) for k, v in sorted(skipped_examples.items()) if v},
        **({"masked": dict(sorted(masked.items()))} if masked else {}),
        "dtype": dtype or token_dtype(tokenizer),
        "tokenizer": {
            "name": tokenizer_name,
            "file": tokenizer.file_name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        },
        "content_hash": hashlib.sha256(json.dumps([files, shards]).encode()).hexdigest(),
        "files": files,
        "shards": list(shards),
    }
    storage.write_atomically(f"{store}/{MANIFEST}", json.dumps(manifest, indent=1) + "\n")


def write_store(
    path: str | os.PathLike,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    fields: Sequence[str] = ("text",),
    shard_documents: int | None = None,
    packings: Sequence[Packing] = (),
    image_size: int | None = None,
) -> None:
    """Write a small store of `documents`, without splits: for tests and experiments.

    shard_documents: of a shard; None: there is one shard. image_size: of their pictures' pixels.
    """
    documents = list(documents)
    step = shard_documents or max(len(documents), 1)
    shards = []
    for number, start in enumerate(range(0, max(len(documents), 1), step)):
        options = {"fields": fields, "image_size": image_size}
        block = encode_block(documents[start : start + step], tokenizer, **options)
        shards.append(write_shard(path, number, [block], packings=packings, **options))
    images = {} if image_size is None else {"size": image_size}
    write_manifest(
        path, shards, tokenizer, tokenizer_name=tokenizer.name, fields=fields, images=images
    )


def _about_images(images: Mapping[str, Any], shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the entry of the pictures in a manifest, nothing where there are none."""
    if not images:
        return {}
    count = sum(shard["images"]["num_images"] for shard in shards)
    return {"images": {**images, "num_images": count}}


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, file: BinaryIO):
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def write(self, values: np.ndarray) -> None:
        content = np.ascontiguousarray(values).view(np.uint8).data
        self._file.write(content)
        self._hash.update(content)
        self._size += len(content)

    def entry(self) -> dict[str, Any]:
        return {"size": self._size, "sha256": self._hash.hexdigest()}


class _ImageFile:
    """The pictures of a shard, and the number of the picture of each document."""

    def __init__(self, file: _HashedFile):
        self.file, self.count = file, 0
        self._last = np.empty((0, 0), np.uint8)
        self._numbers: list[np.ndarray] = []

    def write(self, pixels: np.ndarray) -> None:
        """pixels: of consecutive documents, uint8 [n, bytes of a picture]."""
        is_new = np.ones(len(pixels), bool)
        is_new[1:] = (pixels[1:] != pixels[:-1]).any(1)
        if len(self._last) and len(pixels):
            is_new[0] = (pixels[:1] != self._last).any()
        self.file.write(pixels[is_new].ravel())
        self._numbers.append(self.count - 1 + np.cumsum(is_new))
        self.count += int(is_new.sum())
        self._last = pixels[-1:] if len(pixels) else self._last

    def index(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *self._numbers])


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], lengths]).astype(np.int64).cumsum()
