"""Qwen 3, the dense models (arXiv:2505.09388): Llama with a norm on queries and keys."""

import dataclasses

from lm.hf import llama, qwen2

FAMILY = dataclasses.replace(
    qwen2.FAMILY,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    bare="Qwen3Model",
    keys=(*qwen2.FAMILY.keys, llama.ATTENTION_BIAS),
    fields={**llama.FIELDS, "qk_norm": True},
    defaults={"head_dim": 128},
    expected={},
)
