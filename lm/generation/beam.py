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

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.generation.decode import is_any, mark_seen, next_logits, prefill_cache, valid_token_mask
from lm.generation.sampling import penalize
from lm.types import Array, Cache, Model, Params, Tokens

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
        for name, good, wanted in (
            ("num_beams", self.num_beams > 0, "positive"),
            # beyond, scores of real texts come near to LOW
            ("length_penalty", -1 <= self.length_penalty <= 5, "in [-1, 5]"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "a bool or never"),
            (
                "num_samples",
                0 < self.num_samples <= self.num_beams,
                f"in 1..num_beams ({self.num_beams})",
            ),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "in [0.001, 1000]"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")

    def divisors(self, limit: int, size: int) -> np.ndarray:
        """float32 [2, size]: divisors of the log-probability of n tokens, if it ends there, and of
        its best possible score if it goes on.
        """
        lengths = np.arange(size, dtype=np.float64).clip(1)
        best = np.full(size, limit) if self._scores_at_limit else lengths
        return np.stack([lengths, best]).astype(np.float64) ** self.length_penalty

    @property
    def _scores_at_limit(self) -> bool:
        return self.early_stopping == "never" and self.length_penalty > 0


@flax.struct.dataclass
class Hypotheses:
    """Continuations of each row, best first."""

    ids: Array  # int32 [B, K, N]
    logprobs: Array  # float32 [B, K, N]: of each token
    scores: Array  # float32 [B, K]


@flax.struct.dataclass
class _State:
    cache: Cache  # of B * K streams
    token: Array  # int32 [B, K]: the next input
    position: Array  # int32 [B]: its position
    count: Array  # int32 []: tokens generated so far
    seen: Array | None  # bool [B, K, V]
    running: Hypotheses
    ended: Hypotheses
    has_ended: Array  # bool [B, K]: entries of `ended` that are in use
    open: Array  # bool [B, 1]: something that goes on may still get among the ended


@functools.partial(
    jax.jit, static_argnames=("model", "num_beams", "bucket", "penalized", "stop_ids", "vocab_size")
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
    penalty: Array,
    *,
    num_beams: int,
    bucket: int,
    penalized: bool,
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
        flat = state.token.reshape(-1)
        position = jnp.repeat(state.position, k)
        cache, logits = next_logits(model, params, state.cache, flat, position)
        own = jax.nn.log_softmax(logits).reshape(batch_size, k, -1)  # [B, K, V]
        scores = own if state.seen is None else penalize(own, state.seen, penalty)
        scores = jnp.where(valid_token_mask(vocab_size, logits), scores, -jnp.inf)
        total = (state.running.scores[:, :, None] + scores).reshape(batch_size, -1)
        best, index = jax.lax.top_k(total, 2 * k)  # [B, 2 K]
        beam, token = index // own.shape[2], (index % own.shape[2]).astype(jnp.int32)
        logprob = jnp.take_along_axis(own.reshape(batch_size, -1), index, axis=1)
        extended = _pick(state.running, beam)
        extended = Hypotheses(
            ids=jax.lax.dynamic_update_index_in_dim(extended.ids, token, state.count, 2),
            logprobs=jax.lax.dynamic_update_index_in_dim(
                extended.logprobs, logprob, state.count, 2
            ),
            scores=best,
        )
        count = state.count + 1
        ends = is_any(token, stop_ids) | (count >= limit)

        going = jnp.where(ends, best + LOW, best)
        going, chosen = jax.lax.top_k(going, k)  # [B, K]
        running = _pick(extended, chosen).replace(scores=going)  # pyright: ignore
        beam, token = (jnp.take_along_axis(x, chosen, axis=1) for x in (beam, token))

        ends &= jnp.arange(2 * k) < k
        full = until_full & jnp.all(state.has_ended, axis=1, keepdims=True)
        barred = LOW * (full.astype(jnp.float32) + ~state.open + ~ends)
        new = extended.replace(scores=best / divisors[0, count] + barred)  # pyright: ignore
        merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), state.ended, new)
        _, kept = jax.lax.top_k(merged.scores, k)
        has_ended = jnp.concatenate([state.has_ended, ends], axis=1)
        has_ended = jnp.take_along_axis(has_ended, kept, axis=1)
        ended = _pick(merged, kept)

        potential = running.scores[:, :1] / divisors[1, count]
        worst = jnp.min(ended.scores, axis=1, keepdims=True)
        still = jnp.any(potential > jnp.where(has_ended, worst, LOW), axis=1, keepdims=True)
        seen = state.seen
        if seen is not None:
            seen = jnp.take_along_axis(seen, beam[:, :, None], axis=1)
            rows = jnp.arange(batch_size)[:, None], jnp.arange(k)[None, :]
            seen = seen.at[*rows, token].set(True)
        return _State(
            cache=_reorder(cache, axes, beam),
            token=token,
            position=state.position + 1,
            count=count,
            seen=seen,
            running=running,
            ended=ended,
            has_ended=has_ended,
            open=state.open & still,
        )

    def unfinished(state: _State) -> jax.Array:
        some_open = jnp.any(state.open & filled[:, None])
        all_full = until_full & jnp.all(jnp.where(filled[:, None], state.has_ended, True))
        return (state.count < limit) & some_open & ~all_full

    shape = (batch_size, k)
    nothing = Hypotheses(
        ids=jnp.zeros((*shape, bucket), jnp.int32),
        logprobs=jnp.zeros((*shape, bucket)),
        scores=jnp.full(shape, LOW),
    )
    seen = None
    if penalized:
        seen = jnp.repeat(mark_seen(prompts, model.config.vocab_size)[:, None], k, axis=1)
    first = jnp.where(jnp.arange(k) == 0, 0.0, LOW)  # else all beams would be the same
    state = _State(
        cache=_expand(start(prompts, encoder), axes, k),
        token=jnp.tile(jnp.asarray(prompts.ids[:, -1:]), (1, k)),
        position=jnp.asarray(prompts.positions[:, -1]),
        count=jnp.zeros((), jnp.int32),
        seen=seen,
        running=nothing.replace(scores=jnp.tile(first, (batch_size, 1))),  # pyright: ignore
        ended=nothing,
        has_ended=jnp.zeros(shape, bool),
        open=jnp.ones((batch_size, 1), bool),
    )
    found = jax.lax.while_loop(unfinished, advance, state).ended
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


def _expand(cache: Cache, axes: Cache, k: int) -> Cache:
    """Every row k times, side by side."""
    return jax.tree.map(lambda x, a: x if a < 0 else jnp.repeat(x, k, axis=a), cache, axes)


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


def _pick(hypotheses: Hypotheses, chosen: Array) -> Hypotheses:
    """Entries chosen: int32 [B, K] of each row."""

    def one(x: Array) -> jax.Array:
        index = chosen.reshape(chosen.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    return jax.tree.map(one, hypotheses)
