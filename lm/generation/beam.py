"""Beam search: the likeliest whole continuations, several hypotheses side by side.

Defined as in the `transformers` library (5.x), so that its results can be compared token for token:
each step takes the 2 * num_beams best extensions of all beams, ends those among the first num_beams
that are an eos (or the last token allowed), and goes on with the best num_beams that are not. The
score of an ended one is its log-probability / length ** length_penalty, the eos counted
(arXiv:1609.08144 without its constants).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.generation.decode import is_any, mark_seen, next_logits, prefill_cache, valid_token_mask
from lm.generation.sampling import penalize
from lm.types import Array, Cache, Model, Params, Tokens

T = TypeVar("T")
LOW = -1e9  # added to scores that must not be chosen, yet stay ordered


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Continuation of prompts by the likeliest texts that a search finds."""

    num_beams: int = 4
    # -1 to 5; above 0: for longer texts; 0: by log-probability alone
    length_penalty: float = 1.0
    # True: when num_beams have ended. False: when the best that goes on scores below the worst of
    # them at its present length. "never": below it at the length that would score best.
    early_stopping: bool | str = False
    num_samples: int = 1  # best continuations of each prompt that are returned
    repetition_penalty: float = 1.0  # 1e-3 to 1e3; as in `Sampling`, on log-probabilities

    def __post_init__(self) -> None:
        count = self.num_beams
        for name, good, wanted in (
            ("num_beams", count > 0, "positive"),
            # beyond, scores of real texts come near to LOW
            ("length_penalty", -1 <= self.length_penalty <= 5, "in [-1, 5]"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "a bool or never"),
            ("num_samples", 0 < self.num_samples <= count, f"in 1..num_beams ({count})"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "in [0.001, 1000]"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")

    def divisors(self, limit: int, size: int) -> np.ndarray:
        """float32 [2, size]: divisors of the log-probability of n tokens, if it ends there, and of
        its best possible score if it goes on.
        """
        lengths = np.arange(size, dtype=np.float64).clip(1)
        at_limit = self.early_stopping == "never" and self.length_penalty > 0
        best = np.full(size, limit, np.float64) if at_limit else lengths
        return np.stack([lengths, best]) ** self.length_penalty


@flax.struct.dataclass
class Hypotheses:
    """Continuations of each row, best first."""

    ids: Array  # int32 [B, K, N]
    logprobs: Array  # float32 [B, K, N]: of each token
    scores: Array  # float32 [B, K]
    ended: Array  # bool [B, K]


@flax.struct.dataclass
class _State:
    cache: Cache  # of B * K streams
    token: Array  # int32 [B, K]: the next input
    count: Array  # int32 []: tokens generated so far
    seen: Array | None  # bool [B, K, V]
    running: Hypotheses
    best: Hypotheses  # the best that ended, and placeholders until there are K of them
    open: Array  # bool [B, 1]: something that goes on may still get among the best


@functools.partial(
    jax.jit, static_argnames=("model", "num_beams", "bucket", "stop_ids", "vocab_size")
)
def beam_search(
    model: Model,
    params: Params,
    prompts: Tokens,
    encoder: Tokens | None,
    filled: Array,
    limit: Array,
    divisors: Array,
    until_full: Array,
    penalty: Array | None,
    *,
    num_beams: int,
    bucket: int,
    stop_ids: tuple[int, ...],
    vocab_size: int,
) -> Hypotheses:
    """The best `num_beams` continuations of prompts: [B, P + 1] by at most `limit` tokens.

    filled: bool [B], rows that hold a prompt; divisors: `BeamSearch.divisors`, float32 [2, bucket +
    1]; until_full: bool, early_stopping=True; penalty: of repetition. The columns of a continuation
    up to its eos count.
    """
    rules, k = model.rules, num_beams
    batch_size, width = prompts.ids.shape

    def start(prompts: Tokens, encoder: Tokens | None) -> Cache:
        return prefill_cache(model, params, prompts, encoder, length=width - 1 + bucket)

    axes = row_axes(start, prompts, encoder)

    def advance(state: _State) -> _State:
        position = jnp.repeat(prompts.positions[:, -1] + state.count, k)
        cache, logits = next_logits(model, params, state.cache, state.token.reshape(-1), position)
        own = jax.nn.log_softmax(logits).reshape(batch_size, k, -1)  # [B, K, V]
        scores, seen = own, state.seen
        if seen is not None and penalty is not None:
            scores = penalize(own, seen, penalty)
        scores = jnp.where(valid_token_mask(vocab_size, logits), scores, -jnp.inf)
        total = (state.running.scores[:, :, None] + scores).reshape(batch_size, -1)
        best, index = jax.lax.top_k(total, 2 * k)  # [B, 2 K]
        beam, token = index // own.shape[2], (index % own.shape[2]).astype(jnp.int32)
        logprob = jnp.take_along_axis(own.reshape(batch_size, -1), index, axis=1)
        count = state.count + 1
        ends = is_any(token, stop_ids) | (count >= limit)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=state.count, axis=2)
        before = _pick(state.running, beam)
        extended = Hypotheses(put(before.ids, token), put(before.logprobs, logprob), best, ends)

        going, chosen = jax.lax.top_k(jnp.where(ends, best + LOW, best), k)  # [B, K]
        running, beam, token = _pick((extended, beam, token), chosen)
        running = running.replace(scores=going)  # pyright: ignore

        ends &= jnp.arange(2 * k) < k
        full = until_full & jnp.all(state.best.ended, axis=1, keepdims=True)
        barred = LOW * (full.astype(jnp.float32) + ~state.open + ~ends)
        new = extended.replace(scores=best / divisors[0, count] + barred, ended=ends)  # pyright: ignore
        merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), state.best, new)
        found = _pick(merged, jax.lax.top_k(merged.scores, k)[1])

        potential = running.scores[:, :1] / divisors[1, count]
        worst = jnp.min(found.scores, axis=1, keepdims=True)
        still = jnp.any(potential > jnp.where(found.ended, worst, LOW), axis=1, keepdims=True)
        if seen is not None:
            rows = jnp.arange(batch_size)[:, None], jnp.arange(k)[None, :]
            seen = _pick(seen, beam).at[*rows, token].set(True)
        cache = _reorder(cache, axes, beam)
        return _State(cache, token, count, seen, running, found, state.open & still)

    def unfinished(state: _State) -> jax.Array:
        some_open = jnp.any(state.open & filled[:, None])
        all_full = until_full & jnp.all(jnp.where(filled[:, None], state.best.ended, True))
        return (state.count < limit) & some_open & ~all_full

    shape = (batch_size, k)
    nothing = Hypotheses(
        ids=jnp.zeros((*shape, bucket), jnp.int32),
        logprobs=jnp.zeros((*shape, bucket)),
        scores=jnp.full(shape, LOW),
        ended=jnp.zeros(shape, bool),
    )
    seen = None
    if penalty is not None:
        seen = jnp.repeat(mark_seen(prompts, model.config.vocab_size)[:, None], k, axis=1)
    first = jnp.where(jnp.arange(k) == 0, 0.0, LOW)  # else all beams would be the same
    cache = start(prompts, encoder)
    state = _State(
        cache=jax.tree.map(lambda x, a: x if a < 0 else jnp.repeat(x, k, axis=a), cache, axes),
        token=jnp.tile(jnp.asarray(prompts.ids[:, -1:]), (1, k)),
        count=jnp.zeros((), jnp.int32),
        seen=seen,
        running=nothing.replace(scores=jnp.tile(first, (batch_size, 1))),  # pyright: ignore
        best=nothing,
        open=jnp.ones((batch_size, 1), bool),
    )
    found = jax.lax.while_loop(unfinished, advance, state).best
    return jax.tree.map(lambda x: rules.constrain(x, *(None,) * x.ndim), found)


def row_axes(
    start: Callable[[Tokens, Tokens | None], Cache], prompts: Tokens, encoder: Tokens | None
) -> Cache:
    """For every leaf of the cache that `start` makes, the axis that rows stand along: the one that
    is twice as long for twice as many rows. -1: a leaf that all rows share.
    """

    def shapes(times: int) -> Cache:
        def more(x: Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((times * x.shape[0], *x.shape[1:]), x.dtype)

        return jax.eval_shape(start, *jax.tree.map(more, (prompts, encoder)))

    def axis(one: jax.ShapeDtypeStruct, two: jax.ShapeDtypeStruct) -> int:
        grown = [i for i in range(one.ndim) if one.shape[i] != two.shape[i]]
        assert len(grown) < 2, f"a cache leaf has rows along several axes: {one.shape}"
        return grown[0] if grown else -1

    return jax.tree.map(axis, shapes(1), shapes(2))


def _reorder(cache: Cache, axes: Cache, beam: Array) -> Cache:
    """Streams replaced by those of beam: int32 [B, K], a beam of the same row: every device keeps
    its rows.
    """
    batch_size, k = beam.shape

    def one(x: Array, axis: int) -> Array:
        if axis < 0:
            return x
        split = x.reshape(*x.shape[:axis], batch_size, k, *x.shape[axis + 1 :])
        index = beam.reshape((1,) * axis + beam.shape + (1,) * (x.ndim - axis - 1))
        return jnp.take_along_axis(split, index, axis=axis + 1).reshape(x.shape)

    return jax.tree.map(one, cache, axes)


def _pick(tree: T, chosen: Array) -> T:
    """Entries chosen: int32 [B, K] of each row of arrays [B, N, ...]."""

    def one(x: Array) -> jax.Array:
        index = chosen.reshape(chosen.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    return jax.tree.map(one, tree)
