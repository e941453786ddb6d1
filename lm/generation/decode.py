"""Generation on the device: one prefill, then a loop of cached steps."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeAlias, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.generation.sampling import choose, penalize
from lm.layers.cross_entropy import token_nll
from lm.types import Array, Cache, Model, Params, Tokens

CHUNK = 8  # tokens between two transfers to the host: a stream's latency, a stop's overshoot


def prefill_cache(
    model: Model, params: Params, prompts: Tokens, encoder: Tokens | None, *, length: int
) -> Cache:
    """A cache of `length` slots that holds all but the last of prompts: [B, P + 1], and what
    cross-attention needs of encoder: [B, S].
    """
    batch_size, width = prompts.ids.shape
    rules = model.rules
    cache = model.init_cache(batch_size, length)
    if width == 1:
        return cache
    inputs = jax.tree.map(lambda x: rules.constrain(x[:, :-1], "batch", None), prompts)
    if encoder is not None:
        encoder = jax.tree.map(lambda x: rules.constrain(x, "batch", None), encoder)
    return model.apply({"params": params}, inputs, encoder=encoder, cache=cache).cache


def next_logits(
    model: Model, params: Params, cache: Cache, token: Array, position: Array
) -> tuple[Cache, jax.Array]:
    """(cache, float32 logits [B, V]) after one more token: int32 [B] at position: int32 [B]."""
    rules, variables = model.rules, {"params": params}
    inputs = Tokens(
        ids=rules.constrain(token[:, None], "batch", None),
        segments=jnp.ones((token.shape[0], 1), jnp.int32),
        positions=position[:, None],
    )
    output = model.apply(variables, inputs, cache=cache)
    return output.cache, model.apply(variables, output.hidden, method="logits")[:, 0]


def valid_token_mask(vocab_size: int, logits: Array) -> jax.Array:
    """bool [V]: the model may have more rows than the tokenizer has ids."""
    return jnp.arange(logits.shape[-1]) < vocab_size


def is_any(token: Array, ids: tuple[int, ...]) -> jax.Array:
    """bool of token's shape: True for one of a few ids."""
    return functools.reduce(jnp.logical_or, (token == i for i in ids), jnp.zeros(token.shape, bool))


def mark_seen(prompts: Tokens, vocab_size: int) -> jax.Array:
    """bool [B, V]: the tokens of prompts: [B, T], padding aside."""
    batch_size = prompts.ids.shape[0]
    rows = jnp.arange(batch_size)[:, None]
    ids = jnp.where(prompts.segments != 0, prompts.ids, vocab_size)  # outside: dropped
    return jnp.zeros((batch_size, vocab_size), bool).at[rows, ids].set(True, mode="drop")


@flax.struct.dataclass
class State:
    """The state between two steps."""

    cache: Cache
    token: Array  # int32 [B]: the next input, which the cache doesn't hold yet
    position: Array  # int32 [B]: its position
    count: Array  # int32 []: tokens generated so far
    keys: Array  # PRNG keys [B]
    seen: Array | None  # bool [B, V]: tokens so far, where repeating them has a penalty


@functools.partial(jax.jit, static_argnames=("model", "length", "penalized"))
def prefill(
    model: Model,
    params: Params,
    prompts: Tokens,
    encoder: Tokens | None,
    seed: Array,
    names: Array,
    *,
    length: int,
    penalized: bool,
) -> State:
    """The state after all but the last of prompts: [B, P + 1], with a cache of `length` slots.

    names: uint32 [2, B] make the key of a row, together with the seed. encoder: [B, S], for models
    that read it.
    """
    key = jax.random.key(seed)
    return State(
        cache=prefill_cache(model, params, prompts, encoder, length=length),
        token=jnp.asarray(prompts.ids[:, -1]),
        position=jnp.asarray(prompts.positions[:, -1]),
        count=jnp.zeros((), jnp.int32),
        keys=jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(key, a), b))(*names),
        seen=mark_seen(prompts, model.config.vocab_size) if penalized else None,
    )


# (steps done, state, done [B], ids [B, chunk], log-probabilities [B, chunk])
Carry: TypeAlias = tuple[Array | int, State, Array, Array, Array]


@functools.partial(
    jax.jit,
    static_argnames=("model", "chunk", "top_k", "nucleus", "stop_ids", "vocab_size"),
    donate_argnames=("state",),
)
def decode(
    model: Model,
    params: Params,
    state: State,
    done: Array,
    limit: Array,
    values: Array,
    penalty: Array,
    *,
    chunk: int,
    top_k: int,
    nucleus: bool,
    stop_ids: tuple[int, ...],
    vocab_size: int,
) -> tuple[State, jax.Array, jax.Array]:
    """(state, ids, log-probabilities) after `limit` steps, or when all rows are done.

    done: bool [B]; values: those of `choose`; penalty: of repetition, read where the state keeps
    the tokens seen; ids and log-probabilities: [B, chunk], of which the first `limit` columns
    count, and in a row those up to one of `stop_ids`.
    """
    rules = model.rules
    batch_size = state.token.shape[0]

    def step(carry: Carry) -> Carry:
        i, state, done, ids, logprobs = carry
        cache, logits = next_logits(model, params, state.cache, state.token, state.position)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.count)
        seen = state.seen
        allowed = logits if seen is None else penalize(logits, seen, penalty)
        allowed = jnp.where(valid_token_mask(vocab_size, logits), allowed, -jnp.inf)
        token = choose(allowed, keys, values, top_k=top_k, nucleus=nucleus)
        logprob = -token_nll(logits, token)[0]
        ids = jax.lax.dynamic_update_index_in_dim(ids, token, i, 1)
        logprobs = jax.lax.dynamic_update_index_in_dim(logprobs, logprob, i, 1)
        if seen is not None:
            seen = seen.at[jnp.arange(batch_size), token].set(True)
        state = State(cache, token, state.position + 1, state.count + 1, state.keys, seen)
        return i + 1, state, done | is_any(token, stop_ids), ids, logprobs

    def unfinished(carry: Carry) -> jax.Array:
        return (carry[0] < limit) & ~jnp.all(carry[2])

    shape = (batch_size, chunk)
    start = (0, state, jnp.asarray(done), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    _, state, _, ids, logprobs = jax.lax.while_loop(unfinished, step, start)
    return state, rules.constrain(ids, None, None), rules.constrain(logprobs, None, None)


def lower_decode(
    model: Model, params: Params, *, batch_size: int, length: int
) -> jax.stages.Lowered:
    """The loop of cached steps that `Generator` runs, greedy, lowered and ready to compile.

    params: shapes with shardings. batch_size: rows; length: slots of their cache.
    """
    model = without_length(model)
    ids, names = np.zeros((batch_size, 1), np.int32), np.zeros((2, batch_size), np.uint32)
    # a prefill of no tokens, for the shardings of the state
    arguments = (params, Tokens(ids, ids, ids), None, np.uint32(0), names)
    empty = prefill.lower(model, *arguments, length=length, penalized=False)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        empty.out_info,
        empty.compile().output_shardings,
    )
    return decode.lower(
        model,
        params,
        state,
        np.zeros(batch_size, bool),
        np.int32(CHUNK),
        np.zeros(3, np.float32),
        np.float32(1),
        chunk=CHUNK,
        top_k=1,
        nucleus=False,
        stop_ids=(),
        vocab_size=model.config.vocab_size,
    )


def without_length(model: Model) -> Model:
    """The model with the length whole on every device: a step has one token for each row."""
    table = tuple(
        (n, None if n in ("length", "act_length") else axes) for n, axes in model.rules.table
    )
    return cast(Any, model).clone(rules=dataclasses.replace(model.rules, table=table))
