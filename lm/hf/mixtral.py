"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from lm.hf import llama, rotary, windows
from lm.hf.keys import Keys
from lm.hf.llama import BUFFERS, LAYER, MODEL, PREFIX, RENAMED, aliases
from lm.hf.table import LINEAR, VECTOR, Row

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
ARCHITECTURE, BARE = "MixtralForCausalLM", "MixtralModel"


def ours(keys: Keys) -> dict[str, Any]:
    keys.expect("router_jitter_noise", 0.0)
    keys.ignore("output_router_logits")
    fields = {**llama.shared_ours(keys, eps=1e-5), **rotary.ours(keys, theta=1_000_000.0)}
    chosen = keys.take("num_experts_per_tok", 2)
    return {
        **fields,
        **windows.ours(None, keys.take("sliding_window", None), fields["num_layers"]),
        "moe.num_experts": keys.take("num_local_experts", 8),
        "moe.num_experts_per_token": chosen,
        "moe.mlp_dim": fields["mlp_dim"],
        "moe.router": "topk_softmax",
        # at a balanced load theirs is the number of experts of a token, ours 1
        "moe.balance_loss": chosen * keys.take("router_aux_loss_coef", 0.001),
    }


def theirs(model: Any) -> dict[str, Any]:
    moe = model.moe
    return {
        "model_type": "mixtral",
        **llama.shared_theirs(model),
        **rotary.theirs(model),
        "intermediate_size": model.expert_size,
        "sliding_window": model.window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "router_aux_loss_coef": moe.balance_loss / moe.num_experts_per_token,
    }


def rows(model: Any) -> list[Row]:
    block = f"{LAYER}.block_sparse_moe"
    experts = {"gate": "w1", "down": "w2", "up": "w3"}
    return [
        *llama.shared_rows(model),
        Row("layers.mlp_norm.scale", f"{LAYER}.post_attention_layernorm.weight", VECTOR),
        Row("layers.moe.router", f"{block}.gate.weight", LINEAR),
        *(
            Row(f"layers.moe.{name}", f"{block}.experts.{{expert}}.{theirs_name}.weight", LINEAR)
            for name, theirs_name in experts.items()
        ),
    ]
