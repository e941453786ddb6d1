"""The gated convolutional language model of Dauphin et al. 2017 (arXiv:1612.08083), a baseline
without attention and without a state.

Blocks of one gated convolution each, around a residual stream; a token sees itself and
num_layers * (kernel_size - 1) before it. Each block normalises its input (root mean square), where
the paper normalises weights (arXiv:1602.07868).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.layers.activation_statistics import sow_hidden
from lm.layers.base_config import BaseConfig, require
from lm.layers.convolution import GatedConvolution
from lm.layers.norm import Norm
from lm.layers.stack import run, stack
from lm.models.vocabulary import VocabularyModel, check_left_to_right, check_unsharded
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    max_length = 2**31 - 1  # no row is too long for a convolution; positions are int32

    num_layers: int = field(8, "Blocks.", ge=1)
    embed_dim: int = field(512, "Width of the residual stream.", ge=1)
    kernel_size: int = field(4, "Tokens that a convolution reads, its own included.", ge=1)
    norm_eps: float = field(1e-6, "Added to the variance.", gt=0)
    tie_embeddings: bool = field(True, "The vocabulary projection is the embedding.")
    init_std: float | None = field(
        None, "Deviation of initial weights; unset: fan_in ** -0.5.", gt=0
    )
    remat: str = field(
        "none", "Activations saved for the backward pass.", choices=("none", "dots", "full")
    )

    def check(self, length: int) -> None:
        """As `BaseConfig.check`."""
        super().check(length)
        require(
            self.kernel_size <= length,
            f"kernel_size ({self.kernel_size}) must be at most config.data.length ({length})",
        )


@flax.struct.dataclass
class Shared:
    """Inputs of all blocks."""

    positions: Array  # int32 [B, T]
    non_padding: Array  # bool [B, T]
    train: bool = flax.struct.field(pytree_node=False)


class Block(nn.Module):
    """A gated convolution around a residual stream. Parameters: `norm`, `convolution`."""

    config: Config
    rules: Rules

    @nn.compact
    def __call__(
        self, x: Array, before: Array | None, shared: Shared
    ) -> tuple[jax.Array, jax.Array | None]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        y, last = GatedConvolution(
            kernel_size=c.kernel_size,
            rules=self.rules,
            dtype=dtype,
            init_std=c.init_std,
            name="convolution",
        )(Norm("rms", c.norm_eps, dtype=dtype, name="norm")(x), shared.positions, before)
        x = x + nn.Dropout(c.dropout, deterministic=not shared.train)(y)
        self.sow("intermediates", "hidden", x)
        sow_hidden(self, x, shared.non_padding)
        return x, last


class LanguageModel(VocabularyModel):
    """The model. Parameters: `embedding`, `layers` (stacked), `norm`, and `head` where used."""

    config: Config  # pyright: ignore

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.layers = stack(Block, c.num_layers, remat=c.remat, unroll=c.unroll)(c, self.rules)
        self.norm = Norm("rms", c.norm_eps, dtype=jnp.dtype(c.dtype))

    def __call__(
        self,
        inputs: Tokens,
        *,
        encoder: Tokens | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Output:
        """Hidden states [B, T, D] of inputs [B, T]; with a cache, of tokens that continue what it
        holds.
        """
        check_left_to_right("conv", inputs, encoder)
        x = self.rules.constrain(self.embed(inputs), "act_batch", "length", "act_embed")
        x = self.dropout(x, deterministic=not train)
        block = Block(self.config, self.rules, parent=None)
        shared = Shared(inputs.positions, inputs.segments != 0, train)
        x, cache = run(self.layers, block, x, cache, shared)
        return Output(hidden=self.finish(x), cache=cache)

    def finish(self, x: Array) -> jax.Array:
        """The hidden states that `logits` reads, of a residual stream x: [B, T, D]."""
        return self.rules.constrain(self.norm(x), "act_batch", "length", "act_embed")

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """The inputs of each layer before the next token, [L, B, kernel_size - 1, D]: none yet.

        Streams may be of any length.
        """
        del length
        c = self.config
        shape = (c.num_layers, batch_size, c.kernel_size - 1, c.embed_dim)
        zeros = jnp.zeros(shape, jnp.dtype(c.dtype))
        return self.rules.constrain(zeros, None, "batch", None, "act_embed")


def build(config: Config, rules: Rules) -> LanguageModel:
    """Raise ValueError where the mesh can't do what the config asks for."""
    check_unsharded("conv", rules, layers="use data, fsdp, tensor or sequence")
    return LanguageModel(config, rules)
