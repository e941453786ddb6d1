"""Tokenizers: bytes, SentencePiece and Hugging Face `tokenizer.json` behind one class.

- `encode` adds no special tokens and never makes one out of the text: "</s>" in a document stays
  text. In `encode_special`, for chat templates and the like, it is the token.
- `decode_bytes` is additive: the bytes of `a + b` are those of `a` followed by those of `b`, so a
  stream can be printed token by token and bytes per token are exact. Special ids have no bytes.
- A text of more than `LONG_TEXT` characters is encoded in parts, cut after a newline, else a space:
  time and memory stay linear. Only a token that would span a cut comes out as two.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from lm.storage.paths import expand_path
from lm.tokenizers import special_tokens
from lm.tokenizers.special_tokens import NO_DECLARATIONS, DeclaredTokens

LONG_TEXT = 1 << 18
_RULES = "1"  # part of every fingerprint: to be raised when a change below changes ids


class Tokenizer:
    """Text to ids and back.

    name: what `load` was given. model: the bytes of its file, file_name: the file's usual name.
    start_ids: ids that a generated or scored text begins with. stop_ids: any of them ends a
    continuation. used_vocab_size: ids from here on are of unused special tokens.
    special_ids: ids of special tokens by their spelling.
    """

    name: str
    file_name: str
    model: bytes
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str
    start_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    used_vocab_size: int
    special_ids: Mapping[str, int]
    _bytes: Sequence[bytes]  # of every id
    _adds_space = False  # before a text

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32, without special tokens."""
        parts = split_long_text(text)
        return np.concatenate([self._encode(part, is_first=not i) for i, part in enumerate(parts)])

    def _encode(self, part: str, *, is_first: bool) -> np.ndarray:
        """Return the ids of a part of a text; no space is added before any but the first."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text, on one thread."""
        return [self.encode(text) for text in texts]

    def encode_special(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32, the names in `special_ids` read as those tokens."""
        names = sorted(self.special_ids, key=len, reverse=True)  # the longest that fits
        pattern = "(" + "|".join(map(re.escape, names)) + ")"
        ids = [
            np.array([self.special_ids[part]]) if part in self.special_ids else self.encode(part)
            for part in (re.split(pattern, text) if names else [text])
            if part
        ]
        return np.concatenate([np.zeros(0, int), *ids]).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode(errors="replace")
        return text[1:] if self._adds_space and text.startswith(" ") else text

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the exact bytes of `ids`, which may begin or end inside a character.

        Raises ValueError for ids outside the vocabulary.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(
                f"token id {wrong} is outside the vocabulary of {self.name} "
                f"(vocab_size {self.vocab_size})"
            )
        return b"".join([self._bytes[i] for i in ids.ravel().tolist()])

    def _set_ends(self, declared: DeclaredTokens, usual_start: tuple[int, ...]) -> None:
        """Set `start_ids` and `stop_ids`; usual_start: where the published files don't say."""
        given = declared.begins_with_bos
        self.start_ids = usual_start if given is None else (self.bos_id,) if given else ()
        declared_stops = declared.ids("eos_token_id", self.vocab_size)
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *declared_stops)))


def load(name: str) -> Tokenizer:
    """Return the tokenizer `name`: "bytes", or the path of a `.model` or `tokenizer.json` file.

    Paths may be local (`~` is the home folder) or `gs://`. Raises ValueError for anything else.
    """
    if name == "bytes":
        return ByteTokenizer()
    if not name.endswith((".model", ".json")):
        raise ValueError(
            f'tokenizer {name!r} is neither "bytes" nor the path of a SentencePiece .model or of a '
            "Hugging Face tokenizer.json"
        )
    from lm.storage.epaths import StoragePath  # costs 0.1 s: only where a file is read

    name = expand_path(name, "tokenizer")
    path = StoragePath(name)
    if path.is_dir():
        raise ValueError(f"tokenizer {name} is a folder: name the file in it")
    if not path.is_file():
        raise ValueError(
            f"tokenizer {name}: no such file; scripts/train_tokenizer.py makes one, and "
            "`make pretrain` one with its token stores"
        )
    return from_bytes(name, path.read_bytes(), special_tokens.read(path.parent))


def from_bytes(name: str, model: bytes, declared: DeclaredTokens = NO_DECLARATIONS) -> Tokenizer:
    """Return the tokenizer whose file `name` has the content `model` ("bytes" has no file).

    declared: special tokens of the files beside it.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name.endswith(".model"):
        from lm.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(name, model, declared)
    from lm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(name, model, declared)


def fingerprint(kind: str, model: bytes) -> str:
    """Return a hash of all that the ids of a text depend on."""
    return hashlib.sha256(b":".join((kind.encode(), _RULES.encode(), model))).hexdigest()


def split_long_text(text: str, *, limit: int = LONG_TEXT) -> Iterator[str]:
    """Yield `text` in parts of at most `limit` characters; a short text is one part."""
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        for boundary in ("\n", " "):
            found = text.rfind(boundary, start, stop)
            if found >= 0:
                stop = found + 1
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are ids 0 to 255; then pad 256, bos 257, eos 258."""

    name = "bytes"
    file_name = ""
    model = b""
    vocab_size = 259
    pad_id, bos_id, eos_id = 256, 257, 258
    start_ids, stop_ids, used_vocab_size = (bos_id,), (eos_id,), vocab_size
    fingerprint = hashlib.sha256(b"bytes:" + _RULES.encode()).hexdigest()
    special_ids = MappingProxyType({"<pad>": pad_id, "<bos>": bos_id, "<eos>": eos_id})
    _bytes = (*(bytes([byte]) for byte in range(256)), b"", b"", b"")

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
