"""Text from a model: one prefill, then a loop of cached steps that stays on the device.

The first input of a prompt is `tokenizer.bos_id`, since training shifts every document right.
Prompts of different lengths are padded on the left, in segment 0, so that the rows of a batch end
in the same slot. All inputs but the last go into the cache in one call, which computes no logits;
then each step feeds one token and samples the next.

Shapes are rounded up to buckets, so that one compilation serves many prompts. Temperature, top_p
and min_p are arguments of it; top_k, and whether there is a top_p at all, are compiled in.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.types import Array, Cache, Model, Params, Tokens

Prompt: TypeAlias = str | Sequence[int] | np.ndarray  # text, or ids without bos
CHUNK = 8  # tokens between two looks of the host: a stream's latency, a stop string's overshoot


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How prompts are continued.

    The filters apply in the order top_k, top_p, min_p, each to what the one before has left. top_p
    keeps the smallest set of most likely tokens with this probability (arXiv:1904.09751), and all
    that are as likely as its last; min_p keeps those at least this many times as likely as the best
    (arXiv:2407.01082).
    """

    temperature: float = 1.0  # divides the logits; 0: greedy
    top_k: int = 0  # most likely tokens that are kept; 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    num_samples: int = 1  # continuations of each prompt
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end a continuation, and are left out of it

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "finite and not negative"),
            ("top_k", self.top_k >= 0, "positive, or 0 for all"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("num_samples", self.num_samples > 0, "positive"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2**32)"),
            ("stop", "" not in self.stop, "without empty strings, which end a text at once"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


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

    @property
    def text(self) -> str:
        """`data` as text; bytes that are no UTF-8 become U+FFFD."""
        return self.data.decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next bytes of a continuation, of whole characters; the last piece brings the whole."""

    prompt: int
    sample: int
    data: bytes
    generation: Generation | None = None


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
        sampling: Sampling = Sampling(),
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
        sampling: Sampling = Sampling(),
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
            _Row(i, j, limit, sampling.stop, tokenizer)
            for i in range(len(inputs))
            for j in range(sampling.num_samples)
        ]
        shards = model.rules.size("batch")
        batch_size = shards * _power_of_two(-(-len(rows) // shards))
        prompts = _pad([inputs[row.prompt] for row in rows], batch_size)
        names = np.zeros((2, batch_size), np.uint32)
        names[:, : len(rows)] = np.transpose(
            [(zlib.crc32(inputs[row.prompt].tobytes()), row.sample) for row in rows]
        )
        state = _prefill(
            model,
            self.params,
            prompts,
            np.uint32(sampling.seed),
            names,
            length=prompts.ids.shape[1] - 1 + _bucket(limit),
        )
        top_k = 1 if sampling.temperature == 0 else min(sampling.top_k, tokenizer.vocab_size)
        done = np.arange(batch_size) >= len(rows)
        for start in range(0, limit, chunk):
            count = min(chunk, limit - start)
            state, *new = _decode(
                model,
                self.params,
                state,
                done,
                np.int32(count),
                np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float32),
                chunk=_bucket(min(chunk, limit)),
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


class _Row:
    """The host's side of one continuation: what came, where it ends, which bytes may be shown."""

    def __init__(
        self, prompt: int, sample: int, limit: int, stop: Sequence[str], tokenizer: Any
    ) -> None:
        self.prompt, self.sample, self.finished = prompt, sample, ""
        self._limit, self._tokenizer = limit, tokenizer
        self._stops = tuple(text.encode() for text in stop)
        self._longest = max(map(len, self._stops), default=0)
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._data = bytearray()
        self._released = 0

    def add(self, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Takes tokens up to the one that ends the text: the same one however they are grouped."""
        for i, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
            before = len(self._data)
            self._ids.append(i)
            self._logprobs.append(logprob)
            self._data += self._tokenizer.decode_bytes([i])
            cut = self._find_stop(before)
            if cut is not None:
                del self._data[cut:]
                self.finished = "stop"
            elif i == self._tokenizer.eos_id:
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

    def release(self) -> bytes:
        """The bytes not shown yet, without half a character or what may begin a stop string."""
        fresh = bytes(self._data[self._released :])
        if not self.finished:
            for held in range(min(len(fresh), self._longest - 1), 0, -1):
                if any(stop.startswith(fresh[-held:]) for stop in self._stops):
                    fresh = fresh[:-held]
                    break
            fresh = fresh[: _whole_characters(fresh)]
        self._released += len(fresh)
        return fresh

    def generation(self) -> Generation:
        return Generation(
            self.prompt,
            self.sample,
            np.array(self._ids, np.int32),
            np.array(self._logprobs, np.float32),
            bytes(self._data),
            self.finished,
        )


def _whole_characters(data: bytes) -> int:
    """Number of bytes before a UTF-8 character that `data` begins but doesn't end."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # a first byte; its high bits count the bytes of the character
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < needed else len(data)
        if byte < 0x80:
            break
    return len(data)


def _power_of_two(n: int) -> int:
    """n rounded up to a power of two."""
    return 1 << (n - 1).bit_length()


def _bucket(n: int) -> int:
    """n rounded up, beyond 64 by less than a quarter: 0, 16, 32, 48, 64, 80, ... 128, 160, ..."""
    step = max(16, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def _pad(inputs: list[np.ndarray], batch_size: int) -> Tokens:
    """Rows [B, bucket + 1] that end with `inputs`; rows beyond those are all padding."""
    width = _bucket(max(map(len, inputs)) - 1) + 1
    ids, segments, positions = (np.zeros((batch_size, width), np.int32) for _ in range(3))
    for i, x in enumerate(inputs):
        ids[i, -len(x) :] = x
        segments[i, -len(x) :] = 1
        positions[i, -len(x) :] = np.arange(len(x))
    return Tokens(ids, segments, positions)


@flax.struct.dataclass
class _State:
    """What one step leaves to the next."""

    cache: Cache
    token: Array  # int32 [B]: the next input, which the cache doesn't hold yet
    position: Array  # int32 [B]: its position
    count: Array  # int32 []: tokens generated so far
    keys: Array  # PRNG keys [B]


@functools.partial(jax.jit, static_argnames=("model", "length"))
def _prefill(
    model: Model, params: Params, prompts: Tokens, seed: Array, names: Array, *, length: int
) -> _State:
    """The state after all but the last of prompts: [B, P + 1], with a cache of `length` slots.

    names: uint32 [2, B] make the key of a row, together with the seed.
    """
    batch_size, width = prompts.ids.shape
    cache = model.init_cache(batch_size, length)
    if width > 1:
        inputs = jax.tree.map(lambda x: model.rules.constrain(x[:, :-1], "batch", None), prompts)
        cache = model.apply({"params": params}, inputs, cache=cache).cache
    key = jax.random.key(seed)
    return _State(
        cache=cache,
        token=jnp.asarray(prompts.ids[:, -1]),
        position=jnp.asarray(prompts.positions[:, -1]),
        count=jnp.zeros((), jnp.int32),
        keys=jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(key, a), b))(*names),
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "chunk", "top_k", "nucleus", "eos_id", "vocab_size"),
    donate_argnames=("state",),
)
def _decode(
    model: Model,
    params: Params,
    state: _State,
    done: Array,
    limit: Array,
    values: Array,
    *,
    chunk: int,
    top_k: int,
    nucleus: bool,
    eos_id: int,
    vocab_size: int,
) -> tuple[_State, jax.Array, jax.Array]:
    """(state, ids, log-probabilities) after `limit` steps, or when all rows are done.

    done: bool [B]; values: those of `choose`; ids and log-probabilities: [B, chunk], of which the
    first `limit` columns count, and in a row those up to its eos.
    """
    rules, variables = model.rules, {"params": params}
    batch_size = state.token.shape[0]

    def step(carry: Any) -> Any:
        i, state, done, ids, logprobs = carry
        inputs = Tokens(
            ids=rules.constrain(state.token[:, None], "batch", None),
            segments=jnp.ones((batch_size, 1), jnp.int32),
            positions=state.position[:, None],
        )
        output = model.apply(variables, inputs, cache=state.cache)
        logits = model.apply(variables, output.hidden, method="logits")[:, 0]  # [B, V]
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.count)
        known = jnp.arange(logits.shape[1]) < vocab_size  # the model may have more rows than that
        allowed = jnp.where(known, logits, -jnp.inf)
        token = choose(allowed, keys, values, top_k=top_k, nucleus=nucleus)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=1)
        ids = jax.lax.dynamic_update_index_in_dim(ids, token, i, 1)
        logprobs = jax.lax.dynamic_update_index_in_dim(logprobs, logprob, i, 1)
        state = _State(output.cache, token, state.position + 1, state.count + 1, state.keys)
        return i + 1, state, done | (token == eos_id), ids, logprobs

    def unfinished(carry: Any) -> jax.Array:
        return (carry[0] < limit) & ~jnp.all(carry[2])

    shape = (batch_size, chunk)
    start = (0, state, jnp.asarray(done), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    _, state, _, ids, logprobs = jax.lax.while_loop(unfinished, step, start)
    return state, rules.constrain(ids, None, None), rules.constrain(logprobs, None, None)


def lower_decode(model: Model, params: Params, *, batch_size: int, length: int) -> Any:
    """The loop of cached steps that `Generator` runs, greedy, lowered and ready to compile.

    params: shapes with shardings. batch_size: rows; length: slots of their cache.
    """
    model = without_length(model)
    ids, names = np.zeros((batch_size, 1), np.int32), np.zeros((2, batch_size), np.uint32)
    # A prefill of nothing: its compiler says where the state lies.
    arguments = (params, Tokens(ids, ids, ids), np.uint32(0), names)
    empty = _prefill.lower(model, *arguments, length=length)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        empty.out_info,
        empty.compile().output_shardings,
    )
    return _decode.lower(
        model,
        params,
        state,
        np.zeros(batch_size, bool),
        np.int32(CHUNK),
        np.zeros(3, np.float32),
        chunk=CHUNK,
        top_k=1,
        nucleus=False,
        eos_id=-1,
        vocab_size=model.config.vocab_size,
    )


def without_length(model: Model) -> Model:
    """The model with the length whole on every device: a step has one token for each row."""
    table = tuple(
        (n, None if n in ("length", "act_length") else axes) for n, axes in model.rules.table
    )
    return cast(Any, model).clone(rules=dataclasses.replace(model.rules, table=table))


def choose(logits: Array, keys: Array, values: Array, *, top_k: int, nucleus: bool) -> jax.Array:
    """Sampled ids, int32 [B], of logits: float32 [B, V].

    values: temperature, top_p (read with `nucleus`), min_p. A draw is the argmax of logits plus
    Gumbel noise from keys: [B]. The vocabulary is never sorted: that takes longer on a CPU than the
    step of a small model.
    """
    if top_k == 1:
        return jnp.argmax(logits, axis=1)
    temperature, top_p, min_p = values
    ids = None
    if top_k:
        logits, ids = jax.lax.top_k(logits, top_k)
    logits = (logits - jnp.max(logits, axis=1, keepdims=True)) / temperature
    if nucleus:
        logits = jnp.where(_nucleus(jax.nn.softmax(logits), top_p), logits, -jnp.inf)
    logits = jnp.where(logits >= jnp.log(min_p), logits, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    place = jnp.argmax(logits + noise, axis=1)
    return place if ids is None else jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0]


def _nucleus(probabilities: Array, top_p: Array) -> jax.Array:
    """bool [B, V]: the fewest largest probabilities that sum to `top_p`, and ties with the least.

    The least is the highest threshold that leaves enough. Floats that aren't negative are ordered
    like their bits, so 30 halvings between the bits of 0 and of 1 find it exactly.
    """
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        left = jnp.sum(jnp.where(bits >= middle[:, None], probabilities, 0), axis=1)
        enough = left >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(bits.shape[:1], jnp.int32)
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, jnp.full_like(low, 0x3F800001)))  # above 1.0
    return bits >= low[:, None]
