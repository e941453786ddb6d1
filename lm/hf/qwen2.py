"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama with biases on query, key and value."""

import dataclasses

from lm.hf import llama, windows

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    bare="Qwen2Model",
    keys=(*llama.KEYS, windows.OPTIONAL),
    fields={**llama.FIELDS, "qkv_bias": True},
    expected={"use_mrope": False},
)
