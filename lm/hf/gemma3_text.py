"""Gemma 3, the text models (arXiv:2503.19786): norms around each sublayer with a factor of 1 + w,
five layers with a window for each without, rotary positions with a base for each kind.
"""

from __future__ import annotations

from typing import Any

from lm.hf import llama, rotary, windows
from lm.hf.keys import Keys
from lm.hf.llama import BUFFERS, LAYER, MODEL, PREFIX, RENAMED, aliases
from lm.hf.table import VECTOR, Row

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


def ours(keys: Keys) -> dict[str, Any]:
    keys.fill(DEFAULTS)
    bias = keys.take("attention_bias", False)
    keys.expect("use_bidirectional_attention", False)
    keys.expect("attn_logit_softcapping", None)  # transformers reads it and does nothing with it
    fields = llama.shared_ours(keys, activation="hidden_activation", tie=True)
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
        **windows.ours(kinds, keys.take_or_none("sliding_window", 4096), num_layers),
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "qk_norm": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "query_scale": keys.take("query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": keys.take("final_logit_softcapping", None),
        "embed_scale": fields["embed_dim"] ** 0.5,
    }


def theirs(model: Any) -> dict[str, Any]:
    scale = model.head_size**-0.5 if model.query_scale is None else model.query_scale
    local = model.rotary.local_theta
    return {
        "model_type": "gemma3_text",
        **llama.shared_theirs(model, activation="hidden_activation"),
        **rotary.theirs(model),
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


def rows(model: Any) -> list[Row]:
    after = {"attention_post_norm": "post_attention", "mlp_post_norm": "post_feedforward"}
    return [
        *llama.shared_rows(model),
        *llama.mlp_rows(model, norm="pre_feedforward_layernorm"),
        *(
            Row(f"layers.{name}.scale", f"{LAYER}.{theirs_name}_layernorm.weight", VECTOR)
            for name, theirs_name in after.items()
        ),
    ]
