"""Encoders, whose tokens see each other both ways: BERT (arXiv:1810.04805) and, with other values,
those that came after it.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config.fields import field
from lm.layers import positions as pe
from lm.layers.block_config import BlockConfig
from lm.layers.linear import Linear, parameter, times
from lm.layers.mlp import ACTIVATIONS
from lm.layers.norm import Norm
from lm.layers.transformer import Transformer, check_kernels, check_stages, make_output
from lm.models.vocabulary import VocabularyModel
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Output, Tokens, check_head


@dataclasses.dataclass(frozen=True)
class Config(BlockConfig):
    has_head: bool = field(True, "A vocabulary projection; without one, hidden states alone.")
    num_types: int = field(2, "Token types, as many as rows of their table; 0: none.", ge=0)
    pooler_dim: int = field(0, "Width of the pooled output of a segment; 0: there is none.", ge=0)

    @property
    def is_causal(self) -> bool:
        return False


class Encoder(VocabularyModel, Transformer):
    """The model. Parameters: those of `Transformer`; `embedding` and `embedding_norm`; `position`,
    `type` and `pooler` where used; with a head, `transform`, `transform_norm` and `logit_bias` [V]
    between the hidden states and the projection by the embedding.
    """

    config: Config  # pyright: ignore
    causal: bool = False

    def setup(self) -> None:
        super().setup()
        c, rules, dtype = self.config, self.rules, jnp.dtype(self.config.dtype)
        scale = c.scaling.init("hidden", c.init_std)

        def linear(width: int) -> Linear:
            shape = {"embed": c.embed_dim}, {"mlp": width}
            return Linear(
                *shape, rules, bias=c.mlp_bias, dtype=dtype, init_std=c.init_std, init_scale=scale
            )

        self.embedding = self.make_table(c.vocab_size, "vocab")
        if c.positions == "learned":
            self.position = self.make_table(c.max_length)
        if c.num_types:
            self.type = self.make_table(c.num_types)
        self.embedding_norm = Norm(c.norm, c.norm_eps, c.norm_bias, dtype)
        self.dropout = nn.Dropout(c.dropout)
        if c.has_head:
            self.transform = linear(c.embed_dim)
            self.transform_norm = Norm(c.norm, c.norm_eps, c.norm_bias, dtype)
            zeros = nn.initializers.zeros
            self.logit_bias = parameter(self, "logit_bias", zeros, (c.vocab_size,), ("vocab",))
        if c.pooler_dim:
            self.pooler = linear(c.pooler_dim)

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
        x = self.embedding(inputs.ids)
        table = self.position if c.positions == "learned" else None
        x = pe.add_absolute(x, inputs.positions, c.positions, table)
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
        x = self.transform_norm(act(self.transform(hidden)))
        return self.project(times(x, self.config.scaling.logits)) + self.logit_bias

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
    check_stages("encoder", rules)
    check_kernels(config, rules)
    return Encoder(config, rules)
