"""The vision transformer (arXiv:2010.11929) as a classifier of pictures."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.layers.linear import Linear
from lm.layers.transformer import check_kernels
from lm.layers.vision import PictureConfig, VisionTransformer, unsharded_length
from lm.models.vocabulary import NO_PIPELINE, check_pictures, check_unsharded
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens, check_head


@dataclasses.dataclass(frozen=True)
class Config(PictureConfig):
    vocab_size = max_length = 2**31 - 1  # no tokens are read

    num_classes: int = field(1000, "Classes.", ge=2, lt=2**31)
    has_head: bool = field(True, "A projection to the classes; without one, hidden states alone.")
    pooler_dim: int = field(
        0, "Width of tanh(W h + b) of a picture's state; 0: there is none.", ge=0
    )


class Vit(nn.Module):
    """The model. Parameters: `vision`, as in CLIP, `pooler` where used, and `head`.

    The hidden states are the vector of the picture, [B, 1, D], and logits those of classes.
    """

    config: Config
    rules: Rules
    num_pipeline_microbatches = 1
    head_params = ("head",)

    def setup(self) -> None:
        c, rules = self.config, unsharded_length(self.rules)
        self.vision = VisionTransformer(c.image_blocks, rules, picture=c)
        inputs, dtype = {"embed": c.vision.embed_dim}, jnp.dtype(c.dtype)
        shared = {"bias": True, "dtype": dtype, "init_std": c.init_std}
        if c.pooler_dim:
            self.pooler = Linear(inputs, {"mlp": c.pooler_dim}, rules, **shared)
        if c.has_head:
            outputs = {"vocab": c.num_classes}
            self.head = Linear(inputs, outputs, rules, lora=c.lora, unrounded=True, **shared)

    def __call__(
        self,
        inputs: Tokens,
        *,
        encoder: Tokens | None = None,
        cache: Cache | None = None,
        train: bool = False,
        images: Array | None = None,
    ) -> Output:
        """Vectors of images, uint8 [B, height, width, 3]; tokens are not read."""
        del inputs
        images = check_pictures("vit", images, encoder, cache)
        hidden = self.vision(images, train=train)
        if self.config.pooler_dim and self.is_initializing():
            self.pooled(hidden)
        return Output(hidden=hidden)

    def pooled(self, hidden: Array) -> jax.Array:
        """hidden: [B, 1, D] -> [B, 1, pooler_dim]."""
        if not self.config.pooler_dim:
            raise ValueError("config.model.pooler_dim (0) must be positive for a pooled output")
        return jnp.tanh(self.pooler(hidden))

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, 1, D] -> float32 [B, 1, classes].

        Raises:
            ValueError: the model has no head.
        """
        check_head(self.config)
        return self.rules.constrain(self.head(hidden), "act_batch", None, "vocab")

    def init_cache(self, batch_size: int, length: int) -> Cache:
        raise ValueError("config.model.name=vit generates nothing: it names the class of a picture")


def build(config: Config, rules: Rules) -> Vit:
    """Raise ValueError where the mesh can't do what the config asks for."""
    check_unsharded(
        "vit",
        rules,
        length="a picture is not sharded; use data, fsdp or tensor",
        layers=NO_PIPELINE,
    )
    check_kernels(config.image_blocks, rules)
    return Vit(config, rules)
