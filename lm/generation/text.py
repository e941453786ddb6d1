"""Continuations on the host: their bytes, their ends, and the bytes that are safe to show."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lm.data.tokenizer import Tokenizer


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


class TextStream:
    """One continuation while it grows: its tokens, its end, and the bytes that are safe to show."""

    def __init__(
        self,
        prompt: int,
        sample: int,
        limit: int,
        stop: Sequence[str],
        tokenizer: Tokenizer,
        stop_ids: tuple[int, ...],
    ) -> None:
        self.prompt, self.sample, self.finished = prompt, sample, ""
        self._limit, self._tokenizer, self._stop_ids = limit, tokenizer, stop_ids
        self._stops = tuple(text.encode() for text in stop)
        self._longest = max(map(len, self._stops), default=0)
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._data = bytearray()
        self._released = 0

    def add(self, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Append tokens up to the one that ends the text: the same one however they are grouped."""
        for i, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
            before = len(self._data)
            self._ids.append(i)
            self._logprobs.append(logprob)
            self._data += self._tokenizer.decode_bytes([i])
            cut = self._find_stop(before)
            if cut is not None:
                del self._data[cut:]
                self.finished = "stop"
            elif i in self._stop_ids:
                self.finished = "eos"
            elif len(self._ids) == self._limit:
                self.finished = "length"
            if self.finished:
                return

    def _find_stop(self, before: int) -> int | None:
        """The start of the stop string that is the first to end in the bytes from `before` on."""
        found = []
        for stop in self._stops:
            start = self._data.find(stop, max(0, before - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        return min(found)[1] if found else None

    def flush_safe_bytes(self) -> bytes:
        """The new bytes, without half a character or a possible beginning of a stop string."""
        fresh = bytes(self._data[self._released :])
        if not self.finished:
            for held in range(min(len(fresh), self._longest - 1), 0, -1):
                if any(stop.startswith(fresh[-held:]) for stop in self._stops):
                    fresh = fresh[:-held]
                    break
            fresh = fresh[: _whole_characters(fresh)]
        self._released += len(fresh)
        return fresh

    def generation(self, score: float | None = None) -> Generation:
        return Generation(
            self.prompt,
            self.sample,
            np.array(self._ids, np.int32),
            np.array(self._logprobs, np.float32),
            bytes(self._data),
            self.finished,
            score,
        )


def _whole_characters(data: bytes) -> int:
    """Number of bytes before an incomplete UTF-8 character at the end of `data`."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # a first byte; its high bits count the bytes of the character
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < needed else len(data)
        if byte < 0x80:
            break
    return len(data)
