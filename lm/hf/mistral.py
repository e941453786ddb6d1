"""Mistral (arXiv:2310.06825): Llama with a window in every layer, or in none."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lm.hf import llama, rotary, windows
from lm.hf.keys import Fields, Json, StrictConfigReader

if TYPE_CHECKING:
    from lm.models.decoder import Config


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    window = reader.take_or_none("sliding_window", 4096)
    return rotary.from_hf(reader) | windows.from_hf(None, window, fields["num_layers"])


def _write(model: Config) -> Json:
    return {**rotary.to_hf(model), "sliding_window": model.window}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    architecture="MistralForCausalLM",
    bare="MistralModel",
    keys=llama.KEYS,
    expected={},
    read=_read,
    write=_write,
)
