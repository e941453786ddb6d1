"""Encoder-decoder transformers: the one of 2017 (arXiv:1706.03762), T5 (arXiv:1910.10683) and its
1.1 are values of this `Config`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.layers import cache as kv_cache
from lm.layers.attention import EncoderStates
from lm.layers.attention_scores import AttentionScores
from lm.layers.base_config import require
from lm.layers.block_config import BlockConfig
from lm.layers.linear import times
from lm.layers.transformer import Transformer, check_kernels, make_output
from lm.models.vocabulary import NO_PIPELINE, Positions, VocabularyModel, check_unsharded
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens


@dataclasses.dataclass(frozen=True)
class EncoderConfig(BlockConfig):
    """The encoder's blocks, which differ from the decoder's in number and in their masks alone."""

    is_causal = False


@dataclasses.dataclass(frozen=True)
class Config(BlockConfig):
    takes_encoder = True

    num_encoder_layers: int | None = field(None, "Blocks of the encoder; unset: num_layers.", ge=1)
    tie_embeddings: bool = field(True, "The vocabulary projection is the embedding.")
    embed_scale: float = field(1.0, "Factor on the embeddings.", gt=0)
    embed_init_std: float | None = field(
        None, "Deviation of initial embeddings; unset: init_std, or 0.02 without one.", gt=0
    )
    logit_scale: float = field(1.0, "Factor on the states before the vocabulary projection.", gt=0)

    @property
    def encoder(self) -> EncoderConfig:
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(BlockConfig)}
        return EncoderConfig(**{**shared, "num_layers": self.num_encoder_layers or self.num_layers})

    @property
    def attention_scores(self) -> tuple[AttentionScores, ...]:
        """Those of the encoder, of the decoder, and of cross-attention."""
        encoder = (
            dataclasses.replace(scores, queries="encoder", keys="encoder")
            for scores in self.encoder.attention_scores
        )
        decoder = super().attention_scores
        heads = dataclasses.replace(decoder[0].heads, causal=False, window=None, bias=False)
        return (*encoder, *decoder, AttentionScores(heads, self.num_layers, keys="encoder"))

    def check(self, length: int) -> None:
        """As `BaseConfig.check`."""
        super().check(length)
        layers = self.encoder.num_layers
        require(
            self.scan_unroll <= layers,
            f"scan_unroll ({self.scan_unroll}) must be at most num_encoder_layers ({layers})",
        )
        require(
            layers == self.num_layers or self.parametrization == "standard",
            f"num_encoder_layers ({layers}) must be config.model.num_layers ({self.num_layers}) "
            f"for parametrization={self.parametrization}, which has one depth",
        )
        require(
            not self.parallel_block,
            "parallel_block must be False for encoder_decoder: cross-attention reads what "
            "attention has added",
        )


class EncoderDecoder(VocabularyModel):
    """The model. Parameters: `embedding`, of both streams; `encoder` and `decoder`, those of
    `Transformer`; `encoder_position`, `decoder_position` and `head` where used.
    """

    config: Config  # pyright: ignore

    def setup(self) -> None:
        super().setup()
        self.encoder_position = self.make_positions()
        self.decoder_position = self.make_positions()
        self.encoder = Transformer(self.config.encoder, self.rules)
        self.decoder = Transformer(self.config, self.rules)

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
        kept = cache is not None and "memory" in cache
        if kept == (encoder is not None):
            raise ValueError(
                "the cache holds an encoder's tokens already: bring others to an empty cache"
                if kept
                else "config.model.name=encoder_decoder needs encoder tokens, in the first call "
                "with a cache too"
            )

        def embed(tokens: Tokens, positions: Positions, length: str) -> jax.Array:
            x = self.embed(tokens, positions, self.config.embed_scale)
            x = self.rules.constrain(x, "act_batch", length, "act_embed")
            return self.dropout(x, deterministic=not train)

        memory, reports = None, []
        if encoder is not None:
            x = embed(encoder, self.encoder_position, "act_length")
            x, _, report = self.encoder.run(x, encoder, train=train)
            memory, reports = EncoderStates(encoder.segments, x), [report]
        x = embed(inputs, self.decoder_position, "act_length" if cache is None else "length")
        x, cache, report = self.decoder.run(x, inputs, memory=memory, cache=cache, train=train)
        layers = jax.tree.map(lambda *each: jnp.concatenate(each), *reports, report)
        return make_output(x, cache, layers)

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, T, D] -> float32 [B, T, V]."""
        return super().logits(times(hidden, self.config.logit_scale))

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `length` tokens of the decoder, of `batch_size` streams."""
        return kv_cache.init(self.config, self.rules, batch_size, length)


def build(config: Config, rules: Rules) -> EncoderDecoder:
    """Raise ValueError where the mesh can't do what the config asks for."""
    check_unsharded("encoder_decoder", rules, layers=NO_PIPELINE)
    check_kernels(config, rules)
    return EncoderDecoder(config, rules)
