"""Classification as language modelling: the label of a text is one token, which is predicted."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.schema import field
from lm.data import streams
from lm.data.sources import Rows
from lm.data.streams import Stream
from lm.data.tokenizer import Tokenizer
from lm.objectives import ModelInterface, Objective, RowGenerator, mask_id
from lm.objectives.seq2seq import pair_layout
from lm.types import Batch, Tokens


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


def build(config: Config, tokenizer: Tokenizer, form: ModelInterface) -> Objective:
    """Returns the objective that predicts one token for every text; nothing else is scored.

    `L` is the label, `.` eos, `^` bos and `?` the mask token:

        decoder             inputs  ^ a b .    targets  a b . L    weights  0 0 0 1
        encoder, decoder    encoder a b .      inputs   ^          targets  L
        encoder             inputs  ^ ? a b .  targets  ^ L a b .  weights  0 1 0 0 0
    """
    verbalizers = label_tokens(config, tokenizer)
    names = _padded([tokenizer.encode(label) for label in config.labels], tokenizer.eos_id)
    bos = tokenizer.bos_id
    is_encoder = not form.is_causal and form.encoder_length is None
    mask = mask_id(config.mask_id, tokenizer, form) if is_encoder else None

    def classification(rows: Rows, rng: RowGenerator) -> Batch:
        del rng  # nothing is random
        source = streams.flatten(rows, 0)
        names_read = streams.flatten(rows, 1)
        label = names_read.keep(names_read.is_segment_start())
        label = label._replace(ids=verbalizers[_classes(names_read, names, config, tokenizer)])
        if mask is not None:
            return _at_mask(source, label, rows.ids.shape, bos, mask)
        return streams.conditional(
            source,
            label,
            batch_size=len(rows.ids),
            length=form.length,
            encoder_length=form.encoder_length,
            bos=bos,
            bidirectional=False,
        )

    return Objective(classification, pair_layout(config.fields, form))


def label_tokens(config: Config, tokenizer: Tokenizer) -> np.ndarray:
    """Returns int32 [classes]: the token that stands for each label.

    Raises ValueError where there are fewer than two labels, or a text is not one token, or two
    labels have the same.
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


def _padded(tokens: list[np.ndarray], eos: int) -> np.ndarray:
    """Returns int32 [classes, longest + 1]: each row's tokens and eos, then -1."""
    result = np.full((len(tokens), max(map(len, tokens)) + 1), -1, np.int32)
    for row, ids in zip(result, tokens, strict=True):
        row[: len(ids)], row[len(ids)] = ids, eos
    return result


def _classes(read: Stream, names: np.ndarray, config: Config, tokenizer: Tokenizer) -> np.ndarray:
    """Returns int64 [segments]: which of the rows of `names` stands in each segment."""
    firsts = np.flatnonzero(read.is_segment_start())
    lengths = np.diff(np.append(firsts, len(read.ids)))
    columns = np.arange(names.shape[1])
    places = np.minimum(firsts[:, None] + columns, max(len(read.ids) - 1, 0))
    found = np.where(columns < lengths[:, None], read.ids[places], -1)
    equal = (found[:, None] == names).all(2) & (lengths <= names.shape[1])[:, None]
    if not equal.any(1).all():
        first = int(np.flatnonzero(~equal.any(1))[0])
        ids = read.ids[firsts[first] : firsts[first] + lengths[first]]
        raise ValueError(
            f"a document has the label {tokenizer.decode(ids)!r}, which is not in "
            f"config.objective.labels: {', '.join(config.labels)}"
        )
    return equal.argmax(1)


def _at_mask(source: Stream, label: Stream, shape: tuple[int, int], bos: int, mask: int) -> Batch:
    """Returns the batch of an encoder, which predicts the label at a mask token after bos."""
    head = Stream(*(np.repeat(part, 2) for part in label))
    is_label = np.arange(len(head.ids)) % 2 == 1
    inputs, _ = streams.join(head._replace(ids=np.where(is_label, mask, bos)), source)
    targets, _ = streams.join(head._replace(ids=np.where(is_label, head.ids, bos)), source)
    scored, _ = streams.join(head._replace(ids=is_label), source._replace(ids=0 * source.ids))
    ids, segments, positions = streams.scatter_to_rows(inputs, shape)
    return Batch(
        inputs=Tokens(ids, segments, positions),
        targets=streams.scatter_to_rows(targets, shape)[0],
        weights=streams.scatter_to_rows(scored, shape)[0].astype(np.float32),
    )
