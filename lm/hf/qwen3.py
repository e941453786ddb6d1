"""Qwen 3, the dense models (arXiv:2505.09388): Llama with a norm on queries and keys."""

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
ARCHITECTURE, BARE = "Qwen3ForCausalLM", "Qwen3Model"


def ours(keys: Keys) -> dict[str, Any]:
    bias = keys.take("attention_bias", False)
    fields = {**llama.shared_ours(keys, head_dim=128), **rotary.ours(keys)}
    fields |= {"qk_norm": True, "qkv_bias": bias, "out_bias": bias}
    return fields | windows.optional(keys, fields["num_layers"])


def theirs(model: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        **llama.shared_theirs(model),
        **rotary.theirs(model),
        "attention_bias": model.qkv_bias,
        "use_sliding_window": model.window is not None,
        "sliding_window": model.window,
        "layer_types": windows.kinds(model),
    }
