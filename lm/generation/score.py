"""Log-probabilities of given texts: of continuations, and of long texts in windows.

Rows are padded on the left, so that scored tokens are the last columns of a batch, and logits are
computed only for those, a few columns at a time. Rows of similar length share a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lm.generation.buckets import Prompt, batch_size, bucket, encode, pad, power_of_two
from lm.generation.decode import valid_token_mask, without_length
from lm.kernels import chunking
from lm.layers.cross_entropy import token_nll
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Array, Model, Params, Tokens, check_head

CHUNK_LOGITS = 1 << 24  # logits in memory at once: 64 MiB
Report: TypeAlias = Callable[[int, int], object]  # called with the rows done, and their count


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of one continuation, or of one text."""

    logprob: float  # sum over its tokens, in nats
    tokens: int
    is_greedy: bool  # every token is the likeliest one after those before


class _Row(NamedTuple):
    """Inputs of the (de)coder, the scored tokens after them, and inputs of the encoder."""

    inputs: np.ndarray  # int32 [n]
    targets: np.ndarray  # int32 [m]: those of the last m inputs
    source: np.ndarray | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Those of its batch: of inputs, of scored tokens, of the encoder."""
        scored = bucket(len(self.targets))
        width = max(bucket(len(self.inputs)), scored)
        return (width, scored, *([] if self.source is None else [bucket(len(self.source))]))


class Scorer:
    """Scores with one model and its parameters, on the mesh of `model.rules`."""

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        *,
        start: Sequence[int] | None = None,
        max_batch_tokens: int = 4096,
    ) -> None:
        """start: as of `Generator`. max_batch_tokens: on each device, padding included; a longer
        row is a batch of its own.

        Raises:
            ValueError: the model sees later tokens, or has no head.
        """
        check_head(model.config)
        if not model.config.is_causal:
            raise ValueError("config.model is not causal: it gives texts no probability")
        self.model = without_length(model)
        self.params, self.tokenizer = params, tokenizer
        self.takes_encoder = model.config.takes_encoder
        self.start = np.array(tokenizer.start_ids if start is None else start, np.int32)
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self._max_batch_tokens = max_batch_tokens

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        *,
        report: Report = lambda done, count: None,
    ) -> list[Score]:
        """The log-probability of every continuation after its prompt; ends of texts are not scored.

        Of a text after a text, the scored tokens are those by which encoding both together is
        longer than encoding the prompt. A row that is longer than `config.model.max_length` loses
        the beginning of its prompt.

        Raises:
            ValueError: nothing comes before an empty prompt's continuation, or a continuation is
                empty, or longer than the model allows.
        """
        pairs = zip(prompts, continuations, strict=True)
        return self._run([self._row(i, *pair) for i, pair in enumerate(pairs)], report)

    def rolling(
        self,
        texts: Sequence[Prompt],
        *,
        context: int = 1,
        report: Report = lambda done, count: None,
    ) -> list[Score]:
        """The log-probability of every text, each token given those before it.

        A text longer than `config.model.max_length` is read in windows of that length. Each begins
        with the last `context` tokens of what came before, and the last with as many as fit. (More
        context is closer to the probability of the whole, and takes longer.)
        """
        if self.takes_encoder:
            raise ValueError("an encoder-decoder gives no probability to a text without a prompt")
        length = self.model.config.max_length
        if not 0 < context <= length:
            raise ValueError(
                f"context ({context}) must be in 1..config.model.max_length ({length})"
            )
        found = [windows(self._ids(text), self.start, length, context) for text in texts]
        scores = iter(self._run([_Row(*pair) for text in found for pair in text], report))
        return [_sum(itertools.islice(scores, len(text))) for text in found]

    def _ids(self, text: Prompt) -> np.ndarray:
        return encode(self.tokenizer, text, self.vocab_size)

    def _row(self, i: int, prompt: Prompt, continuation: Prompt) -> _Row:
        limit = self.model.config.max_length
        before = self._ids(prompt)
        if isinstance(prompt, str) and isinstance(continuation, str) and not self.takes_encoder:
            targets = self._ids(prompt + continuation)[len(before) :]
        else:
            targets = self._ids(continuation)
        inputs = self.start if self.takes_encoder else np.concatenate([self.start, before])
        inputs = np.concatenate([inputs, targets[:-1]])
        if not 0 < len(targets) <= min(limit, len(inputs)):
            raise ValueError(
                f"continuation {i} must have at least 1 token, at most config.model.max_length "
                f"({limit}), and something before it; it has {len(targets)}"
            )
        if not self.takes_encoder:
            return _Row(inputs[-limit:], targets)
        source = np.append(before, self.tokenizer.eos_id).astype(np.int32)
        if max(len(source), len(inputs)) > limit:
            raise ValueError(
                f"config.model.max_length ({limit}) must be at least the length of prompt {i} with "
                f"its eos ({len(source)}), and of its continuation ({len(inputs)})"
            )
        return _Row(inputs, targets, source)

    def _run(self, rows: list[_Row], report: Report) -> list[Score]:
        scores: dict[int, Score] = {}
        batches = itertools.chain(self._dispatch(rows), [([], ())])
        for (members, outputs), _ in itertools.pairwise(batches):  # the next one is dispatched
            for i, logprob, is_greedy in zip(members, *map(np.asarray, outputs), strict=False):
                scores[i] = Score(float(logprob), len(rows[i].targets), bool(is_greedy))
            report(len(scores), len(rows))
        return [scores[i] for i in range(len(rows))]

    def _dispatch(self, rows: list[_Row]) -> Iterator[tuple[list[int], tuple[Array, ...]]]:
        """(indices of the rows of a batch, outputs of `_score`), batch by batch."""
        shards = self.model.rules.size("batch")
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.widths, []).append(i)
        groups = dict(sorted(groups.items(), reverse=True))  # the largest first
        for (width, scored, *source), members in groups.items():
            fits = max(1, self._max_batch_tokens // (width + sum(source)))
            most = shards * (power_of_two(fits + 1) // 2)  # the largest power of two that fits
            # the last one has as many rows as the others: another size is another compilation
            size = batch_size(min(most, len(members)), shards)
            for start in range(0, len(members), most):
                chosen = members[start : start + most]
                inputs, targets, sources = zip(*(rows[i] for i in chosen), strict=True)
                yield (
                    chosen,
                    _score(
                        self.model,
                        self.params,
                        pad(inputs, size, width),
                        pad(sources, size, *source) if source else None,
                        pad(targets, size, scored),
                        vocab_size=self.vocab_size,
                    ),
                )


def _sum(scores: Iterable[Score]) -> Score:
    scores = list(scores)
    return Score(
        sum((s.logprob for s in scores), 0.0),
        sum(s.tokens for s in scores),
        all(s.is_greedy for s in scores),
    )


def windows(
    ids: np.ndarray, start: np.ndarray, length: int, context: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(inputs, targets)] that together score every one of `ids` once, after `start`.

    The first window scores `length` of them (less one for each of `start` beyond the first), each
    later one the next `length - context + 1`; the rest at the end follows as many earlier tokens as
    fit. Without a start the first token has nothing before it, and is not scored.
    """
    stream = np.concatenate([start, ids]).astype(np.int32)
    first = max(len(start), 1)  # index of the first target
    found, at = [], first
    while at < len(stream):
        count = length - context + 1 if found else length - first + 1
        stop = min(at + count, len(stream))
        inputs = stream[max(0, stop - 1 - length) : stop - 1]
        found.append((inputs, stream[at:stop]))
        at = stop
    return found


@functools.partial(jax.jit, static_argnames=("model", "vocab_size"))
def _score(
    model: Model,
    params: Params,
    inputs: Tokens,
    encoder: Tokens | None,
    targets: Tokens,
    *,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """(float32 [B] sums of log-probabilities, bool [B], True if all were the likeliest) of targets:
    [B, W], those of the last W of inputs: [B, T].
    """
    rules, variables = model.rules, {"params": params}

    def shard(tokens: Tokens | None) -> Tokens | None:
        return jax.tree.map(lambda x: rules.constrain(x, "batch", None), tokens)

    hidden = model.apply(variables, shard(inputs), encoder=shard(encoder)).hidden
    rows, scored = targets.ids.shape
    hidden = hidden[:, -scored:]
    size = CHUNK_LOGITS * rules.size("batch") // model.config.vocab_size
    count = chunking.num_chunks(max(1, size), rows, scored)

    def chunk(part: tuple[Array, Array]) -> tuple[jax.Array, jax.Array]:
        hidden, ids = part
        logits = model.apply(variables, hidden, method="logits")  # [B, W / count, V]
        best = jnp.argmax(jnp.where(valid_token_mask(vocab_size, logits), logits, -jnp.inf), axis=2)
        return -token_nll(logits, ids)[0], best == ids

    parts = jax.lax.map(chunk, chunking.split((hidden, jnp.asarray(targets.ids)), count))
    logprobs, best = (chunking.join(x, scored) for x in parts)
    counts = targets.segments != 0
    sums = jnp.sum(jnp.where(counts, logprobs, 0.0), axis=1)
    return rules.constrain(sums, None), rules.constrain(jnp.all(best | ~counts, axis=1), None)
