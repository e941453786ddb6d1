"""Llama 1 to 3 (arXiv:2407.21783) and models of its shape, SmolLM among them; and the keys and
tensors that other families share with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm.hf import rotary
from lm.hf.family import Family, Key
from lm.hf.keys import ACTIVATIONS, Fields, StrictConfigReader
from lm.hf.table import LINEAR, LINEAR_OUT, TABLE, WeightMapping, linear, norm

if TYPE_CHECKING:
    from lm.models.decoder import Config

LAYER = "model.layers.{layer}"
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
GATED = {"gelu_pytorch_tanh": "geglu_tanh"} | {k: _GATED[name] for k, name in ACTIVATIONS.items()}


def _default_head_dim(fields: Fields) -> int:
    return fields["embed_dim"] // fields["num_heads"]


KEYS = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "embed_dim"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("num_key_value_heads", "num_kv_heads", lambda fields: fields["num_heads"]),
    Key("head_dim", "head_dim", _default_head_dim),
    Key("intermediate_size", "mlp_dim"),
    Key("hidden_act", "activation", "silu", GATED),
    Key("rms_norm_eps", "norm_eps", 1e-6),
    Key("tie_word_embeddings", "tie_embeddings", False),
    Key("attention_dropout", "attention_dropout", 0.0),
)
ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "out_bias"), False)
FIELDS = {"norm": "rms", "positions": "rotary"}


def with_defaults(**defaults: object) -> tuple[Key, ...]:
    """`KEYS` with other defaults: {field: value}."""
    return tuple(
        Key(key.name, key.field, defaults.get(key.fields[0], key.default), key.words)
        for key in KEYS
    )


def attention_weight_map(model: Config) -> list[WeightMapping]:
    """Embedding, attention, final norm and head."""
    found = [WeightMapping("embedding.weight", "model.embed_tokens.weight", TABLE)]
    found += norm("layers.attention_norm", f"{LAYER}.input_layernorm", bias=False)
    for name in ("query", "key", "value", "out"):
        layout, bias = (LINEAR_OUT, model.out_bias) if name == "out" else (LINEAR, model.qkv_bias)
        hf_name = f"{LAYER}.self_attn.{name[0]}"
        found += linear(f"layers.attention.{name}", f"{hf_name}_proj", layout, bias=bias)
        if model.qk_norm and name in ("query", "key"):
            found += norm(f"layers.attention.{name}_norm", f"{hf_name}_norm", bias=False)
    found += norm("norm", "model.norm", bias=False)
    if model.has_head and not model.tie_embeddings:
        found.append(WeightMapping("head.weight", "lm_head.weight", LINEAR))
    return found


def weight_map(model: Config, *, mlp_norm: str = "post_attention_layernorm") -> list[WeightMapping]:
    """All parameters of a decoder with a gated MLP. mlp_norm: the norm before the MLP."""
    found = attention_weight_map(model)
    found += norm("layers.mlp_norm", f"{LAYER}.{mlp_norm}", bias=False)
    for name in ("gate", "up", "down"):
        found += linear(f"layers.mlp.{name}", f"{LAYER}.mlp.{name}_proj", bias=model.mlp_bias)
    return found


def aliases(model: Config) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_embeddings else {}


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    return rotary.from_hf(reader)


FAMILY = Family(
    model_type="llama",
    model="decoder",
    architecture="LlamaForCausalLM",
    bare="LlamaModel",
    prefix="model.",
    keys=(*KEYS, ATTENTION_BIAS, Key("mlp_bias", "mlp_bias", False)),
    fields=FIELDS,
    expected={"rope_interleaved": False},
    read=_read,
    write=rotary.to_hf,
    weight_map=weight_map,
    aliases=aliases,
    head="lm_head.",
    buffers=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
