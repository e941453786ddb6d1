"""Special tokens as the published files beside a tokenizer declare them.

A tokenizer.json does not say which of its tokens begins a text, ends it or pads it; these do:

    tokenizer_config.json    their names, and whether a text begins with bos
    generation_config.json   their ids, and those that end a reply: often several
    config.json              the same, of the model; and the token that a decoder starts with
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

TOKENIZER_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
MODEL_FILE = "config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclasses.dataclass(frozen=True)
class DeclaredTokens:
    """The contents of those files: {} of one that is not there."""

    tokenizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def named(self, vocab: Mapping[str, int], *keys: str) -> int | None:
        """The id of the token under the first of `keys` that names one of `vocab`."""
        for key in keys:
            value = self.tokenizer.get(key)
            name = value.get("content") if isinstance(value, dict) else value
            if name and name in vocab:
                return vocab[name]
        return None

    def ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """The ids of a key that generation_config.json, else config.json, gives; null, -1 and what
        is no id of the vocabulary are unset.
        """
        for tree in (self.generation, self.model):
            value = tree.get(key)
            found = value if isinstance(value, list) else [value]
            if ids := [i for i in found if isinstance(i, int) and 0 <= i < vocab_size]:
                return tuple(ids)
        return ()

    def first(self, key: str, vocab_size: int) -> int | None:
        """The first of `ids`."""
        return next(iter(self.ids(key, vocab_size)), None)

    def choose(
        self,
        vocab: Mapping[str, int],
        vocab_size: int,
        own: Mapping[str, int],
        usual: Mapping[str, int] = MappingProxyType({}),
    ) -> tuple[int, int, int]:
        """(bos, eos, pad) of a vocabulary {token: id}; eos is -1 where nothing says it.

        By name, else `own`: those that the tokenizer's file says itself, else by id, else `usual`.
        An encoder-decoder's bos is what its decoder starts with. What is missing is -1 in `own`
        and `usual`; pad takes the place of a missing bos, eos that of pad.
        """

        def one(kind: str, *names: str) -> int:
            named = self.named(vocab, *names)
            if named is not None:
                return named
            if own.get(kind, -1) >= 0:
                return own[kind]
            declared = self.first(f"{kind}_token_id", vocab_size)
            return usual.get(kind, -1) if declared is None else declared

        eos = one("eos", "eos_token", "sep_token")
        pad = one("pad", "pad_token")
        bos = one("bos", "bos_token", "cls_token")
        start = self.first("decoder_start_token_id", vocab_size)
        if self.is_encoder_decoder and start is not None:
            bos = start
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


def read(folder: Any) -> DeclaredTokens:
    """Declarations of the files in `folder` (an epath.Path).

    Raises:
        ValueError: a file is no JSON object.
    """
    model = _read(folder / MODEL_FILE)
    if not is_published(model):  # of a run
        model = {}
    model = {**(model.get("text_config") or {}), **model}
    return DeclaredTokens(_read(folder / TOKENIZER_FILE), _read(folder / GENERATION_FILE), model)


def is_published(tree: Mapping[str, Any]) -> bool:
    """True if a config.json is that of a published model, and not of a run."""
    return isinstance(tree.get("model_type"), str)


def _read(file: Any) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        tree = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} must hold an object, and holds a {type(tree).__name__}")
    return tree
