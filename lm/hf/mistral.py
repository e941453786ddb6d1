"""Mistral (arXiv:2310.06825): Llama with a window in every layer, or in none."""

from __future__ import annotations

from typing import Any

from lm.hf import llama, rotary, windows
from lm.hf.keys import Keys
from lm.hf.llama import BUFFERS, MODEL, PREFIX, RENAMED, aliases, rows

__all__ = [
    "ARCHITECTURE",
    "BARE",
    "BUFFERS",
    "MODEL",
    "PREFIX",
    "RENAMED",
    "aliases",
    "ours",
    "rows",
    "theirs",
]
ARCHITECTURE, BARE = "MistralForCausalLM", "MistralModel"


def ours(keys: Keys) -> dict[str, Any]:
    fields = {**llama.shared_ours(keys), **rotary.ours(keys)}
    return fields | windows.ours(
        None, keys.take_or_none("sliding_window", 4096), fields["num_layers"]
    )


def theirs(model: Any) -> dict[str, Any]:
    return {
        "model_type": "mistral",
        **llama.shared_theirs(model),
        **rotary.theirs(model),
        "sliding_window": model.window,
    }
