"""Classification as language modelling: the label of a text is one token, which is predicted."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.fields import field
from lm.data import streams
from lm.data.rows import Rows
from lm.data.streams import Stream
from lm.objectives import ModelInterface, Objective, RowGenerator, conditional_batch, mask_id
from lm.objectives.seq2seq import pair_layout
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Batch, HostBatch, Tokens


@dataclasses.dataclass(frozen=True)
class Config:
    fields: tuple[str, str] = field(
        ("source", "target"), "Fields of the stores: the text, and the name of its class."
    )
    labels: tuple[str, ...] = field((), "The classes, as the stores spell them.")
    verbalizers: tuple[str, ...] = field(
        (), "What is predicted for each class, one token each; empty: the labels themselves."
    )
    mask_id: int | None = field(
        None,
        "Encoders: where the label is predicted; unset: the tokenizer's, else a spare id.",
        ge=0,
    )


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the objective that predicts one token for every text; nothing else is scored.

    `L` is the label, `.` eos, `^` bos and `?` the mask token:

        decoder             inputs  ^ a b .    targets  a b . L    weights  0 0 0 1
        encoder, decoder    encoder a b .      inputs   ^          targets  L
        encoder             inputs  ^ ? a b .  targets  ^ L a b .  weights  0 1 0 0 0

    Raises ValueError, of a batch too, where a document has a label that the config does not name.
    """
    verbalizers = label_tokens(config, tokenizer)
    names = [np.append(tokenizer.encode(label), tokenizer.eos_id) for label in config.labels]
    numbers = {name.astype(np.int32).tobytes(): i for i, name in enumerate(names)}
    is_encoder = not interface.is_causal and interface.encoder_length is None
    mask = mask_id(config.mask_id, tokenizer, interface) if is_encoder else None

    def classes(labels: Stream) -> list[int]:
        found = np.split(labels.ids, np.flatnonzero(labels.is_segment_start()))[1:]
        if unknown := [ids for ids in found if ids.tobytes() not in numbers]:
            raise ValueError(
                f"a document has the label {tokenizer.decode(unknown[0])!r}, which is not in "
                f"config.objective.labels: {', '.join(config.labels)}"
            )
        return [numbers[ids.tobytes()] for ids in found]

    def classification(rows: Rows, rng: RowGenerator) -> HostBatch:
        source, labels = streams.flatten(rows, 0), streams.flatten(rows, 1)
        label = labels.keep(labels.is_segment_start())
        label = label._replace(ids=verbalizers[np.array(classes(labels), np.int64)])
        if mask is not None:
            return _label_at_mask(source, label, rows.ids.shape, tokenizer.bos_id, mask)
        return conditional_batch(source, label, len(rows.ids), interface, tokenizer)

    return Objective(classification, pair_layout(config.fields, interface))


def label_tokens(config: Config, tokenizer: Tokenizer) -> np.ndarray:
    """Return int32 [classes], the token of each label; ValueError where there are fewer than two
    labels, a text is not one token, or two labels have the same token.
    """
    if len(config.labels) < 2 or len(set(config.labels)) < len(config.labels):
        raise ValueError(
            f"config.objective.labels must name two classes or more, each once: {config.labels}"
        )
    texts = config.verbalizers or config.labels
    if len(texts) != len(config.labels):
        raise ValueError(
            f"config.objective.verbalizers ({len(texts)}) must be as many as labels "
            f"({len(config.labels)})"
        )
    tokens = [tokenizer.encode(text) for text in texts]
    long = [f"{t!r} ({len(ids)})" for t, ids in zip(texts, tokens, strict=True) if len(ids) != 1]
    if long:
        raise ValueError(
            f"with tokenizer {tokenizer.name} these labels are not one token: {', '.join(long)}; "
            "give config.objective.verbalizers that are, such as letters"
        )
    result = np.concatenate(tokens).astype(np.int32)
    if len(set(result.tolist())) < len(result):
        raise ValueError(f"labels share a token: {dict(zip(texts, result.tolist(), strict=True))}")
    return result


def _label_at_mask(
    source: Stream, label: Stream, shape: tuple[int, int], bos: int, mask: int
) -> HostBatch:
    """Return the batch of an encoder, which predicts the label at a mask token after bos."""
    first = source.is_segment_start()
    labels = np.zeros(len(first), np.int32)
    labels[first] = label.ids

    def with_head(token: np.ndarray | int) -> list[np.ndarray]:
        stream = streams.with_inserted(source, first, token)
        stream = streams.with_inserted(stream, stream.is_segment_start(), bos)
        return streams.scatter_to_rows(stream, shape)

    ids, segments, positions = with_head(mask)
    return Batch(
        inputs=Tokens(ids, segments, positions),
        targets=with_head(labels)[0],
        weights=(positions == 1).astype(np.float32),
    )
