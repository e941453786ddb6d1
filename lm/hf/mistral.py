"""Mistral (arXiv:2310.06825): Llama with a window in every layer, or in none."""

import dataclasses

from lm.hf import llama, windows

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    architecture="MistralForCausalLM",
    bare="MistralModel",
    keys=(*llama.KEYS, windows.in_every_layer(default=4096)),
    expected={},
)
