"""Tokenizers: bytes, SentencePiece and Hugging Face `tokenizer.json` behind one protocol.

What all of them promise, because a token store counts bytes per token and generation prints bytes:

- `encode` adds no special tokens and never makes one out of the text: "</s>" in a document stays
  text. `encode_special` is for what a program wrote, chat templates: there it is the token.
- `decode_bytes` is additive: the bytes of `a + b` are those of `a` followed by those of `b`, so a
  stream can be printed token by token. Special ids decode to nothing.
- A text of more than `LONG_TEXT` characters is encoded in pieces, cut after the last newline (else
  after the last space, else anywhere) of each `LONG_TEXT` characters: time and memory stay linear
  for a document of 100 MB on one line. No character is lost; only a token that would span a cut
  comes out as two.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np

from lm import storage
from lm.data import special_tokens
from lm.data.special_tokens import NO_DECLARATIONS, DeclaredTokens

LONG_TEXT = 1 << 18
_RULES = "1"  # part of every fingerprint: to be raised when a change below changes ids


class Tokenizer(Protocol):
    """Text to ids and back. `name` is what `load` was given, `model` the bytes of that file.

    special_ids: the tokens that no text becomes, by name.
    """

    name: str
    file_name: str
    model: bytes
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str
    start_ids: tuple[int, ...]  # that a text begins with where it is generated or scored
    stop_ids: tuple[int, ...]  # any of which ends a continuation
    used_vocab_size: int  # ids from here on are of special tokens that nothing uses

    @property
    def special_ids(self) -> Mapping[str, int]:
        """How special tokens are written, and their ids."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32, without special tokens."""
        ...

    def encode_special(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, the names in `special` read as those tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of each text, on one thread."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ...

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the exact bytes of `ids`, which may begin or end inside a character."""
        ...


def load(name: str) -> Tokenizer:
    """Returns the tokenizer `name`: "bytes", or the path of a `.model` or `tokenizer.json` file.

    Paths may be local (`~` is the home folder) or `gs://`. Raises ValueError for anything else.
    """
    if name == "bytes":
        return ByteTokenizer()
    if not name.endswith((".model", ".json")):
        raise ValueError(
            f'tokenizer {name!r} is neither "bytes" nor the path of a SentencePiece .model or of a '
            "Hugging Face tokenizer.json"
        )
    from etils import epath  # costs 0.1 s: only where a file is read

    name = storage.expand(name, "tokenizer")
    path = epath.Path(name)
    if path.is_dir():
        raise ValueError(f"tokenizer {name} is a folder: name the file in it")
    if not path.is_file():
        raise ValueError(
            f"tokenizer {name}: no such file; scripts/train_tokenizer.py makes one, and "
            "`make pretrain` one with its token stores"
        )
    return from_bytes(name, path.read_bytes(), special_tokens.read(path.parent))


def from_bytes(name: str, model: bytes, declared: DeclaredTokens = NO_DECLARATIONS) -> Tokenizer:
    """Returns the tokenizer whose file `name` has the content `model` ("bytes" has no file).

    declared: what the files beside it say of its special tokens.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name.endswith(".model"):
        return SentencePieceTokenizer(name, model, declared)
    return HuggingFaceTokenizer(name, model, declared)


def split_long_text(text: str, *, limit: int = LONG_TEXT) -> Iterator[str]:
    """Yields `text` in pieces of at most `limit` characters; a short text is one piece."""
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


class ByteTokenizer:
    """UTF-8 bytes are ids 0 to 255; then pad 256, bos 257, eos 258."""

    name = "bytes"
    file_name = ""
    model = b""
    vocab_size = 259
    pad_id, bos_id, eos_id = 256, 257, 258
    start_ids, stop_ids, used_vocab_size = (bos_id,), (eos_id,), vocab_size
    fingerprint = hashlib.sha256(b"bytes:" + _RULES.encode()).hexdigest()
    special_ids = MappingProxyType({"<pad>": pad_id, "<bos>": bos_id, "<eos>": eos_id})

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_special(self, text: str) -> np.ndarray:
        return _encode_special(self, text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = np.asarray(ids, np.int64)
        _check_range(self, ids)
        return ids[ids < 256].astype(np.uint8).tobytes()


class SentencePieceTokenizer:
    """A SentencePiece model: normalisation and dummy prefix as the model file says.

    SentencePiece writes a space as U+2581, so a U+2581 in the text would come back as a space.
    Where the model has byte pieces it is encoded as its three bytes instead, which makes models
    with identity normalisation (those of scripts/train_tokenizer.py) lossless for every text.
    Special tokens are those that the files beside the model name, else the model's own, else those
    of which those files give the ids; pad takes the place of a missing bos, eos that of pad.
    """

    file_name = "tokenizer.model"

    def __init__(self, name: str, model: bytes, declared: DeclaredTokens = NO_DECLARATIONS):
        import sentencepiece

        self.name = name
        self.model = model
        self.fingerprint = hashlib.sha256(
            b"sentencepiece:" + _RULES.encode() + b":" + model
        ).hexdigest()
        try:
            self._first = sentencepiece.SentencePieceProcessor(model_proto=model)
            # Protocol buffers merge when joined: normalizer_spec.add_dummy_prefix becomes false.
            self._rest = sentencepiece.SentencePieceProcessor(
                model_proto=model + b"\x1a\x02\x18\x00"
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"tokenizer {name}: not a SentencePiece model") from error
        processor = self._first
        self.vocab_size = processor.get_piece_size()
        self.used_vocab_size = self.vocab_size
        vocab = {processor.id_to_piece(i): i for i in range(self.vocab_size)}
        own = {n: getattr(processor, f"{n}_id")() for n in ("bos", "eos", "pad")}
        self.bos_id, self.eos_id, self.pad_id = declared.choose(vocab, self.vocab_size, own)
        if self.eos_id < 0:
            raise ValueError(f"tokenizer {name}: the model has no eos piece to end documents with")
        self.start_ids, self.stop_ids = _ends(self, declared, (self.bos_id,))
        self.special_ids = {
            processor.id_to_piece(i): i for i in range(self.vocab_size) if processor.is_control(i)
        }
        self._has_prefix = self._first.encode("a") != self._rest.encode("a")
        self._bytes = [_sentencepiece_bytes(processor, i) for i in range(self.vocab_size)]
        byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        self._escape = None
        if all(processor.is_byte(i) for i in byte_ids):
            self._escape = np.array(byte_ids, np.int32)

    def encode(self, text: str) -> np.ndarray:
        if len(text) <= LONG_TEXT and "\u2581" not in text:
            return self._first.encode_as_numpy(text)
        parts, processor = [], self._first
        for piece in split_long_text(text):
            split = [piece] if self._escape is None else piece.split("\u2581")
            for i, part in enumerate(split):
                if i:
                    parts.append(self._escape)
                parts.append(processor.encode_as_numpy(part))
                processor = self._rest
        return np.concatenate(parts)

    def encode_special(self, text: str) -> np.ndarray:
        return _encode_special(self, text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = self.decode_bytes(ids).decode(errors="replace")
        return text[1:] if self._has_prefix and text.startswith(" ") else text

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = np.asarray(ids, np.int64)
        _check_range(self, ids)
        return b"".join([self._bytes[i] for i in ids])


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`, through the `tokenizers` library.

    Bytes are exact for byte-level BPE (GPT-2, Llama 3, Qwen) and for pieces with U+2581 and byte
    fallback (Llama 2, Gemma). WordPiece (BERT) and WordLevel files have no spaces left to decode:
    their words are joined by spaces. Special tokens are those that the files beside it declare,
    else those of the usual names; pad takes the place of a missing bos, eos that of pad.
    """

    file_name = "tokenizer.json"

    def __init__(self, name: str, model: bytes, declared: DeclaredTokens = NO_DECLARATIONS):
        import tokenizers

        self.name = name
        self.model = model
        self.fingerprint = hashlib.sha256(
            b"huggingface:" + _RULES.encode() + b":" + model
        ).hexdigest()
        try:
            spec = self._spec = _without_dropout(json.loads(model))
            self._first = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"tokenizer {name}: not a tokenizer.json ({error})") from error
        self._rest = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(spec)))
        for tokenizer in (self._first, self._rest):
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True  # "</s>" in a document is text
        vocab = self._first.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        special = {t["content"]: t["id"] for t in spec.get("added_tokens", []) if t["special"]}
        self.special_ids = special
        usual = {
            kind: next((special[name] for name in names if name in special), -1)
            for kind, names in (("bos", _BOS), ("eos", _EOS), ("pad", _PAD))
        }
        chosen = declared.choose(vocab, self.vocab_size, {}, usual)
        self.bos_id, self.eos_id, self.pad_id = chosen
        if self.eos_id < 0:
            raise ValueError(
                f"tokenizer {name}: no end-of-document token: none of {', '.join(_EOS)} among "
                f"its special tokens ({', '.join(special) or 'none'}), and no "
                "tokenizer_config.json beside it with an eos_token"
            )
        plain = self._first.encode("a", add_special_tokens=False).ids
        whole = self._first.encode("a").ids
        before = whole[: whole.index(plain[0])] if plain and plain[0] in whole else []
        self.start_ids, self.stop_ids = _ends(self, declared, tuple(before) or (self.bos_id,))
        texts = (i for piece, i in vocab.items() if piece not in special)
        self.used_vocab_size = 1 + max(*chosen, *self.start_ids, *self.stop_ids, *texts)
        self._has_prefix = self._first.encode("a").ids != self._rest.encode("a").ids
        self._bytes = _huggingface_bytes(spec, vocab, self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        short = [text for text in texts if len(text) <= LONG_TEXT]
        encoded = iter(self._first.encode_batch_fast(short, add_special_tokens=False))
        return [
            np.array(next(encoded).ids, np.int32)
            if len(text) <= LONG_TEXT
            else self._encode_long(text)
            for text in texts
        ]

    def encode_special(self, text: str) -> np.ndarray:
        return np.array(self._special_reader.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _special_reader(self):
        import tokenizers

        reader = tokenizers.Tokenizer.from_str(json.dumps(self._spec))
        reader.no_truncation()
        reader.no_padding()
        return reader

    def _encode_long(self, text: str) -> np.ndarray:
        parts, tokenizer = [], self._first
        for piece in split_long_text(text):
            parts.append(np.array(tokenizer.encode(piece, add_special_tokens=False).ids, np.int32))
            tokenizer = self._rest
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = self.decode_bytes(ids).decode(errors="replace")
        return text[1:] if self._has_prefix and text.startswith(" ") else text

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = np.asarray(ids, np.int64)
        _check_range(self, ids)
        return b"".join([self._bytes[i] for i in ids])


_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[CLS]")
_PAD = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")


def _encode_special(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The pieces between the names of special tokens are encoded each by itself."""
    names = sorted(tokenizer.special_ids, key=len, reverse=True)  # the longest that fits
    parts = [np.zeros(0, np.int32)]
    for piece in re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]:
        if piece in tokenizer.special_ids:
            parts.append(np.array([tokenizer.special_ids[piece]], np.int32))
        elif piece:
            parts.append(tokenizer.encode(piece))
    return np.concatenate(parts)


def _check_range(tokenizer: Tokenizer, ids: np.ndarray) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise ValueError(
            f"token id {wrong} is outside the vocabulary of {tokenizer.name} "
            f"(vocab_size {tokenizer.vocab_size})"
        )


def _sentencepiece_bytes(processor, i: int) -> bytes:
    """Returns the bytes that piece `i` stands for."""
    if processor.is_control(i):
        return b""
    if processor.is_unknown(i):
        return "\ufffd".encode()
    piece = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _ends(
    tokenizer: Tokenizer, declared: DeclaredTokens, usual: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (start_ids, stop_ids); usual: those that texts begin with where no file says."""
    says = declared.begins_with_bos
    start = usual if says is None else (tokenizer.bos_id,) if says else ()
    stop = (tokenizer.eos_id, *declared.ids("eos_token_id", tokenizer.vocab_size))
    return start, tuple(dict.fromkeys(stop))


def _without_dropout(spec):
    """Returns `spec` without BPE-dropout, with which a text has other ids each time."""
    model = spec.get("model") if isinstance(spec, dict) else None
    return {**spec, "model": {**model, "dropout": None}} if isinstance(model, dict) else spec


def _without_prefix(spec):
    """Returns `spec` with no space put before a text: for all pieces but the first."""
    if isinstance(spec, list):
        return [_without_prefix(item) for item in spec if not _is_prepend(item)]
    if not isinstance(spec, dict):
        return spec
    result = {
        key: None if _is_prepend(value) else _without_prefix(value) for key, value in spec.items()
    }
    if "add_prefix_space" in spec:
        result["add_prefix_space"] = False
    if "prepend_scheme" in spec:
        result["prepend_scheme"] = "never"
    return result


def _is_prepend(item) -> bool:
    return isinstance(item, dict) and item.get("type") == "Prepend"


def _huggingface_bytes(spec: dict, vocab: dict[str, int], vocab_size: int) -> list[bytes]:
    """Returns for every id the bytes that it stands for; nothing for special ids and for holes."""
    added = {t["content"]: t["special"] for t in spec.get("added_tokens", [])}
    decoder = json.dumps(spec.get("decoder") or {})
    byte_level = byte_level_alphabet() if '"ByteLevel"' in decoder else None
    word_piece = '"WordPiece"' in decoder
    word_level = spec["model"].get("type") == "WordLevel"
    byte_fallback = bool(spec["model"].get("byte_fallback"))
    table = [b""] * vocab_size
    for piece, i in vocab.items():
        if piece in added:
            table[i] = b"" if added[piece] else piece.encode()
        elif byte_level is not None:
            table[i] = bytes(byte_level[character] for character in piece)
        elif byte_fallback and len(piece) == 6 and piece.startswith("<0x"):
            table[i] = bytes([int(piece[3:5], 16)])
        elif word_level:
            table[i] = f" {piece}".encode()
        elif word_piece:
            table[i] = piece[2:].encode() if piece.startswith("##") else f" {piece}".encode()
        else:
            table[i] = piece.replace("\u2581", " ").encode()
    return table


def byte_level_alphabet() -> dict[str, int]:
    """Returns the byte of each character of the byte-level alphabet (openai/gpt-2, encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
