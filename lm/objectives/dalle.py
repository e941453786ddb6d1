"""Pictures from captions, as the codes of a VQ-VAE after text tokens (DALL-E, arXiv:2102.12092).

One vocabulary has the ids of text first and the codes last. A decoder reads captions and codes as
one stream; an encoder-decoder reads the caption in its encoder, and the decoder has the codes alone
(DALL-E mini). Each half of a row has a softmax over its own ids.

A caption ends where the codes begin, and what it leaves of its columns is padding on the left:

    inputs     0  0  ^  a  b  .  7  4  9       (`.` is eos, `^` bos)
    targets    0  0  a  b  .  7  4  9  2
    positions  0  0  0  1  2  5  6  7  8

So codes have the same columns and positions in every row: a learned position is one of the grid.
The paper fills the gap with a padding token for each position; segment 0 says the same without
attention to it, and without computing more than a mask.

The unit of all sums is the picture. Its loss is the mean over its caption's tokens times
`text_weight`, plus the mean over its codes times the rest, 1/8 and 7/8 as published.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.fields import field
from lm.data import streams
from lm.data.rows import RowLayout, Rows
from lm.objectives import ModelInterface, Objective, RowGenerator
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Batch, HostBatch, Tokens, VocabularyPart

FIELDS = ("text", "codes")  # of stores, as scripts/encode_pictures.py writes them


@dataclasses.dataclass(frozen=True)
class Config:
    grid_size: int = field(
        8,
        "Height and width of the grid of codes. Its square is data.length with an encoder; without "
        "one, captions have the rest of data.length.",
        ge=1,
    )
    num_codes: int = field(
        512, "Codes of the VQ-VAE: the last ids of config.model.vocab_size.", ge=2
    )
    text_weight: float = field(
        0.125, "Without an encoder: share of captions in the loss; codes have the rest.", ge=0, lt=1
    )
    caption_dropout: float = field(
        0.0, "Share of the rows in training whose caption is left empty, for guidance.", ge=0, lt=1
    )

    @property
    def codes_per_picture(self) -> int:
        return self.grid_size**2


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the objective of stores with captions and codes."""
    interface.require_decoder("dalle")
    count, first = config.codes_per_picture, first_code(config, tokenizer, interface)
    text_length = caption_length(config, interface)
    has_encoder = interface.encoder_length is not None

    def batch_of(rows: Rows, is_empty: np.ndarray) -> HostBatch:
        """is_empty: bool [B], captions that are left out."""
        text, codes = np.split(rows.ids, [text_length], axis=1)
        held, there = np.split(rows.segments != 0, [text_length], axis=1)
        _check_codes(config, codes, rows.segments[:, text_length:])
        if is_empty.any():  # its eos alone
            one = np.arange(text_length) == 0
            text = np.where(is_empty[:, None], tokenizer.eos_id * one, text)
            held = np.where(is_empty[:, None], one, held)
            held = held & there[:, :1]
        ids, weights = (codes + first) * there, there.astype(np.float32) / count
        segments, columns = there.astype(np.int32), np.arange(count, dtype=np.int32)
        positions = columns * segments
        encoder = None
        if has_encoder:
            of_text = held.astype(np.int32)
            encoder = Tokens(
                (text * held).astype(np.int32),
                of_text,
                np.arange(text_length, dtype=np.int32) * of_text,
            )
        else:
            lengths = held.sum(1)[:, None]
            column = np.arange(text_length) - (text_length - lengths)  # of the caption
            held = column >= 0
            column = np.maximum(column, 0).astype(np.int32)
            text = np.take_along_axis(text, column, axis=1) * held
            scored = held & ~is_empty[:, None]
            of_text = config.text_weight * scored / np.maximum(lengths, 1)
            ids = np.concatenate([text, ids], axis=1)
            weights = np.concatenate([of_text, (1 - config.text_weight) * weights], axis=1)
            positions = np.concatenate([column, text_length * segments + positions], axis=1)
            segments = np.concatenate([held, there], axis=1).astype(np.int32)
        ids = ids.astype(np.int32)
        inputs = streams.shift_right(ids, segments, positions, tokenizer.bos_id)
        return Batch(
            inputs=Tokens(inputs, segments, positions),
            targets=ids,
            weights=weights.astype(np.float32),
            encoder=encoder,
        )

    def training(rows: Rows, rng: RowGenerator) -> HostBatch:
        is_empty = np.zeros(len(rows.ids), bool)
        if config.caption_dropout:
            draws = (rng(i).random() for i in range(len(is_empty)))
            is_empty = np.fromiter(draws, float) < config.caption_dropout
        return batch_of(rows, is_empty)

    def evaluation(rows: Rows, rng: RowGenerator) -> HostBatch:
        return batch_of(rows, np.zeros(len(rows.ids), bool))

    begin = 0 if has_encoder else text_length
    parts = [VocabularyPart("codes", (begin, begin + count), (first, first + config.num_codes))]
    if begin and config.text_weight:
        parts.insert(0, VocabularyPart("text", (0, begin), (0, first)))
    return Objective(
        training,
        RowLayout((text_length, count), FIELDS),
        parts=tuple(parts),
        make_evaluation=evaluation,
    )


def caption_length(config: Config, interface: ModelInterface) -> int:
    """Return the most tokens of a caption, its eos included.

    Raises ValueError where the lengths of the data don't fit the grid.
    """
    count = config.codes_per_picture
    grid = f"config.objective.grid_size ({config.grid_size}) squared ({count})"
    if interface.encoder_length is not None:
        if interface.length != count:
            raise ValueError(
                f"config.data.length ({interface.length}) must be {grid} with an encoder: the "
                "decoder has the codes alone"
            )
        return interface.encoder_length
    if interface.length <= count:
        raise ValueError(
            f"config.data.length ({interface.length}) must be more than {grid}, by the tokens of a "
            "caption"
        )
    return interface.length - count


def first_code(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> int:
    """Return the id of code 0; ValueError where codes don't fit beside the ids of text."""
    first = interface.num_ids(tokenizer) - config.num_codes
    if first < tokenizer.used_vocab_size:
        raise ValueError(
            f"config.model.vocab_size ({interface.num_ids(tokenizer)}) must be at least the "
            f"tokenizer's ({tokenizer.used_vocab_size}) + config.objective.num_codes "
            f"({config.num_codes}) = {tokenizer.used_vocab_size + config.num_codes}"
        )
    return first


def _check_codes(config: Config, codes: np.ndarray, segments: np.ndarray) -> None:
    """Raise ValueError unless each row has the codes of one picture, or none."""
    if codes.size and codes.max() >= config.num_codes:
        raise ValueError(
            f"the data has code {codes.max()}: config.objective.num_codes ({config.num_codes}) "
            "must be that of the VQ-VAE that made its codes (manifest.json of the store)"
        )
    if (segments != segments[:, :1]).any() or (segments > 1).any():
        raise ValueError(
            f"a picture of the data has not the {config.codes_per_picture} codes of "
            f"config.objective.grid_size ({config.grid_size}): make it the grid_size in "
            "manifest.json of the store"
        )
