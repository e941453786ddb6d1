"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lm.hf import llama, windows
from lm.hf.family import Key, KeyGroup
from lm.hf.keys import Fields, Json, StrictConfigReader

if TYPE_CHECKING:
    from lm.models.decoder import Config

BLOCK = f"{llama.LAYER}.block_sparse_moe"


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    # at a balanced load the loss of `transformers` is the number of experts of a token, lm's is 1
    coefficient = reader.take("router_aux_loss_coef", 0.001)
    return {
        "moe.mlp_dim": fields["mlp_dim"],
        "moe.router": "topk_softmax",
        "moe.balance_loss": fields["moe.num_experts_per_token"] * coefficient,
    }


def _write(model: Config) -> Json:
    return {
        "intermediate_size": model.expert_size,
        "router_aux_loss_coef": model.moe.balance_loss / model.moe.num_experts_per_token,
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    bare="MixtralModel",
    keys=(
        *llama.KEYS,
        windows.in_every_layer(default=None),
        Key("num_local_experts", "moe.num_experts", 8),
        Key("num_experts_per_tok", "moe.num_experts_per_token", 2),
        KeyGroup(_read, _write),
    ),
    modules=lambda model: {
        **llama.MODULES,
        "layers.moe.router": f"{BLOCK}.gate.weight",
        "layers.moe.gate": f"{BLOCK}.experts.{{}}.w1.weight",
        "layers.moe.down": f"{BLOCK}.experts.{{}}.w2.weight",
        "layers.moe.up": f"{BLOCK}.experts.{{}}.w3.weight",
    },
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    expected={"router_jitter_noise": 0.0},
    ignored=("output_router_logits",),
)
