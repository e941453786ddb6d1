"""Continuations of prompts by a model and its parameters.

The first input of a prompt is `tokenizer.bos_id`, since training shifts every document right.
Prompts of different lengths are padded on the left, in segment 0, so that the rows of a batch end
in the same slot. All inputs but the last go into the cache in one call, which computes no logits;
then each step feeds one token and samples the next.

Shapes are rounded up to buckets, so that one compilation serves many prompts. Temperature, top_p
and min_p are arguments of it; top_k, and whether there is a top_p at all, are compiled in.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from lm.generation.decode import CHUNK, decode, prefill, without_length
from lm.generation.rows import bucket, pad, power_of_two
from lm.generation.sampling import Sampling
from lm.generation.text import Generation, Piece, Row
from lm.types import Model, Params

DEFAULT = Sampling()
Prompt: TypeAlias = str | Sequence[int] | np.ndarray  # text, or ids without bos


class Generator:
    """Generation with one model and its parameters, on the mesh of `model.rules`."""

    def __init__(self, model: Model, params: Params, tokenizer: Any) -> None:
        """Raises ValueError unless the model has a row for every id of the tokenizer."""
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"config.model.vocab_size ({model.config.vocab_size}) must be at least the "
                f"vocabulary of tokenizer {tokenizer.name} ({tokenizer.vocab_size})"
            )
        self.model = without_length(model)  # whatever training did
        self.params, self.tokenizer = params, tokenizer

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling = DEFAULT,
    ) -> list[Generation]:
        """`num_samples` continuations of each prompt, in the order of the prompts.

        A continuation is a function of the parameters, its prompt, `sampling` and its number among
        the samples: what else is in the batch changes no more than the rounding of logits. The same
        prompt given twice is continued twice in the same way; ask for samples instead.

        Raises:
            ValueError: before anything is compiled, where a prompt and `max_new_tokens` don't fit
                into `config.model.max_length`, or ids are outside of the vocabulary.
        """
        # The host has to look in between only for what the device can't see.
        pieces = self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            chunk=CHUNK if sampling.stop else max_new_tokens,
        )
        found = [piece.generation for piece in pieces if piece.generation is not None]
        return sorted(found, key=lambda g: (g.prompt, g.sample))

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling = DEFAULT,
        chunk: int = CHUNK,
    ) -> Iterator[Piece]:
        """What `generate` returns, in pieces as they come: the host looks every `chunk` tokens."""
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list: this one text would be read as its letters")
        if max_new_tokens < 1 or chunk < 1:
            raise ValueError(
                f"max_new_tokens ({max_new_tokens}) and chunk ({chunk}) must be positive"
            )
        inputs = [self._inputs(i, prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
        return self._stream(inputs, max_new_tokens, sampling, chunk)

    def _inputs(self, i: int, prompt: Prompt, max_new_tokens: int) -> np.ndarray:
        """bos and the ids of prompt `i`, checked: int32 [n]."""
        tokenizer, limit = self.tokenizer, self.model.config.max_length
        ids = np.asarray(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, np.int64)
        wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
        if wrong.size:
            raise ValueError(
                f"prompt {i}: id {wrong[0]} is not in the vocabulary (size {tokenizer.vocab_size})"
            )
        needed = len(ids) + max_new_tokens  # bos comes, the last new token is not fed
        if needed > limit:
            raise ValueError(
                f"config.model.max_length ({limit}) must be at least the length of prompt {i} "
                f"({len(ids)}) + max_new_tokens ({max_new_tokens}) = {needed}; "
                "shorten the prompt or ask for fewer tokens"
            )
        return np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32)

    def _stream(
        self, inputs: list[np.ndarray], limit: int, sampling: Sampling, chunk: int
    ) -> Iterator[Piece]:
        if not inputs:
            return
        model, tokenizer = self.model, self.tokenizer
        rows = [
            Row(i, j, limit, sampling.stop, tokenizer)
            for i in range(len(inputs))
            for j in range(sampling.num_samples)
        ]
        shards = model.rules.size("batch")
        batch_size = shards * power_of_two(-(-len(rows) // shards))
        prompts = pad([inputs[row.prompt] for row in rows], batch_size)
        names = np.zeros((2, batch_size), np.uint32)
        names[:, : len(rows)] = np.transpose(
            [(zlib.crc32(inputs[row.prompt].tobytes()), row.sample) for row in rows]
        )
        state = prefill(
            model,
            self.params,
            prompts,
            np.uint32(sampling.seed),
            names,
            length=prompts.ids.shape[1] - 1 + bucket(limit),
        )
        top_k = 1 if sampling.temperature == 0 else min(sampling.top_k, tokenizer.vocab_size)
        done = np.arange(batch_size) >= len(rows)
        for start in range(0, limit, chunk):
            count = min(chunk, limit - start)
            state, *new = decode(
                model,
                self.params,
                state,
                done,
                np.int32(count),
                np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float32),
                chunk=bucket(min(chunk, limit)),
                top_k=top_k,
                nucleus=sampling.top_p < 1 and top_k != 1,
                eos_id=tokenizer.eos_id,
                vocab_size=tokenizer.vocab_size,
            )
            ids, logprobs = (np.asarray(x)[:, :count] for x in new)
            for i, row in enumerate(rows):
                if done[i]:
                    continue
                row.add(ids[i], logprobs[i])
                done[i] = bool(row.finished)
                data = row.release()
                if data or row.finished:
                    whole = row.generation() if row.finished else None
                    yield Piece(row.prompt, row.sample, data, whole)
            if done.all():
                return
