"""The vocabulary of a model of tokens: tables of vectors, and the projection to logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.layers.embedding import Embedding
from lm.layers.linear import Linear, times
from lm.layers.lora import LoraConfig
from lm.layers.positions import sinusoids
from lm.optim.parametrization import STANDARD, Scaling
from lm.parallel.sharding import Rules
from lm.types import Array, Cache, Tokens

Positions: TypeAlias = Callable[[Array], jax.Array] | None  # int32 [B, T] -> [B, T, D]

NO_PIPELINE = "the pipeline is the decoder's; spread parameters with config.mesh.fsdp and tensor"


class VocabularyModel(nn.Module):
    """The base of models of tokens. Parameters: `embedding` [V, D] and, untied, `head` [D, V]."""

    config: Any  # of a model: the fields of `BaseConfig`, init_std, and what else it may have
    rules: Rules

    def setup(self) -> None:
        super().setup()
        c = self.config
        std = getattr(c, "embed_init_std", None)
        self.embedding = self.make_table(c.vocab_size, "vocab", std)
        if getattr(c, "has_head", True) and not self._is_tied:
            self.head = Linear(
                {"embed": c.embed_dim},
                {"vocab": c.vocab_size},
                self.rules,
                dtype=jnp.dtype(c.dtype),
                init_std=c.init_std,
                init_scale=self._scaling.init("head", c.init_std),
                lora=getattr(c, "lora", LoraConfig()),
                unrounded=True,
            )
        self.dropout = nn.Dropout(c.dropout)

    def make_table(self, size: int, axis: str | None = None, std: float | None = None) -> Embedding:
        """A table of vectors [size, D]. std: of the initial ones; unset: init_std, or 0.02."""
        c = self.config
        own = next(s for s in (std, c.init_std, 0.02) if s is not None)
        own *= self._scaling.init("embedding", own)
        return Embedding(size, c.embed_dim, self.rules, axis, jnp.dtype(c.dtype), own)

    def make_positions(self) -> Positions:
        """Vectors [B, T, D] of positions: int32 [B, T], where a transformer adds absolute ones."""
        c = self.config
        if c.positions == "learned":
            return self.make_table(c.max_length)
        if c.positions == "sinusoidal":
            return functools.partial(sinusoids, embed_dim=c.embed_dim)
        return None

    def embed(self, tokens: Tokens, positions: Positions = None, scale: float = 1.0) -> jax.Array:
        """Embeddings [B, T, D], times `scale`, with absolute positions added."""
        x = times(self.embedding(tokens.ids), scale)
        return x if positions is None else x + positions(tokens.positions).astype(x.dtype)

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, T, D] -> float32 [B, T, V]."""
        x = times(hidden, self._scaling.logits)
        x = self.embedding.attend(x) if self._is_tied else self.head(x)
        return self.rules.constrain(x, "act_batch", "length", "vocab")

    @property
    def _scaling(self) -> Scaling:
        return getattr(self.config, "scaling", STANDARD)

    @property
    def _is_tied(self) -> bool:
        return getattr(self.config, "tie_embeddings", True)

    @property
    def head_params(self) -> tuple[str, ...]:
        return ("embedding",) if self._is_tied else ("head",)

    @property
    def num_pipeline_microbatches(self) -> int:
        """Parts that the rows of a forward pass are cut into."""
        return 1


def check_left_to_right(name: str, inputs: Tokens, encoder: Tokens | None) -> None:
    """Raise ValueError for what the model `name`, which only reads from left to right, can't
    read.
    """
    if encoder is not None:
        raise ValueError(f"config.model.name={name} takes no encoder tokens")
    if inputs.bidirectional is not None:
        raise ValueError(
            f"config.model.name={name} reads from left to right: it can't see a bidirectional "
            "prefix as a whole; choose another config.objective.name"
        )


def check_unsharded(name: str, rules: Rules, **reasons: str) -> None:
    """Raise ValueError, with the reason, for a logical axis that the mesh shards, and the model
    `name` does not.
    """
    for logical, reason in reasons.items():
        if (size := rules.size(logical)) > 1:
            raise ValueError(
                f"config.mesh.{'*'.join(rules.axes(logical))} ({size}) must be 1 for "
                f"config.model.name={name}: {reason}"
            )


def check_pictures(
    name: str, images: Array | None, encoder: Tokens | None, cache: Cache | None
) -> Array:
    """The pictures that the model `name` reads, and no encoder's input nor cache.

    Raises:
        ValueError: there are none, or there is anything else.
    """
    if images is None or encoder is not None or cache is not None:
        raise ValueError(
            f"config.model.name={name} takes pictures, and neither encoder tokens nor a cache: see "
            "docs/images.md"
        )
    return images
