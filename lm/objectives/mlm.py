"""Masked language modelling (BERT, arXiv:1810.04805): hidden tokens are predicted in place."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.fields import check_values, field
from lm.data.rows import RowLayout, Rows
from lm.objectives import ModelInterface, Objective, RowGenerator, mask_field, mask_id
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Batch, HostBatch, Tokens

_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # inside a UTF-8 character


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = field(0.15, "Probability that a token, or a word, is predicted.", gt=0, lt=1)
    mask_fraction: float = field(
        0.8, "Of the predicted tokens, those that the mask token hides.", ge=0, le=1
    )
    random_fraction: float = field(
        0.1,
        "Of the predicted tokens, those that a random token replaces; the rest stay.",
        ge=0,
        le=1,
    )
    whole_word: bool = field(False, "Predict all tokens of a word or none.")
    mask_id: int | None = mask_field()


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the masked-LM objective, for encoders.

    Targets are the tokens themselves, weights 1 where they are predicted. Tokens (or words) are
    chosen independently of each other, so that their number varies; special tokens, eos among them,
    are never chosen, nor do they replace others.

        ids      a b c d e .      inputs   a ? c d x .      (`?` is the mask token, `.` eos)
                                  weights  0 1 0 0 1 0
    """
    if interface.is_causal or interface.encoder_length is not None:
        raise ValueError(
            "config.objective.name=mlm needs a model whose tokens see each other: "
            "config.model.name=encoder"
        )
    check_values(config, "config.objective")
    hide, swap = config.mask_fraction, config.random_fraction
    if hide + swap > 1:
        raise ValueError(
            f"config.objective.mask_fraction ({hide}) + random_fraction ({swap}) must be at most 1"
        )
    mask = mask_id(config.mask_id, tokenizer, interface)
    special = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, mask]
    is_special = np.zeros(max(tokenizer.vocab_size, mask + 1), bool)
    is_special[[*special, *tokenizer.special_ids.values()]] = True
    ordinary = np.flatnonzero(~is_special[: tokenizer.vocab_size]).astype(np.int32)
    continues_word = WordContinuation(tokenizer) if config.whole_word else None

    def mlm(rows: Rows, rng: RowGenerator) -> HostBatch:
        shape = rows.ids.shape
        draws = np.stack([rng(i).random((3, shape[1])) for i in range(shape[0])], 1)
        choice, action, other = draws.reshape(3, *shape)
        if continues_word is not None:
            choice = _of_first(choice, continues_word(rows.ids) & (rows.positions > 0))
        chosen = (choice < config.rate) & (rows.segments != 0) & ~is_special[rows.ids]
        replaced = ordinary[(other * len(ordinary)).astype(np.int64)]
        new = np.where(action < hide, np.int32(mask), replaced)
        inputs = np.where(chosen & (action < hide + swap), new, rows.ids)
        return Batch(
            inputs=Tokens(inputs, rows.segments, rows.positions),
            targets=rows.ids,
            weights=chosen.astype(np.float32),
        )

    return Objective(mlm, RowLayout((interface.length,)))


def _of_first(values: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """Return [B, T]: the value of the first token of each word, at all tokens of the word."""
    columns = np.arange(values.shape[1])
    first = np.maximum.accumulate(np.where(continues, 0, columns), axis=1)
    return np.take_along_axis(values, first, 1)


class WordContinuation:
    """The tokens that continue the word of the token before them, by the bytes of the tokens.

    A word is a run of letters, digits and `_`; a token that begins with any other character, or
    with one above U+2000 (Chinese, say), begins a word. A byte inside a UTF-8 character continues
    the word.
    """

    def __init__(self, tokenizer: Tokenizer):
        first, last = np.zeros((2, tokenizer.vocab_size), np.uint8)
        for i in range(tokenizer.vocab_size):
            if text := tokenizer.decode_bytes([i]):
                # of the last character the first byte, if it is there
                first[i], last[i] = text[0], (text.rstrip(_CONTINUATION_BYTES) or text)[-1]
        is_letter = np.array([chr(b).isalnum() or b == ord("_") for b in range(128)] + [True] * 128)
        is_letter[0xE2:] = False  # begins a character of three bytes or more
        self._is_inside = np.isin(first, list(_CONTINUATION_BYTES))
        self._begins_with_letter, self._ends_with_letter = is_letter[first], is_letter[last]

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Return bool [B, T]: True where a token continues the word of the one before it."""
        result = np.zeros(ids.shape, bool)
        result[:, 1:] = self._begins_with_letter[ids[:, 1:]] & self._ends_with_letter[ids[:, :-1]]
        return result | self._is_inside[ids]
