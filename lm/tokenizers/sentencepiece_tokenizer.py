"""SentencePiece models as tokenizers."""

from typing import TYPE_CHECKING

import numpy as np

from lm.tokenizers.special_tokens import NO_DECLARATIONS, DeclaredTokens
from lm.tokenizers.tokenizer import Tokenizer, fingerprint

if TYPE_CHECKING:
    import sentencepiece

_SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model: normalisation and dummy prefix as the model file says.

    SentencePiece writes a space as U+2581, so a U+2581 in the text would come back as a space.
    Where the model has byte pieces it is encoded as its three bytes instead, which makes models
    with identity normalisation (those of scripts/train_tokenizer.py) lossless for every text.
    Special tokens are named by the published files beside the model, else by the model itself, else
    given by the ids in those files; pad stands in for a missing bos, eos for a missing pad.
    """

    file_name = "tokenizer.model"

    def __init__(self, name: str, model: bytes, declared: DeclaredTokens = NO_DECLARATIONS):
        import sentencepiece

        self.name, self.model = name, model
        self.fingerprint = fingerprint("sentencepiece", model)
        try:
            self._first = sentencepiece.SentencePieceProcessor(model_proto=model)
            # Protocol buffers merge when joined: normalizer_spec.add_dummy_prefix becomes false.
            self._rest = sentencepiece.SentencePieceProcessor(
                model_proto=model + b"\x1a\x02\x18\x00"
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"tokenizer {name}: not a SentencePiece model") from error
        processor = self._first
        self.vocab_size = self.used_vocab_size = processor.get_piece_size()
        vocab = {processor.id_to_piece(i): i for i in range(self.vocab_size)}
        own = {n: getattr(processor, f"{n}_id")() for n in ("bos", "eos", "pad")}
        self.bos_id, self.eos_id, self.pad_id = declared.choose(vocab, self.vocab_size, own)
        if self.eos_id < 0:
            raise ValueError(f"tokenizer {name}: the model has no eos piece to end documents with")
        self._set_ends(declared, (self.bos_id,))
        self.special_ids = {
            processor.id_to_piece(i): i for i in range(self.vocab_size) if processor.is_control(i)
        }
        self._adds_space = self._first.encode("a") != self._rest.encode("a")
        self._bytes = [_piece_bytes(processor, i) for i in range(self.vocab_size)]
        byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._escape = None
        if all(processor.is_byte(i) for i in byte_ids):
            self._escape = np.array(byte_ids, np.int32)

    def _encode(self, part: str, *, is_first: bool) -> np.ndarray:
        ids = []
        for piece in [part] if self._escape is None else part.split(_SPACE):
            if ids:
                ids.append(self._escape)
            processor = self._first if is_first and not ids else self._rest
            ids.append(processor.encode_as_numpy(piece))
        return np.concatenate(ids)


def _piece_bytes(processor: "sentencepiece.SentencePieceProcessor", i: int) -> bytes:
    """Return the bytes of piece `i`."""
    if processor.is_control(i):
        return b""
    if processor.is_unknown(i):
        return "\ufffd".encode()
    piece = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()
