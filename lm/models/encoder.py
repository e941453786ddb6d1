"""Encoders, whose tokens see each other both ways: BERT (arXiv:1810.04805) and, with other values,
those that came after it.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.kernels.quantization import NO_QUANTIZATION
from lm.layers.block_config import BlockConfig
from lm.layers.linear import hidden_linear, parameter
from lm.layers.mlp import ACTIVATIONS
from lm.layers.norm import Norm
from lm.layers.transformer import Transformer, check_kernels, make_output
from lm.models.vocabulary import NO_PIPELINE, VocabularyModel, check_unsharded
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens, check_head


@dataclasses.dataclass(frozen=True)
class Config(BlockConfig):
    is_causal = False

    has_head: bool = field(True, "A vocabulary projection; without one, hidden states alone.")
    num_types: int = field(2, "Token types, as many as rows of their table; 0: none.", ge=0)
    pooler_dim: int = field(0, "Width of the pooled output of a segment; 0: there is none.", ge=0)


class Encoder(VocabularyModel, Transformer):
    """The model. Parameters: those of `Transformer`; `embedding` and `embedding_norm`; `position`,
    `type` and `pooler` where used; with a head, `transform`, `transform_norm` and `logit_bias` [V]
    between the hidden states and the projection by the embedding.
    """

    config: Config  # pyright: ignore

    def setup(self) -> None:
        super().setup()
        c = self.config
        norm = functools.partial(Norm, c.norm, c.norm_eps, c.norm_bias, jnp.dtype(c.dtype))
        embed = {"embed": c.embed_dim}
        # of the head, and so in the compute type
        plain = dataclasses.replace(c, quantization=NO_QUANTIZATION)
        linear = functools.partial(hidden_linear, plain, self.rules, embed, bias=c.mlp_bias)
        self.position = self.make_positions()
        if c.num_types:
            self.type = self.make_table(c.num_types)
        self.embedding_norm = norm()
        if c.has_head:
            self.transform = linear({"mlp": c.embed_dim})
            self.transform_norm = norm()
            zeros = nn.initializers.zeros
            self.logit_bias = parameter(self, "logit_bias", zeros, (c.vocab_size,), ("vocab",))
        if c.pooler_dim:
            self.pooler = linear({"mlp": c.pooler_dim})

    def __call__(
        self,
        inputs: Tokens,
        *,
        encoder: Tokens | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Output:
        """Hidden states [B, T, D] of inputs [B, T]; without `inputs.types` all are of type 0."""
        if encoder is not None or cache is not None:
            raise ValueError(
                "config.model.name=encoder takes no encoder tokens beside its inputs, and no cache"
            )
        c = self.config
        x = self.embed(inputs, self.position)
        if c.num_types:
            types = jnp.zeros_like(inputs.ids) if inputs.types is None else inputs.types
            x = x + self.type(types)
        elif inputs.types is not None:
            raise ValueError("config.model.num_types (0) must count the types of the data")
        x = self.rules.constrain(self.embedding_norm(x), "act_batch", "act_length", "act_embed")
        x = self.dropout(x, deterministic=not train)
        x, _, reports = self.run(x, inputs, train=train)
        if c.pooler_dim and self.is_initializing():
            self.pooled(x, inputs)
        return make_output(x, None, reports)

    def pooled(self, hidden: Array, inputs: Tokens) -> jax.Array:
        """[B, T, pooler_dim] of hidden: [B, T, D]: for every token what its segment's first token
        says of the whole of it, tanh(W h + b), as for BERT's pairs of sentences.
        """
        if not self.config.pooler_dim:
            raise ValueError("config.model.pooler_dim (0) must be positive for a pooled output")
        start = jnp.arange(hidden.shape[1]) - inputs.positions
        return jnp.tanh(self.pooler(jnp.take_along_axis(hidden, start[..., None], axis=1)))

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, T, D] -> float32 [B, T, V].

        Raises:
            ValueError: the model has no head.
        """
        check_head(self.config)
        act, _ = ACTIVATIONS[self.config.activation]
        return super().logits(self.transform_norm(act(self.transform(hidden)))) + self.logit_bias

    @property
    def head_params(self) -> tuple[str, ...]:
        return "embedding", "transform", "transform_norm", "logit_bias"

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """Raise ValueError: what comes later changes what a token sees."""
        raise ValueError(
            "config.model.name=encoder cannot generate, whose tokens see those that come after "
            "them: take a decoder or an encoder_decoder"
        )


def build(config: Config, rules: Rules) -> Encoder:
    """Raise ValueError where the mesh can't do what the config asks for."""
    check_unsharded("encoder", rules, layers=NO_PIPELINE)
    check_kernels(config, rules)
    return Encoder(config, rules)
