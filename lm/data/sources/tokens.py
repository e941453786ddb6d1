"""The token store: tokenised documents on disk, with random access to tokens by position.

    STORE/manifest.json       written last; a folder without it is no store
    STORE/ids.bin             document ids, UTF-8, joined
    STORE/id_offsets.bin      int64 [num_documents + 1], byte offsets into ids.bin
    STORE/tokenizer.model     the tokenizer's own file (tokenizer.json; none for bytes)
    STORE/text/tokens.bin     uint16 (uint32 above 65,536 ids) [num_tokens], all documents joined
    STORE/text/offsets.bin    int64 [num_documents + 1], token offsets into tokens.bin
    STORE/text/bytes.bin      int64 [num_documents], UTF-8 bytes of each document

Every field has a folder like `text/`. A document is `tokens(text) + [eos]`, without bos: a
consumer shifts right with bos before the first token, so every token of the stream is predicted
exactly once and bits per byte = nats / ln 2 / bytes is exact. Integers are little-endian. Local
stores are memory-mapped; `gs://`, `s3://`, `http://` and `file://` ones are read by byte range
through TensorStore.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lm.storage.paths import expand_path, is_url, kvstore_spec
from lm.tokenizers import tokenizer as tokenizers
from lm.tokenizers.special_tokens import DeclaredTokens

# (starts, stops) -> the ranges of an array
ReadRanges = Callable[[Sequence[int], Sequence[int]], list[np.ndarray]]
FORMAT = 1
MANIFEST = "manifest.json"
_INCOMPLETE = (
    f"not a complete token store (no {MANIFEST}); run scripts/prepare_data.py, again if it was "
    "interrupted"
)


class NoStore(ValueError):
    """There is no complete token store at a path."""


class TokenStore:
    """One field of a token store, read-only and safe to read from several threads.

    num_documents, num_tokens, num_bytes: sizes of this field.
    offsets: int64 [num_documents + 1], document i is tokens offsets[i] to offsets[i + 1], eos
    included. document_bytes: int64 [num_documents], UTF-8 bytes of each document.
    manifest: the content of manifest.json.
    """

    def __init__(self, path: str, field: str, files: "_LocalFiles | _RemoteFiles", manifest: dict):
        self.path = path
        self.field = field
        self.manifest = manifest
        self.num_documents = int(manifest["num_documents"])
        self.num_tokens = int(manifest["fields"][field]["num_tokens"])
        self.num_bytes = int(manifest["fields"][field]["num_bytes"])
        self._files = files
        self.offsets = self._array(f"{field}/offsets.bin", "<i8")
        self.document_bytes = self._array(f"{field}/bytes.bin", "<i8")
        self.read_ranges = files.ranges(f"{field}/tokens.bin", manifest["dtype"])

    @classmethod
    def open(cls, path: str | os.PathLike, *, field: str = "text") -> "TokenStore":
        """Return the store at `path`, a folder or a URL; file sizes are checked, contents are not.

        Raises NoStore if there is no complete store, ValueError if it has no such field.
        """
        path = expand_path(os.fspath(path), "a token store")
        files = _RemoteFiles(path) if is_url(path) else _LocalFiles(path)
        content = files.read(MANIFEST)
        if content is None:
            raise NoStore(f"{path}: {files.absence()}")
        manifest = json.loads(content)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{path}: token store format {manifest.get('format')}, this code reads {FORMAT}; "
                "prepare the data again"
            )
        if field not in manifest["fields"]:
            raise ValueError(f"{path}: no field {field!r}; it has {', '.join(manifest['fields'])}")
        for name, entry in manifest["files"].items():
            if error := files.size_error(name, entry["size"]):
                raise ValueError(
                    f"{path}/{name} {error}; the store is damaged: copy or prepare it again"
                )
        return cls(path, field, files, manifest)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens of positions `start` to `stop`, int32 [stop - start]."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"{self.path}: tokens {start} to {stop} are not within {self.num_tokens}"
            )
        return self.read_ranges([start], [stop])[0].astype(np.int32)

    def document_ids(self, i: int) -> str:
        """Return the id of document `i`, bytes that are no UTF-8 as surrogates (`os.fsdecode`)."""
        offsets, read_ranges = self._ids
        [content] = read_ranges(offsets[i : i + 1].tolist(), offsets[i + 1 : i + 2].tolist())
        return content.tobytes().decode(errors="surrogateescape")

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer that made this store, from the copy inside it."""
        entry = self.manifest["tokenizer"]
        if not entry["file"]:
            return tokenizers.from_bytes(entry["name"], b"")
        content = self._files.read(entry["file"])
        assert content is not None, "its size was checked by open"
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
        """Read everything; raise ValueError unless every file has its content hash."""
        for name, entry in self.manifest["files"].items():
            found = hashlib.sha256(self._array(name, "u1").data).hexdigest()
            if found != entry["sha256"]:
                raise ValueError(
                    f"{self.path}/{name}: content hash {found}, the manifest says "
                    f"{entry['sha256']}; the file is damaged: copy or prepare it again"
                )

    @property
    def eos_id(self) -> int:
        """The token that documents end with."""
        return int(self.manifest["tokenizer"]["eos_id"])

    @functools.cached_property
    def _ids(self) -> tuple[np.ndarray, ReadRanges]:
        return self._array("id_offsets.bin", "<i8"), self._files.ranges("ids.bin", "u1")

    def _array(self, name: str, dtype: str) -> np.ndarray:
        """Return a whole file."""
        length = self.manifest["files"][name]["size"] // np.dtype(dtype).itemsize
        return self._files.ranges(name, dtype)([0], [length])[0]


class _LocalFiles:
    """Files of a local folder, memory-mapped."""

    def __init__(self, path: str):
        self._path = Path(path)

    def absence(self) -> str:
        if self._path.is_symlink() and not self._path.exists():
            return f"a link to {os.readlink(self._path)}, which is not there"
        if not self._path.exists():
            out = self._path.parent
            return (
                "no such folder; make the store with scripts/prepare_data.py --data=TEXT "
                f"--tokenizer=FILE --out={out}, or with all that it needs by `make pretrain`"
            )
        if not self._path.is_dir():
            return "a file, not the folder of a token store"
        inside = [path.parent.name for path in sorted(self._path.glob(f"*/{MANIFEST}"))]
        if inside:
            return f"not a token store but a folder of some: name one of {', '.join(inside)} in it"
        return _INCOMPLETE

    def read(self, name: str) -> bytes | None:
        file = self._path / name
        return file.read_bytes() if file.is_file() else None

    def ranges(self, name: str, dtype: str) -> ReadRanges:
        file, array = self._path / name, np.empty(0, dtype)
        if file.stat().st_size:  # an empty file cannot be mapped
            array = np.asarray(np.memmap(file, dtype, mode="r"))
        return lambda starts, stops: [array[a:b] for a, b in zip(starts, stops, strict=True)]

    def size_error(self, name: str, size: int) -> str:
        file = self._path / name
        if not file.is_file():
            return f"is missing, the manifest says {size} bytes"
        found = file.stat().st_size
        return "" if found == size else f"has {found} bytes, the manifest says {size}"


class _RemoteFiles:
    """Files behind a URL, read by byte range through TensorStore."""

    def __init__(self, url: str):
        import tensorstore

        self._url = url.rstrip("/")
        self._store = tensorstore.KvStore.open(kvstore_spec(self._url)).result()

    def absence(self) -> str:
        return _INCOMPLETE

    def read(self, name: str) -> bytes | None:
        result = self._store.read(name).result()
        return result.value if result.state == "value" else None

    def ranges(self, name: str, dtype: str) -> ReadRanges:
        width = np.dtype(dtype).itemsize

        def read(starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
            pending = [
                self._store.read(name, byte_range=slice(a * width, b * width)) if b > a else None
                for a, b in zip(starts, stops, strict=True)
            ]
            contents = (future.result().value if future else b"" for future in pending)
            return [np.frombuffer(content, dtype) for content in contents]

        return read

    def size_error(self, name: str, size: int) -> str:
        # There is no call for the size of an object: its last byte must exist, and none after it.
        if not size or (self._exists(name, size - 1) and not self._exists(name, size)):
            return ""
        return f"is missing or has not the {size} bytes that the manifest says"

    def _exists(self, name: str, position: int) -> bool:
        try:
            result = self._store.read(name, byte_range=slice(position, position + 1)).result()
        except ValueError as error:
            if "OUT_OF_RANGE" in str(error):
                return False
            raise
        return result.state == "value"
