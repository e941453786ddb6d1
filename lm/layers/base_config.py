"""The config that all models share."""

from __future__ import annotations

import dataclasses

from lm.config.fields import check_values, field


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message, a path below config.model first, unless it holds."""
    if not condition:
        raise ValueError(f"config.model.{message}")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """Config that all models share; each adds its own fields, and `max_length`."""

    is_causal = True
    takes_encoder = False

    vocab_size: int = field(
        50_304, "Rows of the embedding; at least the tokenizer's vocabulary.", ge=1, le=2**31 - 1
    )
    num_layers: int = field(12, "Blocks.", ge=1)
    embed_dim: int = field(768, "Width of the residual stream.", ge=1)
    dropout: float = field(0.0, "Dropout of embeddings and residual branches.", ge=0, lt=1)
    dtype: str = field(
        "float32", "Compute type; parameters stay float32.", choices=("float32", "bfloat16")
    )
    scan_unroll: int = field(
        1, "Layers per iteration of the scan; -1: all of them, no loop.", ge=1, also=(-1,)
    )

    @property
    def unroll(self) -> int:
        """Layers per iteration of the scan."""
        return self.num_layers if self.scan_unroll == -1 else self.scan_unroll

    def check(self, length: int) -> None:
        """Raise ValueError, naming config paths and numbers, unless the sizes fit together for
        rows of `length`.
        """
        del length
        check_values(self, "config.model")
        require(
            self.scan_unroll <= self.num_layers,
            f"scan_unroll ({self.scan_unroll}) must be at most num_layers ({self.num_layers})",
        )
