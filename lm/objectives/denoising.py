"""A denoising autoencoder (BART, arXiv:1910.13461): a text is predicted from a noisy one."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.fields import check_values, field
from lm.data import streams
from lm.data.rows import RowLayout, Rows
from lm.data.streams import Stream, boundaries
from lm.objectives import (
    ModelInterface,
    Objective,
    RowGenerator,
    conditional_batch,
    mask_field,
    mask_id,
)
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import HostBatch

NOISES = ("mask", "delete", "infill", "shuffle", "rotate")
_ENDS = tuple(end.encode() for end in ".!?。！？\n")  # of a sentence


@dataclasses.dataclass(frozen=True)
class Config:
    noises: tuple[str, ...] = field(
        ("shuffle", "infill"),
        "In this order: mask tokens, delete tokens, infill (one mask for a span), shuffle "
        "sentences, rotate (begin anywhere).",
        choices=NOISES,
    )
    rate: float = field(
        0.3, "Fraction of the tokens that mask, delete and infill hide.", ge=0, lt=1
    )
    mean_span: float = field(3.0, "infill: mean of the Poisson distribution of spans.", ge=0)
    bidirectional: bool = field(
        True, "Without an encoder: the noisy text is a prefix that its segment sees whole."
    )
    mask_id: int | None = mask_field()


def build(config: Config, tokenizer: Tokenizer, interface: ModelInterface) -> Objective:
    """Return the denoising objective: the noisy text is given, every token of the text scored.

    `?` is the mask token; the eos of a document stays at its end and is never hidden:

        text     a b c . d e !     mask     a ? c . d ? !     delete   a c . d !
        infill   a ? . d e !       shuffle  d e ! a b c .     rotate   . d e ! a b c

    infill puts one mask for a span of 0 tokens or more (a Poisson number), so that a text may grow:
    what would not fit in its row is not hidden. shuffle puts sentences in a random order.
    """
    check_values(config, "config.objective")
    if not config.noises:
        raise ValueError(f"config.objective.noises is empty: name some of {', '.join(NOISES)}")
    interface.require_decoder("denoising")
    length = interface.length // 2 if interface.encoder_length is None else interface.length
    if interface.encoder_length is not None and interface.encoder_length < length:
        raise ValueError(
            f"config.data.encoder_length ({interface.encoder_length}) must be at least data.length "
            f"({length}): a text may not be hidden at all"
        )
    noise = _Noise(config, tokenizer, mask_id(config.mask_id, tokenizer, interface))

    def denoising(rows: Rows, rng: RowGenerator) -> HostBatch:
        text = streams.flatten(rows)
        noisy = noise(text, [rng(i) for i in range(len(rows.ids))], length)
        return conditional_batch(
            noisy, text, len(rows.ids), interface, tokenizer, bidirectional=config.bidirectional
        )

    return Objective(denoising, RowLayout((length,)))


class _Noise:
    """The kinds of noise, each a method (text, draws: [n] in [0, 1), Poisson numbers: [n])."""

    def __init__(self, config: Config, tokenizer: Tokenizer, mask: int):
        self._kinds = [getattr(self, name) for name in config.noises]
        self._rate, self._mean_span = config.rate, config.mean_span
        self._mask, self._eos = np.int32(mask), tokenizer.eos_id
        texts = (tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size))
        self._ends_sentence = np.array([text.rstrip(b" ").endswith(_ENDS) for text in texts])

    def __call__(self, text: Stream, rngs: list[np.random.Generator], length: int) -> Stream:
        """Return the noisy text. Every row draws `2 * length` numbers for each kind of noise."""
        for kind in self._kinds:
            draws = np.stack([rng.random(length) for rng in rngs])
            spans = np.stack([rng.poisson(self._mean_span, length) for rng in rngs])
            columns = streams.positions_since(boundaries(text.rows))
            text = kind(text, draws[text.rows, columns], spans[text.rows, columns])
        return text

    def mask(self, text: Stream, draws: np.ndarray, spans: np.ndarray) -> Stream:
        hidden = (draws < self._rate) & (text.ids != self._eos)
        return text._replace(ids=np.where(hidden, self._mask, text.ids))

    def delete(self, text: Stream, draws: np.ndarray, spans: np.ndarray) -> Stream:
        return text.keep((draws >= self._rate) | (text.ids == self._eos))

    def infill(self, text: Stream, draws: np.ndarray, spans: np.ndarray) -> Stream:
        is_eos, index = text.ids == self._eos, np.arange(len(text.ids))
        first = text.is_segment_start()
        segment_stop = np.append(np.flatnonzero(first)[1:], len(first))[np.cumsum(first) - 1]
        # with this probability to begin a span, spans, which may overlap, cover `rate` of the text
        begins = (draws < -np.log(1 - self._rate) / max(self._mean_span, 1e-9)) & ~is_eos
        stops = np.where(begins, np.minimum(index + spans, segment_stop), 0)
        stops = np.maximum.accumulate(stops)
        hidden = (index < stops) & ~is_eos
        begins &= index >= np.append(0, stops[:-1])[: len(stops)]
        empty = begins & ~hidden
        free = np.bincount(text.rows, hidden.astype(int) - (begins & hidden))  # of each row
        begins &= ~empty | (_count_in_rows(empty, text.rows) <= free[text.rows])
        return streams.with_inserted(text, begins, self._mask, keep=~hidden)

    def shuffle(self, text: Stream, draws: np.ndarray, spans: np.ndarray) -> Stream:
        known = np.append(self._ends_sentence, False)  # ids that only the model has end nothing
        first = text.is_segment_start()
        first[1:] |= known[np.minimum(text.ids, len(known) - 1)][:-1]
        return self._sort(text, draws[streams.last_start(first)])

    def rotate(self, text: Stream, draws: np.ndarray, spans: np.ndarray) -> Stream:
        first = text.is_segment_start()
        segment, positions = np.cumsum(first) - 1, streams.positions_since(first)
        sizes = np.bincount(segment, text.ids != self._eos).astype(int)
        offset = (draws[first] * sizes).astype(int)
        return self._sort(text, (positions - offset[segment]) % np.maximum(sizes, 1)[segment])

    def _sort(self, text: Stream, keys: np.ndarray) -> Stream:
        """Return the stream with the tokens of every segment sorted by `keys`, eos last."""
        order = np.lexsort((keys, text.ids == self._eos, text.segments, text.rows))
        return text.keep(order)


def _count_in_rows(mask: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return int [n]: the cumulative sum of `mask` within each row."""
    total = np.cumsum(mask)
    return total - (total - mask)[streams.last_start(boundaries(rows))]
