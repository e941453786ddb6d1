"""Special tokens as the published files beside a tokenizer declare them.

tokenizer_config.json    their names, and whether a text begins with bos
generation_config.json   their ids, and those that end a reply: often several
config.json              the same, of the model; and the token that a decoder starts with
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm.storage.epaths import StoragePath

TOKENIZER_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclasses.dataclass(frozen=True)
class DeclaredTokens:
    """The contents of those files: {} of one that is missing."""

    tokenizer: Mapping[str, object] = dataclasses.field(default_factory=dict)
    generation: Mapping[str, object] = dataclasses.field(default_factory=dict)
    model: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Return the ids of `key` in generation_config.json, else config.json; null, -1 and ids
        outside the vocabulary count as unset.
        """
        for tree in (self.generation, self.model):
            value = tree.get(key)
            found = value if isinstance(value, list) else [value]
            if ids := [i for i in found if isinstance(i, int) and 0 <= i < vocab_size]:
                return tuple(ids)
        return ()

    def choose(
        self,
        vocab: Mapping[str, int],
        vocab_size: int,
        own: Mapping[str, int],
        usual: Mapping[str, int] = MappingProxyType({}),
    ) -> tuple[int, int, int]:
        """Return (bos, eos, pad) of a vocabulary {token: id}; eos is -1 where nothing declares it.

        By name, else `own` (declared by the tokenizer's own file), else by id, else `usual`; -1 in
        `own` and `usual` is unset. An encoder-decoder's bos is the decoder's start token. pad
        stands in for a missing bos, eos for a missing pad.
        """

        def one(kind: str, *keys: str) -> int:
            for value in map(self.tokenizer.get, keys):
                name = value.get("content") if isinstance(value, dict) else value
                if isinstance(name, str) and name in vocab:
                    return vocab[name]
            if own.get(kind, -1) >= 0:
                return own[kind]
            declared = self.ids(f"{kind}_token_id", vocab_size)
            return declared[0] if declared else usual.get(kind, -1)

        eos = one("eos", "eos_token", "sep_token")
        pad = one("pad", "pad_token")
        bos = one("bos", "bos_token", "cls_token")
        starts = self.ids("decoder_start_token_id", vocab_size)
        if self.is_encoder_decoder and starts:
            bos = starts[0]
        pad = pad if pad >= 0 else eos
        return bos if bos >= 0 else pad, eos, pad

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.get("is_encoder_decoder"))

    @property
    def begins_with_bos(self) -> bool | None:
        """True if a text begins with bos; None: the files don't say."""
        if self.is_encoder_decoder:
            return True
        if (given := self.tokenizer.get("add_bos_token")) is not None:
            return bool(given)
        return False if self.tokenizer.get("bos_token", "") is None else None


NO_DECLARATIONS = DeclaredTokens()


def read(folder: StoragePath) -> DeclaredTokens:
    """Return the declarations of the files in `folder`.

    Raises:
        ValueError: a file is no JSON object.
    """
    model = _read(folder / MODEL_FILE)
    if not is_published(model):  # of a run
        model = {}
    if isinstance(inner := model.get("text_config"), dict):
        model = {**inner, **model}
    return DeclaredTokens(_read(folder / TOKENIZER_FILE), _read(folder / GENERATION_FILE), model)


def is_published(tree: Mapping[str, object]) -> bool:
    """True if a config.json is that of a published model, and not of a run."""
    return isinstance(tree.get("model_type"), str)


def _read(file: StoragePath) -> dict[str, object]:
    if not file.exists():
        return {}
    try:
        tree = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} must hold an object, and holds a {type(tree).__name__}")
    return tree
