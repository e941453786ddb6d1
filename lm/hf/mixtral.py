"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lm.hf import llama, rotary, windows
from lm.hf.family import Key
from lm.hf.keys import Fields, Json, StrictConfigReader
from lm.hf.llama import LAYER
from lm.hf.table import LINEAR, WeightMapping, norm

if TYPE_CHECKING:
    from lm.models.decoder import Config


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    window = reader.take("sliding_window", None)
    # at a balanced load the loss of `transformers` is the number of experts of a token, lm's is 1
    coefficient = reader.take("router_aux_loss_coef", 0.001)
    return {
        **rotary.from_hf(reader, theta=1_000_000.0),
        **windows.from_hf(None, window, fields["num_layers"]),
        "moe.mlp_dim": fields["mlp_dim"],
        "moe.router": "topk_softmax",
        "moe.balance_loss": fields["moe.num_experts_per_token"] * coefficient,
    }


def _write(model: Config) -> Json:
    return {
        **rotary.to_hf(model),
        "intermediate_size": model.expert_size,
        "sliding_window": model.window,
        "router_aux_loss_coef": model.moe.balance_loss / model.moe.num_experts_per_token,
    }


def _weight_map(model: Config) -> list[WeightMapping]:
    block = f"{LAYER}.block_sparse_moe"
    found = llama.attention_weight_map(model)
    found += norm("layers.mlp_norm", f"{LAYER}.post_attention_layernorm", bias=False)
    found.append(WeightMapping("layers.moe.router", f"{block}.gate.weight", LINEAR))
    for name, hf_name in {"gate": "w1", "down": "w2", "up": "w3"}.items():
        tensor = f"{block}.experts.{{expert}}.{hf_name}.weight"
        found.append(WeightMapping(f"layers.moe.{name}", tensor, LINEAR))
    return found


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    bare="MixtralModel",
    keys=(
        *llama.with_defaults(norm_eps=1e-5),
        Key("num_local_experts", "moe.num_experts", 8),
        Key("num_experts_per_tok", "moe.num_experts_per_token", 2),
    ),
    expected={"router_jitter_noise": 0.0},
    ignored=("output_router_logits",),
    read=_read,
    write=_write,
    weight_map=_weight_map,
)
