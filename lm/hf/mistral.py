"""Mistral (arXiv:2310.06825): Llama with a window in every layer, or in none."""

from __future__ import annotations

from typing import Any

from lm.hf import llama, rotary, windows
from lm.hf.keys import StrictConfigReader
from lm.hf.llama import BUFFERS, MODEL, PREFIX, RENAMED, aliases, weight_map

__all__ = [
    "ARCHITECTURE",
    "BARE",
    "BUFFERS",
    "MODEL",
    "PREFIX",
    "RENAMED",
    "aliases",
    "from_hf",
    "to_hf",
    "weight_map",
]
ARCHITECTURE, BARE = "MistralForCausalLM", "MistralModel"


def from_hf(keys: StrictConfigReader) -> dict[str, Any]:
    fields = {**llama.shared_from_hf(keys), **rotary.from_hf(keys)}
    return fields | windows.from_hf(
        None, keys.take_or_none("sliding_window", 4096), fields["num_layers"]
    )


def to_hf(model: Any) -> dict[str, Any]:
    return {
        "model_type": "mistral",
        **llama.shared_to_hf(model),
        **rotary.to_hf(model),
        "sliding_window": model.window,
    }
