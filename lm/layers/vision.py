"""The vision transformer (arXiv:2010.11929): patches of a picture as the tokens of an encoder."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.config.fields import check_values, field
from lm.kernels import attention_kernels
from lm.kernels.dot_product import cross_mask
from lm.layers.attention import CrossAttention, EncoderStates, LayerInputs
from lm.layers.attention_scores import AttentionScores
from lm.layers.base_config import require
from lm.layers.block_config import BlockConfig
from lm.layers.embedding import Embedding
from lm.layers.linear import broadcast_as, initializer, matrix, parameter, project
from lm.layers.lora import LoraConfig
from lm.layers.mlp import ACTIVATIONS, Mlp
from lm.layers.norm import Norm
from lm.layers.positions import sinusoids
from lm.layers.stack import REMAT
from lm.layers.transformer import Transformer
from lm.parallel.sharding import Rules
from lm.types import Array, Tokens

POOLINGS = ("class_token", "mean", "attention")


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes of the blocks of one tower; all linear maps and norms of them have biases."""

    num_layers: int = field(12, "Blocks.", ge=1)
    embed_dim: int = field(768, "Width of the residual stream.", ge=1)
    num_heads: int = field(12, "Heads.", ge=1)
    mlp_dim: int | None = field(None, "Width of the MLP; unset: 4 * embed_dim.", ge=1)
    activation: str = field("gelu", "Activation of the MLP.", choices=ACTIVATIONS)
    norm_eps: float = field(1e-6, "Added to the variance.", gt=0)
    positions: str = field(
        "learned",
        "Positional encoding; sinusoidal: of patches, half of the features for each direction.",
        choices=("learned", "sinusoidal"),
    )

    def check(self, path: str) -> None:
        """Raise ValueError where sizes don't fit together; path: of the section."""
        width, heads = self.embed_dim, self.num_heads
        require(
            width % heads == 0,
            f"{path}.embed_dim ({width}) must be divisible by {path}.num_heads ({heads})",
        )
        require(
            self.positions != "sinusoidal" or width % 4 == 0,
            f"{path}.embed_dim ({width}) must be divisible by 4 for sinusoidal positions",
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
    patch_size: int = field(16, "Height and width of patches.", ge=1)
    patch_bias: bool = field(True, "The embedding of patches has a bias.")
    pre_norm: bool = field(False, "A norm between the embedding and the blocks, as in CLIP.")
    pooling: str = field(
        "class_token",
        "The vector of a picture: a token of its own, the mean of its patches, or a learnt query's "
        "attention to them, with an MLP (SigLIP).",
        choices=POOLINGS,
    )


@dataclasses.dataclass(frozen=True)
class TwoWayBlocks(BlockConfig):
    """Blocks whose tokens see each other both ways."""

    is_causal = False


@dataclasses.dataclass(frozen=True)
class PictureConfig:
    """Config of models with a vision transformer; each adds its own fields."""

    takes_images = True
    takes_encoder = False
    is_causal = False
    tie_embeddings = False

    image_size: int = field(224, "Height and width of pictures.", ge=1)
    image_mean: tuple[float, ...] = field(
        (0.5, 0.5, 0.5), "Of red, green and blue, from 0 to 1; subtracted.", ge=0, le=1
    )
    image_std: tuple[float, ...] = field(
        (0.5, 0.5, 0.5), "Deviations of red, green and blue, divided by.", gt=0
    )
    vision: VisionConfig = field(VisionConfig(), "The transformer of pictures.")
    dropout: float = field(0.0, "Dropout of embeddings and residual branches.", ge=0, lt=1)
    attention_kernel: str = field(
        "auto",
        "xla, splash, flash, cudnn or auto, as in other transformers.",
        choices=attention_kernels.KERNELS,
    )
    init_std: float | None = field(
        0.02, "Deviation of initial weights; unset: fan_in ** -0.5.", gt=0
    )
    lora: LoraConfig = field(LoraConfig(), "Low-rank adapters; with a rank, the rest is frozen.")
    remat: str = field("none", "Activations saved for the backward pass.", choices=REMAT)
    dtype: str = field(
        "float32", "Compute type; parameters stay float32.", choices=("float32", "bfloat16")
    )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.vision.patch_size) ** 2

    @property
    def image_length(self) -> int:
        """Tokens of a picture."""
        return self.num_patches + (self.vision.pooling == "class_token")

    def make_blocks(self, tower: TowerConfig, kind: type[BlockConfig]) -> BlockConfig:
        """The config of a tower's blocks."""
        shared = ("dropout", "attention_kernel", "init_std", "lora", "remat", "dtype")
        own = (f.name for f in dataclasses.fields(TowerConfig))
        biases = dict.fromkeys(("norm_bias", "qkv_bias", "out_bias", "mlp_bias"), True)
        return kind(
            **{name: getattr(self, name) for name in shared},
            **{name: getattr(tower, name) for name in own},
            **biases,
            norm="layer",
        )

    @property
    def image_blocks(self) -> BlockConfig:
        return self.make_blocks(self.vision, TwoWayBlocks)

    @property
    def attention_scores(self) -> tuple[AttentionScores, ...]:
        """Those of a picture's tokens; the one query of attention pooling is not counted."""
        return tuple(
            dataclasses.replace(scores, queries="image", keys="image")
            for scores in self.image_blocks.attention_scores
        )

    def image_positions(self, name: str) -> int | None:
        """The positions of a picture at which the parameter of this name is applied; None: it is
        applied to the tokens of the text. For FLOPs.
        """
        part, *rest = name.split(".")
        if part != "vision":
            return 1
        if rest[0] == "patch":
            return self.num_patches
        is_of_query = rest[0] == "pool" and not {"key", "value"} & set(rest)
        return 1 if is_of_query else self.image_length

    def check(self, length: int) -> None:
        """Raise ValueError, naming config paths and numbers, unless sizes fit together."""
        del length
        check_values(self, "config.model")
        size, patch = self.image_size, self.vision.patch_size
        require(
            size >= patch,
            f"image_size ({size}) must be at least vision.patch_size ({patch})",
        )
        for name, value in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            require(len(value) == 3, f"{name} {value} must be three numbers: red, green, blue")
        require(
            not self.lora.rank or bool(self.lora.targets),
            f"lora.targets ({self.lora.targets}) must be given with a rank ({self.lora.rank})",
        )
        self.vision.check("vision")


def unsharded_length(rules: Rules) -> Rules:
    """Rules of pictures, whose tokens (257, say) no mesh divides: they are on all devices of the
    axes that shard texts.
    """
    table = {**dict(rules.table), "length": None, "act_length": None}
    return dataclasses.replace(rules, table=tuple(table.items()))


class PatchEmbedding(nn.Module):
    """Patches times a matrix. Parameters: `weight` [Px, Py, 3, D], and `bias` [D] where used."""

    patch_size: int
    embed_dim: int
    rules: Rules
    bias: bool
    dtype: DTypeLike
    init_std: float | None

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """x: [B, height, width, 3] -> [B, patches, D], row by row; what is left of a patch at the
        right and at the bottom is not read.
        """
        size, (batch, height, width, channels) = self.patch_size, x.shape
        rows, columns = height // size, width // size
        x = x[:, : rows * size, : columns * size]
        x = x.reshape(batch, rows, size, columns, size, channels)
        x = x.transpose(0, 1, 3, 4, 2, 5)  # [B, rows, columns, Px, Py, 3]
        x = x.reshape(batch, -1, size, size, channels)
        axes = ("taps", "taps", "channels", "embed")
        shape = (size, size, channels, self.embed_dim)
        init = initializer(self.init_std, size**2 * channels)
        weight = matrix(parameter(self, "weight", init, shape, axes), self.dtype, self.rules)
        weight = weight._replace(value=self.rules.collect(weight.value, *axes))
        y = project(x, weight, self.rules, num_in=3)
        if self.bias:
            zeros = nn.initializers.zeros
            y = y + broadcast_as(parameter(self, "bias", zeros, (self.embed_dim,), ("embed",)), y)
        return self.rules.constrain(y, "act_batch", "act_length", "act_embed")


class AttentionPooling(nn.Module):
    """A learnt query's attention to the tokens of a picture, and an MLP, as in SigLIP. Parameters:
    `query` [D], `attention`, `norm` and `mlp`.
    """

    config: BlockConfig
    rules: Rules

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """x: [B, T, D] -> [B, 1, D]."""
        c = self.config
        init = initializer(c.init_std, c.embed_dim)
        query = parameter(self, "query", init, (c.embed_dim,), ("embed",))
        query = broadcast_as(query, x[:, :1])
        query = self.rules.constrain(query, "act_batch", None, "act_embed")
        ones = jnp.ones(x.shape[:2], jnp.int32)
        mask = cross_mask(ones[:, :1], ones)
        inputs = LayerInputs((mask,), (None,), memory=EncoderStates(ones, x))
        y, _ = CrossAttention(c, self.rules, name="attention")(query, inputs, None)
        h = Norm(c.norm, c.norm_eps, c.norm_bias, jnp.dtype(c.dtype), name="norm")(y)
        return y + Mlp(c, self.rules, c.mlp_size, c.mlp_bias, name="mlp")(h)


class VisionTransformer(Transformer):
    """Pictures to vectors. Parameters: `patch`, those of `Transformer`, and `class_token` [D],
    `position`, `pre_norm` and `pool` where used.
    """

    picture: PictureConfig

    def setup(self) -> None:
        super().setup()
        c, v, dtype = self.config, self.picture.vision, jnp.dtype(self.config.dtype)
        self.patch = PatchEmbedding(
            v.patch_size, v.embed_dim, self.rules, v.patch_bias, dtype, c.init_std
        )
        if v.pooling == "class_token":
            zeros = nn.initializers.zeros
            self.class_token = parameter(self, "class_token", zeros, (v.embed_dim,), ("embed",))
        if v.positions == "learned":
            length, std = self.picture.image_length, 0.02 if c.init_std is None else c.init_std
            self.position = Embedding(length, v.embed_dim, self.rules, None, dtype, std)
        if v.pre_norm:
            self.pre_norm = Norm(c.norm, c.norm_eps, c.norm_bias, dtype)
        if v.pooling == "attention":
            self.pool = AttentionPooling(c, self.rules)
        self.dropout = nn.Dropout(c.dropout)

    def __call__(self, images: Array, *, train: bool = False) -> jax.Array:
        """images: uint8 [B, height, width, 3] -> the vectors of pictures, [B, 1, D]."""
        p, v, dtype = self.picture, self.picture.vision, jnp.dtype(self.config.dtype)
        mean, std = (jnp.asarray(x, jnp.float32) for x in (p.image_mean, p.image_std))
        pixels = ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)
        x = self.patch(self.rules.constrain(pixels, "act_batch", None, None, None))
        if v.positions == "sinusoidal":  # a class token has no place in the picture
            x = x + self._sinusoids().astype(dtype)
        if v.pooling == "class_token":
            first = broadcast_as(self.class_token, x[:, :1])
            x = jnp.concatenate([first, x], axis=1)
        if v.positions == "learned":
            x = x + broadcast_as(self.position.weight, x)
        x = self.pre_norm(x) if v.pre_norm else x
        x = self.rules.constrain(x, "act_batch", "act_length", "act_embed")
        x = self.dropout(x, deterministic=not train)
        x, _, _ = self.run(x, tokens_of(x), train=train)
        if v.pooling == "class_token":
            return x[:, :1]
        if v.pooling == "mean":  # in float32
            return jnp.mean(x, axis=1, keepdims=True, dtype=jnp.float32).astype(dtype)
        return self.pool(x)

    def _sinusoids(self) -> jax.Array:
        """float32 [1, patches, D]: of the columns, then of the rows."""
        side = self.picture.image_size // self.picture.vision.patch_size
        row, column = jnp.divmod(jnp.arange(side**2)[None], side)
        half = self.config.embed_dim // 2
        return jnp.concatenate([sinusoids(x, half) for x in (column, row)], axis=-1)


def tokens_of(x: Array) -> Tokens:
    """The tokens of whose embeddings [B, T, D] all see each other."""
    ids = jnp.zeros(x.shape[:2], jnp.int32)
    return Tokens(ids, ids + 1, jnp.broadcast_to(jnp.arange(x.shape[1]), ids.shape))
