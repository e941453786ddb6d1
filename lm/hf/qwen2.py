"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama with biases on query, key and value."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lm.hf import llama, rotary, windows
from lm.hf.keys import Fields, Json, StrictConfigReader

if TYPE_CHECKING:
    from lm.models.decoder import Config


def read(reader: StrictConfigReader, fields: Fields) -> Fields:
    return rotary.from_hf(reader) | windows.optional_from_hf(reader, fields["num_layers"])


def write(model: Config) -> Json:
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
