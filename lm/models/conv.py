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

from lm.config.fields import check_values, field
from lm.layers.convolution import GatedConvolution
from lm.layers.norm import Norm
from lm.layers.stack import run, stack
from lm.models.vocabulary import VocabularyModel, check_left_to_right, check_scan_unroll
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int = field(
        50_304, "Rows of the embedding; at least the tokenizer's vocabulary.", ge=1
    )
    num_layers: int = field(8, "Blocks.", ge=1)
    embed_dim: int = field(512, "Width of the residual stream.", ge=1)
    kernel_size: int = field(4, "Tokens that a convolution reads, its own included.", ge=1)
    norm_eps: float = field(1e-6, "Added to the variance.", gt=0)
    tie_embeddings: bool = field(True, "The vocabulary projection is the embedding.")
    dropout: float = field(0.0, "Dropout of embeddings and residual branches.", ge=0, lt=1)
    init_std: float | None = field(
        None, "Deviation of initial weights; unset: fan_in ** -0.5.", gt=0
    )
    dtype: str = field(
        "float32", "Compute type; parameters stay float32.", choices=("float32", "bfloat16")
    )
    remat: str = field(
        "none", "Activations saved for the backward pass.", choices=("none", "dots", "full")
    )
    scan_unroll: int = field(
        1, "Layers per iteration of the scan; -1: all of them, no loop.", ge=1, also=(-1,)
    )

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def takes_encoder(self) -> bool:
        return False

    @property
    def max_length(self) -> int:
        """No row is too long for a convolution; positions are int32."""
        return 2**31 - 1

    def check(self, length: int) -> None:
        """Raise ValueError, naming config paths and numbers, unless the sizes fit together for
        rows of `length`.
        """
        check_values(self, "config.model")
        check_scan_unroll(self.scan_unroll, self.num_layers)
        if self.kernel_size > length:
            raise ValueError(
                f"config.model.kernel_size ({self.kernel_size}) must be at most "
                f"config.data.length ({length})"
            )


@flax.struct.dataclass
class Shared:
    """Inputs of all blocks."""

    positions: Array  # int32 [B, T]
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
            embed_dim=c.embed_dim,
            kernel_size=c.kernel_size,
            rules=self.rules,
            dtype=dtype,
            init_std=c.init_std,
            name="convolution",
        )(Norm("rms", c.norm_eps, dtype=dtype, name="norm")(x), shared.positions, before)
        x = x + nn.Dropout(c.dropout, deterministic=not shared.train)(y)
        self.sow("intermediates", "hidden", x)
        return x, last


class LanguageModel(VocabularyModel):
    """The model. Parameters: `embedding`, `layers` (stacked), `norm`, and `head` where used."""

    config: Config  # pyright: ignore

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        self.embedding = self.make_table(c.vocab_size, "vocab")
        unroll = c.num_layers if c.scan_unroll == -1 else c.scan_unroll
        self.layers = stack(Block, c.num_layers, remat=c.remat, unroll=unroll)(c, self.rules)
        self.norm = Norm("rms", c.norm_eps, dtype=dtype)
        if not c.tie_embeddings:
            self.head = self.make_head()
        self.dropout = nn.Dropout(c.dropout)

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
        x = self.embedding(inputs.ids)
        x = self.rules.constrain(x, "act_batch", "length", "act_embed")
        x = self.dropout(x, deterministic=not train)
        block = Block(self.config, self.rules, parent=None)
        x, cache = run(self.layers, block, x, cache, Shared(inputs.positions, train))
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
    stages = rules.mesh.shape["stage"]
    if stages > 1:
        raise ValueError(
            f"config.mesh.stage ({stages}) must be 1 for config.model.name=conv; use data, fsdp, "
            "tensor or sequence"
        )
    return LanguageModel(config, rules)
