"""A denoising autoencoder (BART, arXiv:1910.13461): a text is predicted from a noisy one."""

from __future__ import annotations

import dataclasses

import numpy as np

from lm.config.schema import field
from lm.data import streams
from lm.data.sources import RowLayout, Rows
from lm.data.streams import Stream, boundaries
from lm.data.tokenizer import Tokenizer
from lm.objectives import ModelInterface, Objective, RowGenerator, mask_id
from lm.types import Batch

NOISES = ("mask", "delete", "infill", "shuffle", "rotate")
_ENDS = (".", "!", "?", "。", "！", "？", "\n")


@dataclasses.dataclass(frozen=True)
class Config:
    noises: tuple[str, ...] = field(
        ("shuffle", "infill"),
        "In this order: mask tokens, delete tokens, infill (one mask for a span), shuffle "
        "sentences, rotate (begin anywhere).",
    )
    rate: float = field(
        0.3, "Fraction of the tokens that mask, delete and infill hide.", ge=0, lt=1
    )
    mean_span: float = field(3.0, "infill: mean of the Poisson distribution of spans.", ge=0)
    bidirectional: bool = field(
        True, "Without an encoder: the noisy text is a prefix that its segment sees whole."
    )
    mask_id: int | None = field(
        None,
        "Unset: the tokenizer's <mask> or [MASK], else the first id that it does not use.",
        ge=0,
    )


def build(config: Config, tokenizer: Tokenizer, form: ModelInterface) -> Objective:
    """Returns the denoising objective: the noisy text is given, every token of the text scored.

    `?` is the mask token; the eos of a document stays at its end and is never hidden:

        text     a b c . d e !     mask     a ? c . d ? !     delete   a c . d !
        infill   a ? . d e !       shuffle  d e ! a b c .     rotate   . d e ! a b c

    infill puts one mask for a span of 0 tokens or more (a Poisson number), so that a text may grow:
    what would not fit in its row is not hidden. shuffle puts sentences in a random order.
    """
    unknown = [name for name in config.noises if name not in NOISES]
    if unknown or not config.noises:
        raise ValueError(
            f"config.objective.noises ({config.noises}) must be among {', '.join(NOISES)}"
        )
    if not form.is_causal:
        raise ValueError("config.objective.name=denoising needs a decoder, or an encoder with one")
    if not 0 <= config.rate < 1 or config.mean_span < 0:
        raise ValueError(
            f"config.objective.rate ({config.rate}) must be in [0, 1), and mean_span "
            f"({config.mean_span}) not negative"
        )
    raw = form.length // 2 if form.encoder_length is None else form.length
    if form.encoder_length is not None and form.encoder_length < raw:
        raise ValueError(
            f"config.data.encoder_length ({form.encoder_length}) must be at least data.length "
            f"({raw}): a text may not be hidden at all"
        )
    eos = tokenizer.eos_id
    noise = _Noise(config, mask_id(config.mask_id, tokenizer, form), eos, _sentence_ends(tokenizer))

    def denoising(rows: Rows, rng: RowGenerator) -> Batch:
        text = streams.flatten(rows)
        draws = [rng(i) for i in range(len(rows.ids))]
        return streams.conditional(
            noise(text, draws, raw),
            text,
            batch_size=len(rows.ids),
            length=form.length,
            encoder_length=form.encoder_length,
            bos=tokenizer.bos_id,
            bidirectional=config.bidirectional and form.encoder_length is None,
        )

    return Objective(denoising, RowLayout((raw,)))


def _sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """Returns bool [vocab_size]: whether the text of a token ends a sentence."""
    texts = (tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size))
    ends = tuple(end.encode() for end in _ENDS)
    return np.array([text.rstrip(b" ").endswith(ends) for text in texts])


class _Noise:
    """The kinds of noise, each a method (text, draws: [n] in [0, 1), Poisson numbers: [n])."""

    def __init__(self, config: Config, mask: int, eos: int, ends: np.ndarray):
        self._kinds = [getattr(self, name) for name in config.noises]
        self._rate, self._mean_span = config.rate, config.mean_span
        self._mask, self._eos, self._ends = mask, eos, ends

    def __call__(self, text: Stream, rngs: list[np.random.Generator], raw: int) -> Stream:
        """Returns the noisy text. Every row draws `2 * raw` numbers for each kind of noise."""
        for kind in self._kinds:
            draws = np.stack([rng.random(raw) for rng in rngs])
            spans = np.stack([rng.poisson(self._mean_span, raw) for rng in rngs])
            columns = streams.positions_since(boundaries(text.rows))
            text = kind(text, draws[text.rows, columns], spans[text.rows, columns])
        return text

    def mask(self, text: Stream, draws: np.ndarray, spans: np.ndarray) -> Stream:
        del spans
        hidden = (draws < self._rate) & (text.ids != self._eos)
        return text._replace(ids=np.where(hidden, np.int32(self._mask), text.ids))

    def delete(self, text: Stream, draws: np.ndarray, spans: np.ndarray) -> Stream:
        del spans
        return text.keep((draws >= self._rate) | (text.ids == self._eos))

    def infill(self, text: Stream, draws: np.ndarray, spans: np.ndarray) -> Stream:
        is_end, places = text.ids == self._eos, np.arange(len(text.ids))
        first = text.is_segment_start()
        after = np.append(np.flatnonzero(first)[1:], len(first))[np.cumsum(first) - 1]
        # the chance to begin a span with which spans, which may overlap, cover `rate` of the text
        begins = (draws < -np.log(1 - self._rate) / max(self._mean_span, 1e-9)) & ~is_end
        reach = np.maximum.accumulate(np.where(begins, np.minimum(places + spans, after), 0))
        hidden = (places < reach) & ~is_end
        begins &= places >= np.append(0, reach[:-1])[: len(reach)]
        empty = begins & ~hidden
        room = np.bincount(text.rows, hidden.astype(int) - (begins & hidden))
        begins &= ~empty | (_count_in_rows(empty, text.rows) <= room[text.rows])
        twice = np.repeat(places, ~hidden + begins.astype(int))  # the mask, then what stays
        is_mask = boundaries(twice) & begins[twice]
        ids = np.where(is_mask, np.int32(self._mask), text.ids[twice])
        return Stream(ids, text.rows[twice], text.segments[twice])

    def shuffle(self, text: Stream, draws: np.ndarray, spans: np.ndarray) -> Stream:
        del spans
        first = text.is_segment_start()
        first[1:] |= self._is_sentence_end(text)[:-1]
        places = np.arange(len(first))
        keys = draws[np.maximum.accumulate(np.where(first, places, 0))]
        return self._sorted(text, keys)

    def rotate(self, text: Stream, draws: np.ndarray, spans: np.ndarray) -> Stream:
        del spans
        first, places = text.is_segment_start(), streams.positions_since(text.is_segment_start())
        segment = np.cumsum(first) - 1
        sizes = np.bincount(segment, text.ids != self._eos).astype(int)
        offset = (draws[first] * sizes).astype(int)
        return self._sorted(text, (places - offset[segment]) % np.maximum(sizes, 1)[segment])

    def _sorted(self, text: Stream, keys: np.ndarray) -> Stream:
        """Returns the stream with the tokens of every segment by their keys, eos last."""
        order = np.lexsort((keys, text.ids == self._eos, text.segments, text.rows))
        return Stream(*(part[order] for part in text))

    def _is_sentence_end(self, text: Stream) -> np.ndarray:
        known = np.append(self._ends, False)  # ids of the model alone end nothing
        return known[np.minimum(text.ids, len(self._ends))]


def _count_in_rows(mask: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns int [n]: how many are true up to each place of its row."""
    total = np.cumsum(mask)
    first = np.maximum.accumulate(np.where(boundaries(rows), np.arange(len(rows)), 0))
    return total - (total - mask)[first]
