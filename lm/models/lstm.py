"""The LSTM language model of Zaremba et al. 2014 (arXiv:1409.2329), the recurrent baseline.

An embedding, a stack of LSTM layers with dropout between them, and the vocabulary projection, tied
to the embedding if wanted. A row begins with an empty state, and no state travels between batches,
so that a run stays a pure function of its config and step: what the published recipes carry from
one batch of 35 tokens to the next, rows of several times that length carry inside, with gradients
cut every `bptt` tokens.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config.fields import check_values, field
from lm.layers import recurrent
from lm.layers.linear import Linear, parameter
from lm.layers.recurrent import Lstm, Marks, State
from lm.layers.stack import run, stack
from lm.models.vocabulary import VocabularyModel, check_left_to_right, check_scan_unroll
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int = field(
        33_280, "Rows of the embedding; at least the tokenizer's vocabulary.", ge=1
    )
    num_layers: int = field(2, "LSTM layers.", ge=1)
    embed_dim: int = field(200, "Width of the embedding and of the vocabulary projection.", ge=1)
    hidden_dim: int | None = field(
        None,
        "Width of the layers; unset: embed_dim. Another width has a linear map before the first "
        "layer and one after the last.",
        ge=1,
    )
    tie_embeddings: bool = field(True, "The vocabulary projection is the embedding.")
    head_bias: bool = field(True, "The vocabulary projection has a bias for every token.")
    dropout: float = field(0.0, "Dropout of embeddings and of every layer's output.", ge=0, lt=1)
    bptt: int | None = field(
        None,
        "Tokens of a row after which gradients stop; unset: they go through the whole row.",
        ge=1,
    )
    forget_bias: float = field(1.0, "Initial bias of the forget gates.", gt=-math.inf)
    init_std: float | None = field(
        0.05, "Deviation of initial weights; unset: fan_in ** -0.5.", gt=0
    )
    dtype: str = field(
        "float32", "Compute type; parameters stay float32.", choices=("float32", "bfloat16")
    )
    scan_unroll: int = field(
        1, "Layers per iteration of the scan; -1: all of them, no loop.", ge=1, also=(-1,)
    )

    @property
    def hidden_size(self) -> int:
        return self.embed_dim if self.hidden_dim is None else self.hidden_dim

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def takes_encoder(self) -> bool:
        return False

    @property
    def max_length(self) -> int:
        """No row is too long for a state; positions are int32."""
        return 2**31 - 1

    def check(self, length: int) -> None:
        """Raise ValueError, naming config paths and numbers, unless the sizes fit together for
        rows of `length`.
        """
        check_values(self, "config.model")
        check_scan_unroll(self.scan_unroll, self.num_layers)
        if self.bptt is not None and self.bptt > length:
            raise ValueError(
                f"config.model.bptt ({self.bptt}) must be at most config.data.length ({length}): "
                "no state is carried from row to row"
            )


class Layer(nn.Module):
    """One LSTM layer and the dropout of its output. Parameters: `lstm`."""

    config: Config
    rules: Rules

    @nn.compact
    def __call__(
        self, x: Array, state: State, shared: tuple[Marks, bool]
    ) -> tuple[jax.Array, State]:
        c, (where, train) = self.config, shared
        x, state = Lstm(
            embed_dim=c.hidden_size,
            hidden_dim=c.hidden_size,
            rules=self.rules,
            dtype=jnp.dtype(c.dtype),
            init_std=c.init_std,
            forget_bias=c.forget_bias,
            name="lstm",
        )(x, state, where)
        self.sow("intermediates", "hidden", x)
        return nn.Dropout(c.dropout, deterministic=not train)(x), state


class LanguageModel(VocabularyModel):
    """The model. Parameters: `embedding`, `layers` (stacked), and `up`, `down`, `head`,
    `head_bias` where used.
    """

    config: Config  # pyright: ignore

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        std = 0.05 if c.init_std is None else c.init_std
        self.embedding = self.make_table(c.vocab_size, "vocab", std)
        unroll = c.num_layers if c.scan_unroll == -1 else c.scan_unroll
        self.layers = stack(Layer, c.num_layers, unroll=unroll)(c, self.rules)
        shared = {"rules": self.rules, "dtype": dtype, "init_std": c.init_std}
        if c.hidden_size != c.embed_dim:
            narrow, wide = {"embed": c.embed_dim}, {"mlp": c.hidden_size}
            self.up = Linear(narrow, wide, **shared)
            self.down = Linear(wide, narrow, **shared)
        if not c.tie_embeddings:
            self.head = self.make_head()
        if c.head_bias:
            zeros = nn.initializers.zeros
            self.head_bias = parameter(self, "head_bias", zeros, (c.vocab_size,), ("vocab",))
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
        check_left_to_right("lstm", inputs, encoder)
        c = self.config
        x = self.embedding(inputs.ids)
        x = self.rules.constrain(x, "act_batch", "length", "act_embed")
        x = self.dropout(x, deterministic=not train)
        if c.hidden_size != c.embed_dim:
            x = self.up(x)
        state = self.init_cache(inputs.ids.shape[0], 0) if cache is None else cache
        # a cached call goes on somewhere in a row: where it would be cut isn't known, nor needed
        where = recurrent.marks(inputs, c.bptt if cache is None else None)
        layer = Layer(self.config, self.rules, parent=None)
        x, state = run(self.layers, layer, x, state, (where, train))
        return Output(hidden=self.finish(x), cache=None if cache is None else state)

    def finish(self, x: Array) -> jax.Array:
        """The hidden states that `logits` reads, of a layer's output x: [B, T, F]."""
        x = x if self.config.hidden_size == self.config.embed_dim else self.down(x)
        return self.rules.constrain(x, "act_batch", "length", "act_embed")

    def project(self, x: Array) -> jax.Array:
        logits = super().project(x)
        return logits + self.head_bias if self.config.head_bias else logits

    @property
    def head_params(self) -> tuple[str, ...]:
        own = ("head_bias",) if self.config.head_bias else ()
        return (*super().head_params, *own)

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """Empty states, [L, B, F], of `batch_size` streams of any length."""
        del length
        c = self.config
        shape = (c.num_layers, batch_size, c.hidden_size)
        return recurrent.empty(shape, jnp.dtype(c.dtype), self.rules)


def build(config: Config, rules: Rules) -> LanguageModel:
    """Raise ValueError where the mesh can't do what the config asks for."""
    for axis, reason in (
        ("sequence", "a token's state waits for that of the token before"),
        ("stage", "its layers are few; use data, fsdp or tensor"),
    ):
        size = rules.mesh.shape[axis]
        if size > 1:
            raise ValueError(
                f"config.mesh.{axis} ({size}) must be 1 for config.model.name=lstm: {reason}"
            )
    return LanguageModel(config, rules)
