"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama with biases on query, key and value."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lm.hf import llama, rotary, windows
from lm.hf.keys import StrictConfigReader

if TYPE_CHECKING:
    from lm.models.decoder import Config


def read(reader: StrictConfigReader, fields: dict[str, Any]) -> dict[str, Any]:
    return rotary.from_hf(reader) | windows.optional_from_hf(reader, fields["num_layers"])


def write(model: Config) -> dict[str, Any]:
    return rotary.to_hf(model) | windows.optional_to_hf(model)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    bare="Qwen2Model",
    keys=llama.KEYS,
    fields={**llama.FIELDS, "qkv_bias": True},
    expected={"use_mrope": False},
    read=read,
    write=write,
)
