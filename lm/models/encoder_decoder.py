"""Encoder-decoder transformers: the one of 2017 (arXiv:1706.03762), T5 (arXiv:1910.10683) and its
1.1 are values of this `Config`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.layers import positions as pe
from lm.layers.attention.attention import EncoderStates
from lm.layers.attention.scores import AttentionScores
from lm.layers.block_config import BlockConfig
from lm.layers.linear import times
from lm.layers.transformer import Transformer, check_kernels, check_stages, make_output
from lm.models.vocabulary import VocabularyModel
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens


@dataclasses.dataclass(frozen=True)
class Config(BlockConfig):
    num_encoder_layers: int | None = field(None, "Blocks of the encoder; unset: num_layers.", ge=1)
    tie_embeddings: bool = field(True, "The vocabulary projection is the embedding.")
    embed_scale: float = field(1.0, "Factor on the embeddings.", gt=0)
    embed_init_std: float | None = field(
        None, "Deviation of initial embeddings; unset: init_std, or 0.02 without one.", gt=0
    )
    logit_scale: float = field(1.0, "Factor on the states before the vocabulary projection.", gt=0)

    @property
    def takes_encoder(self) -> bool:
        return True

    @property
    def encoder(self) -> BlockConfig:
        """The config of the encoder's blocks, which differ from the decoder's only in number."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(BlockConfig)}
        return BlockConfig(**{**shared, "num_layers": self.num_encoder_layers or self.num_layers})

    @property
    def attention_kinds(self) -> tuple[dict[str, Any], ...]:
        decoder = super().attention_kinds
        encoder = [{**kind, "causal": False} for kind in self.encoder.attention_kinds]
        cross = {**decoder[0], "causal": False, "window": None, "bias": False}
        return (*encoder, *decoder, *([] if cross in encoder else [cross]))

    @property
    def attention_scores(self) -> tuple[AttentionScores, ...]:
        """Those of the encoder, of the decoder, and of cross-attention."""
        encoder = (
            dataclasses.replace(scores, causal=False, queries="encoder", keys="encoder")
            for scores in self.encoder.attention_scores
        )
        size = self.num_layers, self.num_heads, self.kv_heads, self.head_size
        cross = AttentionScores(*size, causal=False, keys="encoder")
        return (*encoder, *super().attention_scores, cross)

    def check(self, length: int) -> None:
        """Raise ValueError, naming config paths and numbers, unless the sizes fit together for
        rows of `length`.
        """
        super().check(length)
        own = self.num_encoder_layers
        if own is not None and self.scan_unroll > own:
            raise ValueError(
                f"config.model.scan_unroll ({self.scan_unroll}) must be at most "
                f"num_encoder_layers ({own})"
            )
        if own is not None and own != self.num_layers and self.parametrization != "standard":
            raise ValueError(
                f"config.model.num_encoder_layers ({own}) must be config.model.num_layers "
                f"({self.num_layers}) for parametrization={self.parametrization}, which has one "
                "depth"
            )
        if self.parallel_block:
            raise ValueError(
                "config.model.parallel_block must be False for encoder_decoder: cross-attention "
                "reads what attention has added"
            )


class EncoderDecoder(VocabularyModel):
    """The model. Parameters: `embedding`, of both streams; `encoder` and `decoder`, those of
    `Transformer`; `encoder_position`, `decoder_position` and `head` where used.
    """

    config: Config  # pyright: ignore

    def setup(self) -> None:
        c, rules = self.config, self.rules
        self.embedding = self.make_table(c.vocab_size, "vocab", c.embed_init_std)
        if c.positions == "learned":
            self.encoder_position = self.make_table(c.max_length)
            self.decoder_position = self.make_table(c.max_length)
        self.encoder = Transformer(c.encoder, rules, causal=False)
        self.decoder = Transformer(c, rules)
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
        """Hidden states [B, T, D] of inputs [B, T], which read the tokens of `encoder`, [B, S], of
        their own segment number.

        With a cache, of tokens that continue what it holds; the first such call brings `encoder`,
        and what it returns keeps for every layer what cross-attention reads.
        """
        if cache is not None and inputs.bidirectional is not None:
            raise ValueError(
                "a cache keeps no bidirectional marks: encode such a prefix without one"
            )
        kept = cache is not None and "memory" in cache
        if kept == (encoder is not None):
            raise ValueError(
                "the cache holds an encoder's tokens already: bring others to an empty cache"
                if kept
                else "config.model.name=encoder_decoder needs encoder tokens, in the first call "
                "with a cache too"
            )
        c = self.config
        memory, reports = None, []
        if encoder is not None:
            table = self.encoder_position if c.positions == "learned" else None
            x = self._embed(encoder, table, "act_length", train)
            x, _, report = self.encoder.run(x, encoder, train=train)
            memory, reports = EncoderStates(encoder.segments, x), [report]
        table = self.decoder_position if c.positions == "learned" else None
        x = self._embed(inputs, table, "act_length" if cache is None else "length", train)
        x, cache, report = self.decoder.run(x, inputs, memory=memory, cache=cache, train=train)
        layers = jax.tree.map(lambda *each: jnp.concatenate(each), *reports, report)
        return make_output(x, cache, layers)

    def _embed(self, tokens: Tokens, table: Any, length: str, train: bool) -> jax.Array:
        c = self.config
        x = self.embedding(tokens.ids) * jnp.asarray(c.embed_scale, jnp.dtype(c.dtype))
        x = pe.add_absolute(x, tokens.positions, c.positions, table)
        x = self.rules.constrain(x, "act_batch", length, "act_embed")
        return self.dropout(x, deterministic=not train)

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, T, D] -> float32 [B, T, V]."""
        c = self.config
        scaled = hidden * jnp.asarray(c.logit_scale, hidden.dtype)
        return self.project(times(scaled, c.scaling.logits))

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `length` tokens of the decoder, of `batch_size` streams."""
        decoder = Transformer(self.config, self.rules, parent=None)
        return decoder.init_cache(batch_size, length)


def build(config: Config, rules: Rules) -> EncoderDecoder:
    """Raise ValueError where the mesh can't do what the config asks for."""
    check_stages("encoder_decoder", rules)
    check_kernels(config, rules)
    return EncoderDecoder(config, rules)
