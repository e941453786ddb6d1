"""Llama 1 to 3 (arXiv:2407.21783) and models of its shape, SmolLM among them; what other families
have in common with it.
"""

from __future__ import annotations

from typing import Any

from lm.hf import rotary
from lm.hf.keys import ACTIVATIONS, StrictConfigReader
from lm.hf.table import LINEAR, LINEAR_OUT, TABLE, VECTOR, WeightMapping

MODEL = "decoder"
ARCHITECTURE, BARE = "LlamaForCausalLM", "LlamaModel"
PREFIX = "model."
BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
RENAMED = ()


def from_hf(keys: StrictConfigReader) -> dict[str, Any]:
    bias = keys.take("attention_bias", False)
    keys.expect("rope_interleaved", False)
    return {
        **shared_from_hf(keys),
        **rotary.from_hf(keys),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": keys.take("mlp_bias", False),
    }


def to_hf(model: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        **shared_to_hf(model),
        **rotary.to_hf(model),
        "attention_bias": model.qkv_bias,
        "mlp_bias": model.mlp_bias,
    }


def weight_map(model: Any) -> list[WeightMapping]:
    return shared_weight_map(model) + mlp_weight_map(model)


def aliases(model: Any) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_embeddings else {}


def shared_from_hf(
    keys: StrictConfigReader,
    *,
    activation: str = "hidden_act",
    tie: bool = False,
    eps: float = 1e-6,
    head_dim: int | None = None,
) -> dict[str, Any]:
    """Sizes, norm and activation, which all families name alike; `tie`, `eps` and `head_dim` are
    for a config.json that doesn't say, `activation` is the key for it.
    """
    embed_dim, num_heads = keys.take("hidden_size"), keys.take("num_attention_heads")
    tied = keys.take("tie_word_embeddings", tie)
    gates = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
    gated = {key: gates[plain] for key, plain in ACTIVATIONS.items()}
    return {
        "vocab_size": keys.take("vocab_size"),
        "num_layers": keys.take("num_hidden_layers"),
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": keys.take("num_key_value_heads", num_heads),
        "head_dim": keys.take("head_dim", head_dim or embed_dim // num_heads),
        "mlp_dim": keys.take("intermediate_size"),
        "activation": keys.translate(activation, gated, "silu"),
        "norm": "rms",
        "norm_eps": keys.take("rms_norm_eps", eps),
        "positions": "rotary",
        "tie_embeddings": tied,
        "has_head": tied or keys.has_head("lm_head."),
        "attention_dropout": keys.take("attention_dropout", 0.0),
    }


def shared_to_hf(model: Any, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The keys that `shared_from_hf` reads."""
    names = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh", "reglu": "relu"}
    return {
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.embed_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "intermediate_size": model.mlp_size,
        activation: names.get(model.activation, model.activation),
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.attention_dropout,
    }


LAYER = "model.layers.{layer}"


def shared_weight_map(model: Any) -> list[WeightMapping]:
    """Embedding, attention, final norm and head."""
    found = [WeightMapping("embedding.weight", "model.embed_tokens.weight", TABLE)]
    found.append(
        WeightMapping("layers.attention_norm.scale", f"{LAYER}.input_layernorm.weight", VECTOR)
    )
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        layout = LINEAR_OUT if name == "out" else LINEAR
        path, hf_path = f"layers.attention.{name}", f"{LAYER}.self_attn.{letter}_proj"
        found.append(WeightMapping(f"{path}.weight", f"{hf_path}.weight", layout))
        if model.out_bias if name == "out" else model.qkv_bias:
            found.append(WeightMapping(f"{path}.bias", f"{hf_path}.bias", VECTOR))
    if model.qk_norm:
        for name, letter in (("query", "q"), ("key", "k")):
            path = f"layers.attention.{name}_norm.scale"
            found.append(WeightMapping(path, f"{LAYER}.self_attn.{letter}_norm.weight", VECTOR))
    found.append(WeightMapping("norm.scale", "model.norm.weight", VECTOR))
    if model.has_head and not model.tie_embeddings:
        found.append(WeightMapping("head.weight", "lm_head.weight", LINEAR))
    return found


def mlp_weight_map(model: Any, *, norm: str = "post_attention_layernorm") -> list[WeightMapping]:
    """A gated MLP and the norm before it."""
    found = [WeightMapping("layers.mlp_norm.scale", f"{LAYER}.{norm}.weight", VECTOR)]
    for name in ("gate", "up", "down"):
        path, hf_path = f"layers.mlp.{name}", f"{LAYER}.mlp.{name}_proj"
        found.append(WeightMapping(f"{path}.weight", f"{hf_path}.weight", LINEAR))
        if model.mlp_bias:
            found.append(WeightMapping(f"{path}.bias", f"{hf_path}.bias", VECTOR))
    return found
