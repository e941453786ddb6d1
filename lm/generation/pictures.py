"""Codes of pictures from prompts, by a model of `lm.objectives.dalle`, and grids of pictures.

A prompt is a caption as training has it: bos, its tokens, eos, and the codes after it, at the
positions of the grid. An encoder reads the caption, and codes begin with bos. Only codes are
sampled, as many as a picture has.
"""

from __future__ import annotations

import functools
import io
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.generation.buckets import batch_size, bucket, encode, pad
from lm.generation.decode import next_logits, prefill_cache, without_length
from lm.generation.sampling import Sampling, choose
from lm.layers.cross_entropy import token_nll
from lm.objectives import ModelInterface, dalle
from lm.optim.param_tree import unstack_layers
from lm.tokenizers.tokenizer import Tokenizer
from lm.types import Array, HostTokens, Model, Params, Tokens

MAX_ROWS = 64  # of a batch, those of guidance aside, on each device
_SMALLEST = 128  # pixels of a picture in a grid: smaller ones are enlarged by whole numbers
_GAP = 4


@functools.partial(
    jax.jit, static_argnames=("model", "count", "ids", "top_k", "nucleus", "is_guided")
)
def draw_codes(
    model: Model,
    params: Params,
    prompts: Tokens,
    encoder: Tokens | None,
    seed: Array,
    names: Array,
    values: Array,
    guidance: Array,
    *,
    count: int,
    ids: tuple[int, int],
    top_k: int,
    nucleus: bool,
    is_guided: bool,
) -> tuple[jax.Array, jax.Array]:
    """(codes int32 [B, count], their log-probabilities float32 [B] without guidance).

    prompts, encoder, names, seed: as of `lm.generation.decode.prefill`; with is_guided, [2 B, ...],
    and every other row has the empty caption. Logits are then u + guidance * (c - u) of those with
    the caption, c, and without it, u (arXiv:2207.12598). values: those of `choose`. ids: of the
    first code, and after the last.
    """
    first, stop = ids
    repeats = 2 if is_guided else 1
    length = prompts.ids.shape[1] - 1 + count
    cache = prefill_cache(model, params, prompts, encoder, length=length)
    key = jax.random.key(seed)
    keys = jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(key, a), b))(*names)

    def step(
        carry: tuple[Array, Array, Array], number: Array
    ) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        cache, token, position = carry
        cache, logits = next_logits(model, params, cache, token, position)
        logits = logits[:, first:stop].reshape(-1, repeats, stop - first)
        plain = guided = logits[:, 0]
        if is_guided:
            guided = logits[:, 1] + guidance * (plain - logits[:, 1])
        of_step = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
        code = choose(guided, of_step, values, top_k=top_k, nucleus=nucleus)
        logprob = -token_nll(plain, code)[0]
        token = jnp.repeat(code + first, repeats)
        return (cache, token.astype(jnp.int32), position + 1), (code, logprob)

    start = cache, jnp.asarray(prompts.ids[:, -1]), jnp.asarray(prompts.positions[:, -1])
    _, (codes, logprobs) = jax.lax.scan(step, start, jnp.arange(count))
    rules = model.rules
    codes, total = codes.T.astype(jnp.int32), jnp.sum(logprobs, axis=0)
    return rules.constrain(codes, None, None), rules.constrain(total, None)


class Painter:
    """Drawings with one model and its parameters, on the mesh of `model.rules`."""

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        config: dalle.Config,
        interface: ModelInterface,
    ) -> None:
        """config, interface: of the objective that the model was trained with."""
        self.model, self.tokenizer = without_length(model), tokenizer
        self.count = config.codes_per_picture
        self.caption_length = dalle.caption_length(config, interface)
        first = dalle.first_code(config, tokenizer, interface)
        self.ids = first, first + config.num_codes
        self.takes_encoder = model.config.takes_encoder
        rules = model.rules
        on_one_cpu = rules.platform == "cpu" and rules.mesh.size == 1
        self._params = unstack_layers(params) if on_one_cpu else params

    def draw(
        self,
        prompts: Sequence[str],
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        guidance: float = 1.0,
        report: Callable[[int, int], object] = lambda done, count: None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(codes int32 [prompts, samples, P], their log-probabilities, float32 [prompts, samples]).

        A drawing is a function of the parameters, its prompt, `sampling`, `guidance` and its number
        among the samples. guidance: 1: none; above 1, captions that were dropped in training
        (config.objective.caption_dropout) push samples towards the prompt.

        Raises:
            ValueError: a prompt is longer than captions may be.
        """
        found = [self._caption(i, prompt) for i, prompt in enumerate(prompts)]
        rows = [(i, j) for i in range(len(prompts)) for j in range(sampling.num_samples)]
        shards, width = self.model.rules.size("batch"), max(map(len, found), default=1)
        size = min(batch_size(len(rows), shards), MAX_ROWS * shards)
        codes, logprobs = [], []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            captions = [found[i] for i, _ in part]
            made = self._draw(captions, [j for _, j in part], size, width, sampling, guidance)
            for all_of, new in zip((codes, logprobs), made, strict=True):
                all_of.append(np.asarray(new)[: len(part)])
            report(start + len(part), len(rows))
        shape = len(prompts), sampling.num_samples
        return (
            np.concatenate(codes).reshape(*shape, self.count),
            np.concatenate(logprobs).reshape(shape),
        )

    def _caption(self, i: int, prompt: str) -> np.ndarray:
        """The ids of a prompt and an eos, int32 [n]."""
        ids = encode(self.tokenizer, prompt, self.ids[0], f"prompt {i}: ")
        if len(ids) + 1 > self.caption_length:
            raise ValueError(
                f"prompt {i} has {len(ids) + 1} tokens with its eos: captions of this model have "
                f"at most {self.caption_length}"
            )
        return np.append(ids, self.tokenizer.eos_id).astype(np.int32)

    def _draw(
        self,
        captions: list[np.ndarray],
        samples: list[int],
        size: int,
        width: int,
        sampling: Sampling,
        guidance: float,
    ) -> tuple[jax.Array, jax.Array]:
        """`draw_codes` of up to `size` captions of up to `width` tokens."""
        names = np.zeros((2, size), np.uint32)
        hashes = [zlib.crc32(caption.tobytes()) for caption in captions]
        names[:, : len(captions)] = hashes, samples
        is_guided = guidance != 1
        if is_guided:
            empty = np.array([self.tokenizer.eos_id], np.int32)
            captions = [row for caption in captions for row in (caption, empty)]
        inputs, encoder = self._rows(captions, size * (2 if is_guided else 1), width)
        num_codes = self.ids[1] - self.ids[0]
        top_k = 1 if sampling.temperature == 0 else min(sampling.top_k, num_codes)
        return draw_codes(
            self.model,
            self._params,
            inputs,
            encoder,
            np.uint32(sampling.seed),
            names,
            np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float32),
            np.float32(guidance),
            count=self.count,
            ids=self.ids,
            top_k=top_k,
            nucleus=sampling.top_p < 1 and top_k != 1,
            is_guided=is_guided,
        )

    def _rows(
        self, captions: list[np.ndarray], size: int, width: int
    ) -> tuple[HostTokens, HostTokens | None]:
        """(the tokens of the (de)coder, those of the encoder), one row for each caption."""
        bos = np.array([self.tokenizer.bos_id], np.int32)
        if self.takes_encoder:
            slot = 2  # of padding: the encoder is read by the first call, before bos
            return pad([bos] * len(captions), size, slot), pad(captions, size, bucket(width))
        streams = [np.concatenate([bos, caption]) for caption in captions]
        inputs = pad(streams, size, bucket(width) + 1)
        # the eos stands where it predicts the first code
        inputs.positions[: len(streams), -1] = self.caption_length
        return inputs, None


def grid_png(pictures: np.ndarray) -> bytes:
    """A PNG file of pictures, uint8 [rows, columns, height, width, 3]."""
    from PIL import Image

    rows, columns, height, width, _ = pictures.shape
    factor = max(1, -(-_SMALLEST // max(height, width)))
    large = pictures.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width = height * factor, width * factor
    canvas = np.full(
        (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8
    )
    for i, j in np.ndindex(rows, columns):
        y, x = i * (height + _GAP), j * (width + _GAP)
        canvas[y : y + height, x : x + width] = large[i, j]
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, "PNG")
    return file.getvalue()
