"""The vocabulary of a model of tokens: tables of vectors, and the projection to logits."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.layers.embedding import Embedding
from lm.layers.linear import Linear
from lm.layers.lora import LoraConfig
from lm.optim.parametrization import STANDARD
from lm.parallel.sharding import Rules
from lm.types import Array, Tokens


class VocabularyModel(nn.Module):
    """The base of models of tokens. Parameters: `embedding` [V, D] and, untied, `head` [D, V],
    which `setup` makes of `make_table` and `make_head`.
    """

    config: Any  # of a model: vocab_size, embed_dim, init_std, dtype, and what else it may have
    rules: Rules

    def make_table(self, size: int, axis: str | None = None, std: float | None = None) -> Embedding:
        """A table of vectors [size, D]. std: of the initial ones; unset: init_std, or 0.02."""
        c = self.config
        own = next(s for s in (std, c.init_std, 0.02) if s is not None)
        own *= getattr(c, "scaling", STANDARD).init("embedding", own)
        return Embedding(size, c.embed_dim, self.rules, axis, jnp.dtype(c.dtype), own)

    def make_head(self) -> Linear:
        """The vocabulary projection where it is not the embedding."""
        c = self.config
        return Linear(
            {"embed": c.embed_dim},
            {"vocab": c.vocab_size},
            self.rules,
            dtype=jnp.dtype(c.dtype),
            init_std=c.init_std,
            init_scale=getattr(c, "scaling", STANDARD).init("head", c.init_std),
            lora=getattr(c, "lora", LoraConfig()),
            unrounded=True,
        )

    def project(self, x: Array) -> jax.Array:
        """Logits, float32 [B, T, V], of x: [B, T, D]."""
        x = self.embedding.attend(x) if self._is_tied else self.head(x)
        return self.rules.constrain(x, "act_batch", "length", "vocab")

    def logits(self, hidden: Array) -> jax.Array:
        """hidden: [B, T, D] -> float32 [B, T, V]."""
        return self.project(hidden)

    @property
    def _is_tied(self) -> bool:
        return getattr(self.config, "tie_embeddings", True)

    @property
    def head_params(self) -> tuple[str, ...]:
        return ("embedding",) if self._is_tied else ("head",)

    @property
    def num_microbatches(self) -> int:
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


def check_scan_unroll(unroll: int, num_layers: int) -> None:
    """Raise ValueError for more layers in an iteration of the scan than there are."""
    if unroll > num_layers:
        raise ValueError(
            f"config.model.scan_unroll ({unroll}) must be at most num_layers ({num_layers})"
        )
