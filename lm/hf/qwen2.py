"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama with biases on query, key and value."""

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
ARCHITECTURE, BARE = "Qwen2ForCausalLM", "Qwen2Model"


def ours(keys: Keys) -> dict[str, Any]:
    keys.expect("use_mrope", False)
    fields = {**llama.shared_ours(keys), **rotary.ours(keys), "qkv_bias": True}
    return fields | windows.optional(keys, fields["num_layers"])


def theirs(model: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        **llama.shared_theirs(model),
        **rotary.theirs(model),
        "use_sliding_window": model.window is not None,
        "sliding_window": model.window,
        "layer_types": windows.kinds(model),
    }
