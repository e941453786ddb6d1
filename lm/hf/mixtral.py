"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from lm.hf import llama, rotary, windows
from lm.hf.keys import StrictConfigReader
from lm.hf.llama import BUFFERS, LAYER, MODEL, PREFIX, RENAMED, aliases
from lm.hf.table import LINEAR, VECTOR, WeightMapping

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
ARCHITECTURE, BARE = "MixtralForCausalLM", "MixtralModel"


def from_hf(keys: StrictConfigReader) -> dict[str, Any]:
    keys.expect("router_jitter_noise", 0.0)
    keys.ignore("output_router_logits")
    fields = {**llama.shared_from_hf(keys, eps=1e-5), **rotary.from_hf(keys, theta=1_000_000.0)}
    chosen = keys.take("num_experts_per_tok", 2)
    return {
        **fields,
        **windows.from_hf(None, keys.take("sliding_window", None), fields["num_layers"]),
        "moe.num_experts": keys.take("num_local_experts", 8),
        "moe.num_experts_per_token": chosen,
        "moe.mlp_dim": fields["mlp_dim"],
        "moe.router": "topk_softmax",
        # at a balanced load theirs is the number of experts of a token, ours 1
        "moe.balance_loss": chosen * keys.take("router_aux_loss_coef", 0.001),
    }


def to_hf(model: Any) -> dict[str, Any]:
    moe = model.moe
    return {
        "model_type": "mixtral",
        **llama.shared_to_hf(model),
        **rotary.to_hf(model),
        "intermediate_size": model.expert_size,
        "sliding_window": model.window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "router_aux_loss_coef": moe.balance_loss / moe.num_experts_per_token,
    }


def weight_map(model: Any) -> list[WeightMapping]:
    block = f"{LAYER}.block_sparse_moe"
    experts = {"gate": "w1", "down": "w2", "up": "w3"}
    return [
        *llama.shared_weight_map(model),
        WeightMapping("layers.mlp_norm.scale", f"{LAYER}.post_attention_layernorm.weight", VECTOR),
        WeightMapping("layers.moe.router", f"{block}.gate.weight", LINEAR),
        *(
            WeightMapping(
                f"layers.moe.{name}", f"{block}.experts.{{expert}}.{hf_name}.weight", LINEAR
            )
            for name, hf_name in experts.items()
        ),
    ]
