"""The LSTM language model of Zaremba et al. 2014 (arXiv:1409.2329), the recurrent baseline.

An embedding, a stack of LSTM layers with dropout between them, and the vocabulary projection, tied
to the embedding if wanted. A row begins with an empty state, and no state travels between batches,
so that a run stays a pure function of its config and step: what the published recipes carry from
one batch of 35 tokens to the next, rows of several times that length carry inside, with gradients
cut every `bptt` tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.layers import recurrent
from lm.layers.activation_statistics import sow_hidden
from lm.layers.base_config import BaseConfig, require
from lm.layers.linear import Linear, parameter
from lm.layers.recurrent import Lstm, Marks, State
from lm.layers.stack import run, stack
from lm.models.vocabulary import VocabularyModel, check_left_to_right, check_unsharded
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    max_length = 2**31 - 1  # no row is too long for a state; positions are int32

    vocab_size: int = field(
        33_280, "Rows of the embedding; at least the tokenizer's vocabulary.", ge=1, le=2**31 - 1
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

    @property
    def hidden_size(self) -> int:
        return self.embed_dim if self.hidden_dim is None else self.hidden_dim

    @property
    def embed_init_std(self) -> float:
        return 0.05 if self.init_std is None else self.init_std

    def check(self, length: int) -> None:
        """As `BaseConfig.check`."""
        super().check(length)
        require(
            self.bptt is None or self.bptt <= length,
            f"bptt ({self.bptt}) must be at most config.data.length ({length}): no state is "
            "carried from row to row",
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
            hidden_dim=c.hidden_size,
            rules=self.rules,
            dtype=jnp.dtype(c.dtype),
            init_std=c.init_std,
            forget_bias=c.forget_bias,
            name="lstm",
        )(x, state, where)
        self.sow("intermediates", "hidden", x)
        sow_hidden(self, x, where.non_padding)
        return nn.Dropout(c.dropout, deterministic=not train)(x), state


class LanguageModel(VocabularyModel):
    """The model. Parameters: `embedding`, `layers` (stacked), and `up`, `down`, `head`,
    `head_bias` where used.
    """

    config: Config  # pyright: ignore

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.layers = stack(Layer, c.num_layers, unroll=c.unroll)(c, self.rules)
        if c.hidden_size != c.embed_dim:
            narrow, wide = {"embed": c.embed_dim}, {"mlp": c.hidden_size}
            linear = functools.partial(Linear, dtype=jnp.dtype(c.dtype), init_std=c.init_std)
            self.up = linear(narrow, wide, self.rules)
            self.down = linear(wide, narrow, self.rules)
        if c.head_bias:
            zeros = nn.initializers.zeros
            self.head_bias = parameter(self, "head_bias", zeros, (c.vocab_size,), ("vocab",))

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
        x = self.rules.constrain(self.embed(inputs), "act_batch", "length", "act_embed")
        x = self.dropout(x, deterministic=not train)
        c = self.config
        x = x if c.hidden_size == c.embed_dim else self.up(x)
        state = self.init_cache(inputs.ids.shape[0], 0) if cache is None else cache
        # a cached call goes on somewhere in a row: where it would be cut isn't known, nor needed
        where = recurrent.marks(inputs, c.bptt if cache is None else None)
        layer = Layer(c, self.rules, parent=None)
        x, state = run(self.layers, layer, x, state, (where, train))
        return Output(hidden=self.finish(x), cache=None if cache is None else state)

    def finish(self, x: Array) -> jax.Array:
        """The hidden states that `logits` reads, of a layer's output x: [B, T, F]."""
        x = x if self.config.hidden_size == self.config.embed_dim else self.down(x)
        return self.rules.constrain(x, "act_batch", "length", "act_embed")

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, T, D] -> float32 [B, T, V]."""
        logits = super().logits(hidden)
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
    check_unsharded(
        "lstm",
        rules,
        length="a token's state waits for that of the token before",
        layers="its layers are few; use data, fsdp or tensor",
    )
    return LanguageModel(config, rules)
