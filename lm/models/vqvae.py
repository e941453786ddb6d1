"""VQ-VAE (arXiv:1711.00937): a picture as a grid of codes, by a convolutional encoder and decoder.

Strided convolutions of 4 x 4 halve the picture, residual blocks and a projection give the latents,
each of which becomes the nearest code; the decoder is the same backwards. Where the paper has
transposed convolutions of 4 x 4, there are convolutions of 3 x 3 to four pixels each, which can be
any of those.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config.fields import check_values, field
from lm.layers.base_config import require
from lm.layers.codebook import Codebook
from lm.layers.convolution2d import Convolution2d, depth_to_space
from lm.models.vocabulary import check_pictures, check_unsharded
from lm.parallel.sharding import Rules
from lm.types import Array, Batch, Cache, Output, Sums, Tokens


@dataclasses.dataclass(frozen=True)
class Config:
    """A picture has (image_size / 2 ** num_halvings) ** 2 codes."""

    takes_images = True
    is_causal = False
    takes_encoder = False
    vocab_size = max_length = 2**31 - 1  # no tokens are read

    image_size: int = field(32, "Height and width of pictures.", ge=1)
    num_halvings: int = field(2, "Strided convolutions, each of which halves the picture.", ge=1)
    num_layers: int = field(2, "Residual blocks of the encoder, and of the decoder.", ge=0)
    embed_dim: int = field(128, "Channels.", ge=2)
    mlp_dim: int = field(32, "Channels inside residual blocks.", ge=1)
    num_codes: int = field(512, "Codes.", ge=2, lt=2**31)
    code_dim: int = field(64, "Numbers of a code.", ge=1)
    codebook: str = field(
        "average",
        "Codes as running averages of their latents, or trained by the gradient of their distance.",
        choices=("average", "gradient"),
    )
    codebook_decay: float = field(
        0.99, "Decay of the running averages of codes and of their use.", ge=0, lt=1
    )
    revive_below: float = field(
        0.03,
        "Codes used less than so much of the average code are replaced by latents; 0: none is.",
        ge=0,
        lt=1,
    )
    dtype: str = field(
        "float32", "Compute type; parameters stay float32.", choices=("float32", "bfloat16")
    )

    @property
    def grid_size(self) -> int:
        """Height and width of the grid of codes."""
        return self.image_size // 2**self.num_halvings

    def check(self, length: int) -> None:
        """Raise ValueError where sizes don't fit together, for captions of any length."""
        del length
        check_values(self, "config.model")
        factor = 2**self.num_halvings
        require(
            self.image_size % factor == 0,
            f"image_size ({self.image_size}) must be divisible by 2 ** num_halvings ({factor})",
        )
        require(self.embed_dim % 2 == 0, f"embed_dim ({self.embed_dim}) must be even")

    def image_positions(self, name: str) -> int:
        """The positions of a picture at which the parameter of this name is applied: for FLOPs."""
        part, module, *_ = name.split(".")
        size = self.grid_size
        if module.startswith("resize"):
            number = int(module.removeprefix("resize"))
            size *= 2**number  # before it is doubled
            if part == "image_encoder":  # after it was halved
                size = self.image_size // 2 ** (number + 1)
        return size**2


class ResidualStack(nn.Module):
    """Residual blocks, x + conv1x1(relu(conv3x3(relu(x)))). Parameters: `wide0`, `narrow0`, ..."""

    config: Config
    rules: Rules

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        outer, inner = ("embed", c.embed_dim), ("mlp", c.mlp_dim)
        for i in range(c.num_layers):
            y = Convolution2d(outer, inner, 3, self.rules, dtype=dtype, name=f"wide{i}")(nn.relu(x))
            # its output is a residual stream as its input is: axes as of any projection to one
            x = x + Convolution2d(inner, outer, 1, self.rules, dtype=dtype, name=f"narrow{i}")(
                nn.relu(y)
            )
        return nn.relu(x)


class PictureEncoder(nn.Module):
    """Pictures to latents. Parameters: `resize0` ..., `first`, `blocks`, `project`."""

    config: Config
    rules: Rules

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """x: [B, height, width, 3] -> [B, h, w, D of codes]."""
        c, rules, dtype = self.config, self.rules, jnp.dtype(self.config.dtype)
        inputs = "channels", 3
        for i in range(c.num_halvings):
            last = i + 1 == c.num_halvings
            outputs = "mlp", c.embed_dim if last else c.embed_dim // 2
            x = nn.relu(Convolution2d(inputs, outputs, 4, rules, 2, dtype, name=f"resize{i}")(x))
            inputs = "embed", outputs[1]
        x = Convolution2d(inputs, ("mlp", c.embed_dim), 3, rules, dtype=dtype, name="first")(x)
        x = ResidualStack(c, rules, name="blocks")(x)
        outputs = "channels", c.code_dim
        return Convolution2d(inputs, outputs, 1, rules, dtype=dtype, name="project")(x)


class PictureDecoder(nn.Module):
    """Latents to pictures. Parameters: `first`, `blocks`, `resize0`, ..."""

    config: Config
    rules: Rules

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """x: [B, h, w, D of codes] -> [B, height, width, 3]."""
        c, rules, dtype = self.config, self.rules, jnp.dtype(self.config.dtype)
        inputs, width = ("channels", c.code_dim), c.embed_dim
        x = Convolution2d(inputs, ("mlp", width), 3, rules, dtype=dtype, name="first")(x)
        x = ResidualStack(c, rules, name="blocks")(x)
        for i in range(c.num_halvings):
            last = i + 1 == c.num_halvings
            outputs = ("channels", 4 * 3) if last else ("mlp", 4 * (c.embed_dim // 2))
            inputs = "embed", width
            x = Convolution2d(inputs, outputs, 3, rules, dtype=dtype, name=f"resize{i}")(x)
            x, width = depth_to_space(x, 2), outputs[1] // 4
            x = x if last else nn.relu(x)
        return x


class VqVae(nn.Module):
    """The model. Parameters: `image_encoder`, `codebook` and `image_decoder`.

    Its hidden states are the codes of a picture, row by row, [B, P, D], and its "logits" what the
    decoder makes of them: pixels, 0 to 1, [B, height, width, 3].
    """

    config: Config
    rules: Rules
    num_pipeline_microbatches = 1
    head_params = ("image_decoder",)

    def setup(self) -> None:
        c = self.config
        self.image_encoder, self.image_decoder = (
            PictureEncoder(c, self.rules),
            PictureDecoder(c, self.rules),
        )
        self.codebook = Codebook(
            c.num_codes, c.code_dim, c.codebook == "average", c.codebook_decay, c.revive_below
        )

    def __call__(
        self,
        inputs: Tokens,
        *,
        encoder: Tokens | None = None,
        cache: Cache | None = None,
        train: bool = False,
        images: Array | None = None,
    ) -> Output:
        """The codes of images: uint8 [B, height, width, 3], as hidden states; tokens are not
        read.
        """
        del train
        images = check_pictures("vqvae", images, encoder, cache)
        del inputs
        latents = self._latents(images)
        codes = self.codebook.lookup(self.codebook.nearest(latents), latents.dtype)
        return Output(hidden=codes)

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, P, D] -> pixels, float32 [B, height, width, 3]."""
        size = self.config.grid_size
        grid = hidden.reshape(-1, size, size, hidden.shape[-1])
        return self.image_decoder(grid).astype(jnp.float32) + 0.5

    def encode(self, images: Array) -> jax.Array:
        """images: uint8 [B, height, width, 3] -> codes, int32 [B, P], row by row."""
        return self.codebook.nearest(self._latents(images))

    def decode(self, codes: Array) -> jax.Array:
        """codes: int32 [B, P] -> uint8 [B, height, width, 3]."""
        pixels = self.logits(self.codebook.lookup(codes, jnp.dtype(self.config.dtype)))
        return jnp.round(255 * jnp.clip(pixels, 0, 1)).astype(jnp.uint8)

    def losses(
        self, batch: Batch, *, train: bool, commitment: float, variance: float, batch_size: int
    ) -> tuple[jax.Array, Sums]:
        """(SUM to differentiate, sums over pictures), as `lm.objectives.vqvae` documents them."""
        assert batch.images is not None, "the layout of lm.objectives.vqvae has pictures"
        weights = batch.weights[:, 0]
        records = batch.records if train else None
        latents = self._latents(batch.images)
        found = self.codebook.quantize(latents, weights, records, batch_size)
        error = self.logits(found.latents) - batch.images.astype(jnp.float32) / 255
        error = jnp.mean(jnp.square(error), axis=(1, 2, 3)) / variance  # [B]
        of_picture = error + commitment * found.commitment + found.codebook
        sums = {
            "loss": jnp.sum(weights * error),
            "commitment": jnp.sum(weights * found.commitment),
            "tokens": jnp.sum(weights),
        }
        if not train:
            uses = jax.nn.one_hot(found.ids, self.config.num_codes) * weights[:, None, None]
            sums["code_uses"] = jnp.sum(uses, axis=(0, 1))  # [K]
        return jnp.sum(weights * of_picture) + found.bookkeeping, sums

    def init_cache(self, batch_size: int, length: int) -> Cache:
        raise ValueError(
            "config.model.name=vqvae generates no tokens: train a decoder of its codes"
        )

    def _latents(self, images: Array) -> jax.Array:
        """images: uint8 [B, height, width, 3] -> [B, P, D], row by row."""
        pixels = (images.astype(jnp.float32) / 255 - 0.5).astype(self.config.dtype)
        x = self.image_encoder(self.rules.constrain(pixels, "act_batch", None, None, None))
        return x.reshape(x.shape[0], -1, x.shape[-1])


def build(config: Config, rules: Rules) -> VqVae:
    """Raise ValueError where the mesh can't do what the config asks for."""
    check_unsharded(
        "vqvae",
        rules,
        length="a picture is not sharded; use data, fsdp or tensor",
        layers="its layers are few; use data, fsdp or tensor",
    )
    return VqVae(config, rules)
