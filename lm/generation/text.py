"""Continuations on the host: their bytes, their ends, and the bytes that are safe to show."""

from __future__ import annotations

import codecs
import dataclasses

import numpy as np

from lm.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generation:
    """One continuation.

    `ids` end with the eos, or with the token that completed a stop string. `logprobs`, in nats, are
    the model's own, at temperature 1 and before any filter: `-logprobs.sum()` is the loss of `ids`.
    """

    prompt: int  # index among the prompts
    sample: int  # index among the samples of this prompt
    ids: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # float32 [n]
    data: bytes  # exact bytes, without the stop string
    finished: str  # eos, stop or length
    score: float | None = None  # that a beam search ranks by

    @property
    def text(self) -> str:
        """`data` as text; bytes that are no UTF-8 become U+FFFD."""
        return self.data.decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class TextChunk:
    """The next bytes of a continuation, of whole characters; the last ones with the whole."""

    prompt: int
    sample: int
    data: bytes
    generation: Generation | None = None


@dataclasses.dataclass
class TextStream:
    """One continuation while it grows: its tokens, its end, and the bytes that are safe to show."""

    prompt: int
    sample: int
    limit: int
    stops: tuple[bytes, ...]
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    finished: str = ""  # see `Generation`
    _ids: list[int] = dataclasses.field(default_factory=list)
    _logprobs: list[float] = dataclasses.field(default_factory=list)
    _data: bytearray = dataclasses.field(default_factory=bytearray)
    _released: int = 0

    def add(self, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Append tokens up to the one that ends the text: the same one however they are grouped."""
        for i, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
            before = len(self._data)
            self._ids.append(i)
            self._logprobs.append(logprob)
            self._data += self.tokenizer.decode_bytes([i])
            cut = self._find_stop(before)
            if cut is not None:
                del self._data[cut:]
                self.finished = "stop"
            elif i in self.stop_ids:
                self.finished = "eos"
            elif len(self._ids) == self.limit:
                self.finished = "length"
            if self.finished:
                return

    def _find_stop(self, before: int) -> int | None:
        """The start of the stop string that is the first to end in the bytes from `before` on."""
        found = []
        for stop in self.stops:
            start = self._data.find(stop, max(0, before - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        return min(found)[1] if found else None

    def flush_safe_bytes(self) -> bytes:
        """The new bytes, without half a character or a possible beginning of a stop string."""
        fresh = bytes(self._data[self._released :])
        if not self.finished:
            longest = max(map(len, self.stops), default=0)
            for held in range(min(len(fresh), longest - 1), 0, -1):
                if any(stop.startswith(fresh[-held:]) for stop in self.stops):
                    fresh = fresh[:-held]
                    break
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            decoder.decode(fresh)
            fresh = fresh.removesuffix(decoder.getstate()[0])  # half a character
        self._released += len(fresh)
        return fresh

    def generation(self, score: float | None = None) -> Generation:
        ids, logprobs = np.array(self._ids, np.int32), np.array(self._logprobs, np.float32)
        data = bytes(self._data)
        return Generation(self.prompt, self.sample, ids, logprobs, data, self.finished, score)
