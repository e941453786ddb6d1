"""Gemma 3, the text models (arXiv:2503.19786): norms around each sublayer with a factor of 1 + w,
five layers with a window for each without, rotary positions with a base for each kind.
"""

from __future__ import annotations

from typing import Any

from lm.hf import llama, rotary, windows
from lm.hf.keys import StrictConfigReader
from lm.hf.llama import BUFFERS, LAYER, MODEL, PREFIX, RENAMED, aliases
from lm.hf.table import VECTOR, WeightMapping

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
ARCHITECTURE, BARE = "Gemma3ForCausalLM", "Gemma3TextModel"
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
}


def from_hf(keys: StrictConfigReader) -> dict[str, Any]:
    keys.fill(DEFAULTS)
    bias = keys.take("attention_bias", False)
    keys.expect("use_bidirectional_attention", False)
    keys.expect("attn_logit_softcapping", None)  # transformers reads it and does nothing with it
    fields = llama.shared_from_hf(keys, activation="hidden_activation", tie=True)
    num_layers = fields["num_layers"]
    every = keys.take("sliding_window_pattern", None)
    every = keys.take("_sliding_window_pattern", 6) if every is None else every
    usual = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(num_layers)
    ]
    kinds = keys.take("layer_types", None) or usual
    return {
        **fields,
        **rotary.both(keys),
        **windows.from_hf(kinds, keys.take_or_none("sliding_window", 4096), num_layers),
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "qk_norm": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "query_scale": keys.take("query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": keys.take("final_logit_softcapping", None),
        "embed_scale": fields["embed_dim"] ** 0.5,
    }


def to_hf(model: Any) -> dict[str, Any]:
    scale = model.head_size**-0.5 if model.query_scale is None else model.query_scale
    local = model.rotary.local_theta
    return {
        "model_type": "gemma3_text",
        **llama.shared_to_hf(model, activation="hidden_activation"),
        **rotary.to_hf(model),
        "rope_local_base_freq": model.rotary.theta if local is None else local,
        "sliding_window": model.window,
        "layer_types": windows.kinds(model),
        "attention_bias": model.qkv_bias,
        "query_pre_attn_scalar": _whole(scale**-2),
        "final_logit_softcapping": model.logit_softcap,
    }


def _whole(x: float) -> float | int:
    """The whole number that x is but for rounding, else x."""
    return round(x) if abs(x - round(x)) < 1e-9 * x else x


def weight_map(model: Any) -> list[WeightMapping]:
    after = {"attention_post_norm": "post_attention", "mlp_post_norm": "post_feedforward"}
    return [
        *llama.shared_weight_map(model),
        *llama.mlp_weight_map(model, norm="pre_feedforward_layernorm"),
        *(
            WeightMapping(f"layers.{name}.scale", f"{LAYER}.{hf_name}_layernorm.weight", VECTOR)
            for name, hf_name in after.items()
        ),
    ]
