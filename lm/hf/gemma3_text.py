"""Gemma 3, the text models (arXiv:2503.19786): norms around each sublayer with a factor of 1 + w,
five layers with a window for each without, rotary positions with a base for each kind.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lm.hf import llama, rotary, windows
from lm.hf.family import Key, KeyGroup, effective_value
from lm.hf.keys import Fields, Json, StrictConfigReader
from lm.hf.llama import LAYER

if TYPE_CHECKING:
    from lm.models.decoder import Config

# of Gemma3TextConfig: what the published text_config of a larger model leaves out
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
}


def _read_rotary(reader: StrictConfigReader, fields: Fields) -> Fields:
    new = reader.take("rope_parameters", None) or {}
    if unknown := set(new) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"config.json has rope_parameters of {', '.join(sorted(unknown))}")
    local = {"rope_theta": reader.take("rope_local_base_freq", 10_000.0)}
    local |= new.get("sliding_attention") or {}
    parameters = StrictConfigReader(local, part="rope_parameters")
    parameters.expect("rope_type", "default")
    theta = float(parameters.take("rope_theta"))
    parameters.finish()
    rest = rotary.from_hf(reader, new.get("full_attention"), fields["max_length"])
    return {**rest, "rotary.local_theta": theta}


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    every = reader.take("sliding_window_pattern", None)
    every = reader.take("_sliding_window_pattern", 6) if every is None else every
    kinds = reader.take("layer_types", None) or [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention"
        for i in range(fields["num_layers"])
    ]
    window = reader.take_or_none("sliding_window", 4096)
    return {
        **_read_rotary(reader, fields),
        **windows.from_hf(kinds, window, fields["num_layers"]),
        "query_scale": reader.take("query_pre_attn_scalar", 256) ** -0.5,
        "embed_scale": fields["embed_dim"] ** 0.5,
    }


def _write(model: Config) -> Json:
    scalar = effective_value(model, "query_scale") ** -2
    is_whole = abs(scalar - round(scalar)) < 1e-9 * scalar  # but for rounding
    return {
        **rotary.to_hf(model),
        **windows.to_hf(model),
        "rope_local_base_freq": effective_value(model, "rotary.local_theta"),
        "query_pre_attn_scalar": round(scalar) if is_whole else scalar,
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    bare="Gemma3TextModel",
    keys=(
        *llama.SIZES,
        Key("hidden_activation", "activation", "silu", llama.GATED),
        llama.ATTENTION_BIAS,
        Key("final_logit_softcapping", "logit_softcap", None),
        KeyGroup(_read, _write),
    ),
    modules=lambda model: {
        **llama.MODULES,
        "layers.attention_post_norm": f"{LAYER}.post_attention_layernorm",
        "layers.mlp_norm": f"{LAYER}.pre_feedforward_layernorm",
        "layers.mlp_post_norm": f"{LAYER}.post_feedforward_layernorm",
    },
    fields={
        **llama.FIELDS,
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "qk_norm": True,
    },
    defaults=DEFAULTS,
    expected={
        "use_bidirectional_attention": False,
        "attn_logit_softcapping": None,  # transformers reads it and does nothing with it
    },
)
