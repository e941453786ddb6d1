"""Qwen 3, the dense models (arXiv:2505.09388): Llama with a norm on queries and keys."""

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
ARCHITECTURE, BARE = "Qwen3ForCausalLM", "Qwen3Model"


def from_hf(keys: StrictConfigReader) -> dict[str, Any]:
    bias = keys.take("attention_bias", False)
    fields = {**llama.shared_from_hf(keys, head_dim=128), **rotary.from_hf(keys)}
    fields |= {"qk_norm": True, "qkv_bias": bias, "out_bias": bias}
    return fields | windows.optional(keys, fields["num_layers"])


def to_hf(model: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        **llama.shared_to_hf(model),
        **rotary.to_hf(model),
        "attention_bias": model.qkv_bias,
        "use_sliding_window": model.window is not None,
        "sliding_window": model.window,
        "layer_types": windows.kinds(model),
    }
