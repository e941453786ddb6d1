"""Continuations of prompts by a model and its parameters.

The first inputs of a prompt are `tokenizer.start_ids`: bos, since training shifts every document
right, or nothing where published files say so. Prompts are padded on the left, in segment 0, so
that the rows of a batch end in the same slot. All inputs but the last go into the cache in one
call; then each step feeds one token and samples the next. An encoder-decoder reads prompts, and the
eos after them, in its encoder; its decoder begins with bos, after a slot of padding.

Shapes are rounded up to buckets, so that one compilation serves many prompts; top_k, num_beams, and
the use of top_p or a penalty at all, are compiled in.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from lm.generation.beam import BeamSearch, beam_search
from lm.generation.buckets import Prompt, batch_size, bucket, encode, pad
from lm.generation.decode import CHUNK, decode, prefill, without_length
from lm.generation.sampling import Sampling
from lm.generation.text import Generation, TextChunk, TextStream
from lm.optim.param_tree import unstack_layers
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import HostTokens, Model, Params, check_head

DEFAULT = Sampling()


class Generator:
    """Generation with one model and its parameters, on the mesh of `model.rules`."""

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        *,
        start: Sequence[int] | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        """start: the first ids of every stream of the (de)coder; unset: the tokenizer's start_ids.
        stop_ids: tokens that end a continuation; unset: the tokenizer's.

        Raises:
            ValueError: the model sees later tokens, has no head, or no row for an id of the
                tokenizer.
        """
        check_head(model.config)
        if not model.config.is_causal:
            raise ValueError("config.model is not causal: it can't continue a text")
        if tokenizer.used_vocab_size > model.config.vocab_size:
            raise ValueError(
                f"config.model.vocab_size ({model.config.vocab_size}) must be at least the "
                f"vocabulary of tokenizer {tokenizer.name} ({tokenizer.used_vocab_size})"
            )
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self.model = without_length(model)  # whatever training did
        self.params, self.tokenizer = params, tokenizer
        rules = model.rules
        on_one_cpu = rules.platform == "cpu" and rules.mesh.size == 1
        self._params = unstack_layers(params) if on_one_cpu else params
        self.takes_encoder = model.config.takes_encoder
        self._start = np.array(tokenizer.start_ids if start is None else start, np.int32)
        self._stop_ids = tuple(tokenizer.stop_ids if stop_ids is None else stop_ids)
        if self.takes_encoder and not len(self._start):
            raise ValueError("the decoder of an encoder-decoder has to start with some token")

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling | BeamSearch = DEFAULT,
    ) -> list[Generation]:
        """`num_samples` continuations of each prompt, in the order of the prompts, those of a beam
        search with the best first.

        A continuation is a function of the parameters, its prompt, `sampling` and its number among
        the samples: what else is in the batch changes no more than the rounding of logits. The same
        prompt given twice is continued twice in the same way; ask for samples instead.

        Raises:
            ValueError: before anything is compiled, where a prompt and `max_new_tokens` don't fit
                into `config.model.max_length`, or ids are outside of the vocabulary.
        """
        inputs = self.encode_prompts(prompts, max_new_tokens)
        if isinstance(sampling, BeamSearch):
            return self._beam_search(inputs, max_new_tokens, sampling)
        # The device ends rows at stop ids; only stop strings need the host in between.
        chunk = CHUNK if sampling.stop else max_new_tokens
        chunks = self._stream(inputs, max_new_tokens, sampling, chunk)
        found = [text.generation for text in chunks if text.generation is not None]
        return sorted(found, key=lambda g: (g.prompt, g.sample))

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling = DEFAULT,
        chunk: int = CHUNK,
    ) -> Iterator[TextChunk]:
        """The continuations of `generate` while they grow: new bytes after every `chunk` tokens."""
        if chunk < 1:
            raise ValueError(f"chunk ({chunk}) must be positive")
        inputs = self.encode_prompts(prompts, max_new_tokens)
        return self._stream(inputs, max_new_tokens, sampling, chunk)

    def encode_prompts(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[np.ndarray]:
        """The ids of every prompt, int32 [n]. Raises ValueError as `generate`."""
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list: this one text would be read as its letters")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) must be positive")
        limit = self.model.config.max_length
        rest = len(self._start) - 1 + max_new_tokens  # the last new token is not fed
        found = []
        for i, prompt in enumerate(prompts):
            ids = encode(self.tokenizer, prompt, self.vocab_size, f"prompt {i}: ")
            if self.takes_encoder:
                if max(len(ids) + 1, rest) > limit:
                    raise ValueError(
                        f"config.model.max_length ({limit}) must be at least the length of prompt "
                        f"{i} with its eos ({len(ids) + 1}), and max_new_tokens ({max_new_tokens})"
                    )
            elif len(ids) + rest > limit:
                raise ValueError(
                    f"config.model.max_length ({limit}) must be at least the length of prompt {i} "
                    f"({len(ids)}) + max_new_tokens ({max_new_tokens}) = {len(ids) + rest}; "
                    "shorten the prompt or ask for fewer tokens"
                )
            elif not len(self._start) + len(ids):
                raise ValueError(
                    f"prompt {i} is empty, and there is no token to begin with: give a start"
                )
            found.append(ids)
        return found

    def longest_prompt(self, max_new_tokens: int) -> int:
        """The most ids that a prompt may have, without the start."""
        limit = self.model.config.max_length
        return limit - 1 if self.takes_encoder else limit - len(self._start) + 1 - max_new_tokens

    def _rows(self, prompts: Sequence[np.ndarray]) -> tuple[HostTokens, HostTokens | None]:
        """(the tokens of the (de)coder, those of the encoder), one row for each of prompts."""
        rows = batch_size(len(prompts), self.model.rules.size("batch"))
        if not self.takes_encoder:
            streams = [np.concatenate([self._start, x]) for x in prompts]
            return pad(streams, rows, bucket(max(map(len, streams)) - 1) + 1), None
        sources = [np.append(x, self.tokenizer.eos_id) for x in prompts]
        encoder = pad(sources, rows, bucket(max(map(len, sources))))
        width = max(bucket(len(self._start) - 1), 1) + 1
        return pad([self._start] * len(prompts), rows, width), encoder

    def _beam_search(
        self, inputs: list[np.ndarray], limit: int, search: BeamSearch
    ) -> list[Generation]:
        if not inputs:
            return []
        prompts, encoder = self._rows(inputs)
        size, factor = bucket(limit), search.repetition_penalty
        penalty = None if factor == 1 else np.float32(factor)
        found = beam_search(
            self.model,
            self._params,
            prompts,
            encoder,
            np.arange(len(prompts.ids)) < len(inputs),
            np.int32(limit),
            search.divisors(limit, size + 1).astype(np.float32),
            np.bool_(search.early_stopping is True),
            penalty,
            num_beams=search.num_beams,
            bucket=size,
            stop_ids=self._stop_ids,
            vocab_size=self.vocab_size,
        )
        ids, logprobs, scores = (np.asarray(x) for x in (found.ids, found.logprobs, found.scores))
        rows = self._text_streams(len(inputs), search.num_samples, limit)
        for row in rows:
            row.add(ids[row.prompt, row.sample, :limit], logprobs[row.prompt, row.sample, :limit])
        return [row.generation(float(scores[row.prompt, row.sample])) for row in rows]

    def _text_streams(
        self, count: int, num_samples: int, limit: int, stop: tuple[str, ...] = ()
    ) -> list[TextStream]:
        stops = tuple(text.encode() for text in stop)
        return [
            TextStream(i, j, limit, stops, self.tokenizer, self._stop_ids)
            for i in range(count)
            for j in range(num_samples)
        ]

    def _stream(
        self, inputs: list[np.ndarray], limit: int, sampling: Sampling, chunk: int
    ) -> Iterator[TextChunk]:
        if not inputs:
            return
        rows = self._text_streams(len(inputs), sampling.num_samples, limit, sampling.stop)
        prompts, encoder = self._rows([inputs[row.prompt] for row in rows])
        hashes = [zlib.crc32(np.concatenate([self._start, x]).tobytes()) for x in inputs]
        names = np.zeros((2, len(prompts.ids)), np.uint32)  # of each row: the seed of its samples
        names[:, : len(rows)] = np.transpose([(hashes[row.prompt], row.sample) for row in rows])
        state = prefill(
            self.model,
            self._params,
            prompts,
            encoder,
            np.uint32(sampling.seed),
            names,
            length=prompts.ids.shape[1] - 1 + bucket(limit),
            penalized=sampling.repetition_penalty != 1,
        )
        top_k = 1 if sampling.temperature == 0 else min(sampling.top_k, self.vocab_size)
        done = np.arange(len(prompts.ids)) >= len(rows)
        for start in range(0, limit, chunk):
            count = min(chunk, limit - start)
            state, *new = decode(
                self.model,
                self._params,
                state,
                done,
                np.int32(count),
                np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float32),
                np.float32(sampling.repetition_penalty),
                chunk=bucket(min(chunk, limit)),
                top_k=top_k,
                nucleus=sampling.top_p < 1 and top_k != 1,
                stop_ids=self._stop_ids,
                vocab_size=self.vocab_size,
            )
            ids, logprobs = (np.asarray(x)[:, :count] for x in new)
            for i, row in enumerate(rows):
                if done[i]:
                    continue
                row.add(ids[i], logprobs[i])
                done[i] = bool(row.finished)
                data = row.flush_safe_bytes()
                if data or row.finished:
                    whole = row.generation() if row.finished else None
                    yield TextChunk(row.prompt, row.sample, data, whole)
            if done.all():
                return
