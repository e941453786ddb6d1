"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama with biases on query, key and value."""

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
ARCHITECTURE, BARE = "Qwen2ForCausalLM", "Qwen2Model"


def from_hf(keys: StrictConfigReader) -> dict[str, Any]:
    keys.expect("use_mrope", False)
    fields = {**llama.shared_from_hf(keys), **rotary.from_hf(keys), "qkv_bias": True}
    return fields | windows.optional(keys, fields["num_layers"])


def to_hf(model: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        **llama.shared_to_hf(model),
        **rotary.to_hf(model),
        "use_sliding_window": model.window is not None,
        "sliding_window": model.window,
        "layer_types": windows.kinds(model),
    }
