"""Two towers, of pictures and of texts, into one space: CLIP (arXiv:2103.00020) and SigLIP
(arXiv:2303.15343) are values of this `Config`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.layers.attention_scores import AttentionScores
from lm.layers.base_config import require
from lm.layers.block_config import BlockConfig
from lm.layers.linear import Linear, parameter
from lm.layers.transformer import Transformer, check_kernels
from lm.layers.vision import (
    PictureConfig,
    TowerConfig,
    TwoWayBlocks,
    VisionTransformer,
    unsharded_length,
)
from lm.models.vocabulary import NO_PIPELINE, VocabularyModel, check_pictures, check_unsharded
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens


@dataclasses.dataclass(frozen=True)
class TextConfig(TowerConfig):
    embed_dim: int = field(512, "Width of the residual stream.", ge=1)
    num_heads: int = field(8, "Heads.", ge=1)
    is_causal: bool = field(True, "Tokens see those before them alone (CLIP), or all (SigLIP).")
    pad_id: int | None = field(
        None,
        "Texts are filled up to max_length with this id, which is read like any other (SigLIP); "
        "unset: padding is not seen.",
        ge=0,
    )


@dataclasses.dataclass(frozen=True)
class Config(PictureConfig):
    vocab_size: int = field(
        49_408, "Rows of the embedding; at least the tokenizer's vocabulary.", ge=1, le=2**31 - 1
    )
    max_length: int = field(77, "Longest text; the table size of its positions.", ge=1)
    embedding_dim: int = field(512, "Numbers of an embedding.", ge=1)
    text: TextConfig = field(TextConfig(), "The transformer of texts.")
    project_images: bool = field(
        True, "Pictures are projected to embedding_dim; else it is vision.embed_dim (SigLIP)."
    )
    text_projection_bias: bool = field(False, "The projection of texts has a bias (SigLIP).")
    has_logit_bias: bool = field(False, "A learnt number is added to all logits (SigLIP).")
    init_logit_scale: float = field(1 / 0.07, "Initial factor on cosines.", gt=0)
    init_logit_bias: float = field(-10.0, "Initial number added to logits.", gt=-math.inf)
    max_logit_scale: float | None = field(
        100.0, "Largest factor on cosines; unset: any, as in SigLIP.", gt=0
    )

    @property
    def text_blocks(self) -> BlockConfig:
        return self.make_blocks(self.text, BlockConfig if self.text.is_causal else TwoWayBlocks)

    @property
    def attention_scores(self) -> tuple[AttentionScores, ...]:
        """Those of pictures and of texts."""
        return (*super().attention_scores, *self.text_blocks.attention_scores)

    def image_positions(self, name: str) -> int | None:
        """As `PictureConfig.image_positions`."""
        return None if name.startswith("text.") else super().image_positions(name)

    def check(self, length: int) -> None:
        """As `PictureConfig.check`."""
        super().check(length)
        self.text.check("text")
        require(
            length <= self.max_length,
            f"max_length ({self.max_length}) must be at least config.data.length ({length})",
        )
        require(
            self.project_images or self.embedding_dim == self.vision.embed_dim,
            f"embedding_dim ({self.embedding_dim}) must be vision.embed_dim "
            f"({self.vision.embed_dim}) without project_images",
        )
        pad = self.text.pad_id
        require(
            pad is None or pad < self.vocab_size,
            f"text.pad_id ({pad}) must be below vocab_size ({self.vocab_size})",
        )


class TextTower(VocabularyModel, Transformer):
    """Texts to vectors. Parameters: `embedding`, `position` where learned, and those of
    `Transformer`.
    """

    config: BlockConfig  # pyright: ignore

    def setup(self) -> None:
        super().setup()
        self.position = self.make_positions()

    def __call__(self, inputs: Tokens, *, train: bool = False) -> jax.Array:
        """inputs: [B, T] -> the state of the last token of each row, [B, 1, D]."""
        x = self.embed(inputs, self.position)
        x = self.rules.constrain(x, "act_batch", "act_length", "act_embed")
        x = self.dropout(x, deterministic=not train)
        x, _, _ = self.run(x, inputs, train=train)
        number = jnp.arange(x.shape[1]) * (inputs.segments != 0)
        last = jnp.argmax(number, axis=1)[:, None, None]  # padding alone: 0
        return jnp.take_along_axis(x, last, axis=1)


class Clip(nn.Module):
    """The model. Parameters: `vision`, `text`, `image_projection` where used, `text_projection`,
    `logit_scale` [], which is the logarithm of the factor, and `logit_bias` [] where used.

    Hidden states are embeddings of length 1, float32 [B, 2, E]: of the picture and of the text of
    each row. "Logits" are those of all pictures with all texts.
    """

    config: Config
    rules: Rules
    num_pipeline_microbatches = 1

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.vision = VisionTransformer(c.image_blocks, unsharded_length(self.rules), picture=c)
        blocks = dataclasses.replace(
            c.text_blocks, vocab_size=c.vocab_size, max_length=c.max_length
        )
        self.text = TextTower(blocks, self.rules)
        linear = functools.partial(
            Linear, rules=unsharded_length(self.rules), dtype=dtype, lora=c.lora, unrounded=True
        )
        outputs = {"mlp": c.embedding_dim}
        if c.project_images:
            self.image_projection = linear({"embed": c.vision.embed_dim}, outputs)
        self.text_projection = linear(
            {"embed": c.text.embed_dim}, outputs, bias=c.text_projection_bias
        )
        constant = nn.initializers.constant
        init = constant(math.log(c.init_logit_scale))
        self.logit_scale = parameter(self, "logit_scale", init, (), ())
        if c.has_logit_bias:
            init = constant(c.init_logit_bias)
            self.logit_bias = parameter(self, "logit_bias", init, (), ())

    def __call__(
        self,
        inputs: Tokens,
        *,
        encoder: Tokens | None = None,
        cache: Cache | None = None,
        train: bool = False,
        images: Array | None = None,
    ) -> Output:
        """Embeddings of images, uint8 [B, height, width, 3], and of the texts, inputs [B, T]."""
        images = check_pictures("clip", images, encoder, cache)
        pictures = self.embed_images(images, train=train)
        texts = self.embed_texts(inputs, train=train)
        hidden = jnp.stack([pictures, texts], axis=1)
        return Output(hidden=self.rules.constrain(hidden, "act_batch", None, None))

    def embed_images(self, images: Array, *, train: bool = False) -> jax.Array:
        """images: uint8 [B, height, width, 3] -> their embeddings, float32 [B, E]."""
        x = self.vision(images, train=train)
        return _unit(self.image_projection(x) if self.config.project_images else x)

    def embed_texts(self, inputs: Tokens, *, train: bool = False) -> jax.Array:
        """inputs: [B, T] -> embeddings of texts, float32 [B, E]."""
        return _unit(self.text_projection(self.text(self._filled(inputs), train=train)))

    def _filled(self, inputs: Tokens) -> Tokens:
        c = self.config
        if c.text.pad_id is None:
            return inputs
        ids = jnp.where(inputs.segments != 0, inputs.ids, c.text.pad_id)
        missing = c.max_length - ids.shape[1]
        ids = jnp.pad(ids, ((0, 0), (0, missing)), constant_values=c.text.pad_id)
        positions = jnp.broadcast_to(jnp.arange(c.max_length), ids.shape)
        return Tokens(ids, jnp.ones_like(ids), positions)

    def scale_and_bias(self) -> tuple[jax.Array, jax.Array]:
        """The factor on cosines and the number that is added, float32 []."""
        x, limit = self.logit_scale, self.config.max_logit_scale
        scale = jnp.exp(x if limit is None else _at_most(math.log(limit), x))
        return scale, self.logit_bias if self.config.has_logit_bias else jnp.float32(0)

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: float32 [B, 2, E] -> float32 [B, B]: rows are pictures, columns texts."""
        scale, bias = self.scale_and_bias()
        pictures, texts = hidden[:, 0], hidden[:, 1]
        return scale * jnp.matmul(pictures, texts.T, precision="highest") + bias

    @property
    def head_params(self) -> tuple[str, ...]:
        return ("logit_scale", "logit_bias") if self.config.has_logit_bias else ("logit_scale",)

    def init_cache(self, batch_size: int, length: int) -> Cache:
        raise ValueError("config.model.name=clip generates nothing: it compares pictures and texts")


def _unit(x: Array) -> jax.Array:
    """x: [B, 1, E] divided by its length, float32 [B, E]."""
    x = x[:, 0].astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at_most(limit: float, x: Array) -> jax.Array:
    """min(x, limit), of which x beyond the limit has a gradient where a step makes it smaller: by
    that of the minimum, it would stay there for ever.
    """
    return jnp.minimum(x, limit)


_at_most.defvjp(
    lambda limit, x: (_at_most(limit, x), x),
    lambda limit, x, dy: (jnp.where(x < limit, dy, jnp.maximum(dy, 0)),),
)


def build(config: Config, rules: Rules) -> Clip:
    """Raise ValueError where the mesh can't do what the config asks for."""
    check_unsharded(
        "clip",
        rules,
        length="texts and pictures are short; use data, fsdp or tensor",
        layers=NO_PIPELINE,
    )
    check_kernels(config.image_blocks, rules)
    check_kernels(config.text_blocks, rules)
    return Clip(config, rules)
