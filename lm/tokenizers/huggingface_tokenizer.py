"""Hugging Face's `tokenizer.json` files as tokenizers."""

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lm.tokenizers.special_tokens import NO_DECLARATIONS, DeclaredTokens
from lm.tokenizers.tokenizer import LONG_TEXT, Tokenizer, fingerprint

if TYPE_CHECKING:
    import tokenizers

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None

# names of special tokens, where no file beside the tokenizer declares them
_USUAL = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[CLS]"),
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>"),
}


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, through the `tokenizers` library.

    Bytes are exact for byte-level BPE (GPT-2, Llama 3, Qwen) and for pieces with U+2581 and byte
    fallback (Llama 2, Gemma). WordPiece (BERT) and WordLevel files have no spaces left to decode:
    their words are joined by spaces. Special tokens are those that the files beside it declare,
    else those of the usual names; pad stands in for a missing bos, eos for a missing pad.
    """

    file_name = "tokenizer.json"

    def __init__(self, name: str, model: bytes, declared: DeclaredTokens = NO_DECLARATIONS):
        self.name, self.model = name, model
        self.fingerprint = fingerprint("huggingface", model)
        try:
            spec = self._spec = _without_dropout(json.loads(model))
            self._first = _library_tokenizer(spec)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"tokenizer {name}: not a tokenizer.json ({error})") from error
        self._rest = _library_tokenizer(_without_prefix(spec))
        for tokenizer in (self._first, self._rest):
            tokenizer.encode_special_tokens = True  # "</s>" in a document is text
        vocab = self._first.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        special = {t["content"]: t["id"] for t in spec.get("added_tokens", []) if t["special"]}
        self.special_ids = special
        usual = {
            kind: next((special[name] for name in names if name in special), -1)
            for kind, names in _USUAL.items()
        }
        chosen = declared.choose(vocab, self.vocab_size, {}, usual)
        self.bos_id, self.eos_id, self.pad_id = chosen
        if self.eos_id < 0:
            raise ValueError(
                f"tokenizer {name}: no end-of-document token: none of {', '.join(_USUAL['eos'])} "
                f"among its special tokens ({', '.join(special) or 'none'}), and no "
                "tokenizer_config.json beside it with an eos_token"
            )
        plain = self._first.encode("a", add_special_tokens=False).ids
        whole = self._first.encode("a").ids
        before = whole[: whole.index(plain[0])] if plain and plain[0] in whole else []
        self._set_ends(declared, tuple(before) or (self.bos_id,))
        texts = (i for piece, i in vocab.items() if piece not in special)
        self.used_vocab_size = 1 + max(*chosen, *self.start_ids, *self.stop_ids, *texts)
        self._adds_space = whole != self._rest.encode("a").ids
        self._bytes = _token_bytes(spec, vocab, self.vocab_size)

    def _encode(self, part: str, *, is_first: bool) -> np.ndarray:
        tokenizer = self._first if is_first else self._rest
        return np.array(tokenizer.encode(part, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        short = [text for text in texts if len(text) <= LONG_TEXT]
        encoded = iter(self._first.encode_batch_fast(short, add_special_tokens=False))
        return [
            self.encode(text) if len(text) > LONG_TEXT else np.array(next(encoded).ids, np.int32)
            for text in texts
        ]

    def encode_special(self, text: str) -> np.ndarray:
        return np.array(self._special_reader.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _special_reader(self) -> "tokenizers.Tokenizer":
        return _library_tokenizer(self._spec)


def _library_tokenizer(spec: Json) -> "tokenizers.Tokenizer":
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_dropout(spec: dict) -> dict:
    """Return `spec` without BPE-dropout, with which a text has other ids each time."""
    model = spec.get("model") if isinstance(spec, dict) else None
    return {**spec, "model": {**model, "dropout": None}} if isinstance(model, dict) else spec


def _without_prefix(spec: Json) -> Json:
    """Return `spec` without the space before a text: for all parts of a text but the first."""
    if isinstance(spec, list):
        kept = [_without_prefix(item) for item in spec]
        return [
            new for new, item in zip(kept, spec, strict=True) if new is not None or item is None
        ]
    if not isinstance(spec, dict):
        return spec
    if spec.get("type") == "Prepend":
        return None
    never = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {key: never.get(key, _without_prefix(value)) for key, value in spec.items()}


def _token_bytes(spec: dict, vocab: dict[str, int], vocab_size: int) -> list[bytes]:
    """Return the bytes of every id; b"" of special ids and of unused ones."""
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
    """Return the byte of each character of the byte-level alphabet (openai/gpt-2, encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
