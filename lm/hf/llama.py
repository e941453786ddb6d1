"""Llama 1 to 3 (arXiv:2407.21783) and models of its shape, SmolLM among them; and the keys and
tensors that other families share with it.
"""

from lm.hf import rotary
from lm.hf.family import Family, Key
from lm.hf.keys import ACTIVATIONS

LAYER = "model.layers.{}"
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
GATED = {"gelu_pytorch_tanh": "geglu_tanh"} | {
    key: _GATED[name] for key, name in ACTIVATIONS.items() if name in _GATED
}

SIZES = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "embed_dim"),
    Key("num_hidden_layers", "num_layers"),
    Key("num_attention_heads", "num_heads"),
    Key("num_key_value_heads", "num_kv_heads", lambda fields: fields["num_heads"]),
    Key("head_dim", "head_dim", lambda fields: fields["embed_dim"] // fields["num_heads"]),
    Key("intermediate_size", "mlp_dim"),
    Key("max_position_embeddings", "max_length"),
    Key("rms_norm_eps", "norm_eps", 1e-6),
    Key("tie_word_embeddings", "tie_embeddings", False),
    Key("attention_dropout", "attention_dropout", 0.0),
)
KEYS = (*SIZES, Key("hidden_act", "activation", "silu", GATED), rotary.KEYS)
ATTENTION_BIAS = Key("attention_bias", ("qkv_bias", "out_bias"), False)
FIELDS = {"norm": "rms", "positions": "rotary"}
MODULES = {
    "embedding": "model.embed_tokens",
    "layers.attention_norm": f"{LAYER}.input_layernorm",
    **{
        f"layers.attention.{n}": f"{LAYER}.self_attn.{n[0]}_proj" for n in ("query", "key", "value")
    },
    "layers.attention.out": f"{LAYER}.self_attn.o_proj",
    "layers.attention.query_norm": f"{LAYER}.self_attn.q_norm",
    "layers.attention.key_norm": f"{LAYER}.self_attn.k_norm",
    "layers.mlp_norm": f"{LAYER}.post_attention_layernorm",
    "layers.mlp.gate": f"{LAYER}.mlp.gate_proj",
    "layers.mlp.up": f"{LAYER}.mlp.up_proj",
    "layers.mlp.down": f"{LAYER}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}

FAMILY = Family(
    model_type="llama",
    model="decoder",
    architecture="LlamaForCausalLM",
    bare="LlamaModel",
    prefix="model.",
    keys=(*KEYS, ATTENTION_BIAS, Key("mlp_bias", "mlp_bias", False)),
    modules=lambda model: MODULES,
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
    fields=FIELDS,
    expected={"rope_interleaved": False},
    head="lm_head.",
    buffers=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
