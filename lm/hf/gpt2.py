"""GPT-2 (github.com/openai/gpt-2): one matrix for query, key and value, and weights [in, out]."""

from __future__ import annotations

from lm.hf.family import Family, Key, KeyGroup
from lm.hf.keys import ACTIVATIONS, Fields, StrictConfigReader

LAYER = "transformer.h.{}"
MODULES = {
    "embedding": "transformer.wte",
    "position": "transformer.wpe",
    "layers.attention_norm": f"{LAYER}.ln_1",
    **{f"layers.attention.{n}": f"{LAYER}.attn.c_attn" for n in ("query", "key", "value")},
    "layers.attention.out": f"{LAYER}.attn.c_proj",
    "layers.mlp_norm": f"{LAYER}.ln_2",
    "layers.mlp.up": f"{LAYER}.mlp.c_fc",
    "layers.mlp.down": f"{LAYER}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    dropout, of_embedding = fields["dropout"], reader.take("embd_pdrop", 0.1)
    if dropout != of_embedding:
        reader.say(
            f"note: config.json has embd_pdrop ({of_embedding}) beside resid_pdrop ({dropout}); "
            "config.model.dropout is the latter in both places, for training: nothing else reads it"
        )
    for name, field in (  # `transformers` takes them for the same sizes
        ("hidden_size", "embed_dim"),
        ("num_attention_heads", "num_heads"),
        ("num_hidden_layers", "num_layers"),
        ("max_position_embeddings", "max_length"),
    ):
        reader.expect(name, fields[field])
    return {}


FAMILY = Family(
    model_type="gpt2",
    model="decoder",
    architecture="GPT2LMHeadModel",
    bare="GPT2Model",
    prefix="transformer.",
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("n_positions", "max_length"),
        Key("n_embd", "embed_dim"),
        Key("n_layer", "num_layers"),
        Key("n_head", "num_heads"),
        Key("n_inner", "mlp_dim", lambda fields: 4 * fields["embed_dim"]),
        Key("activation_function", "activation", "gelu_new", ACTIVATIONS),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("resid_pdrop", "dropout", 0.1),
        Key("attn_pdrop", "attention_dropout", 0.1),
        Key("tie_word_embeddings", "tie_embeddings", True),
        KeyGroup(_read, lambda model: {"embd_pdrop": model.dropout}),
    ),
    modules=lambda model: MODULES,
    transposed=False,
    aliases={"lm_head.weight": "transformer.wte.weight"},
    fields={
        "norm": "layer",
        "norm_bias": True,
        "positions": "learned",
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True),
    },
    expected={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    ignored=(
        "reorder_and_upcast_attn",  # the same scores, with other rounding in float16
        *(f"summary_{name}" for name in _SUMMARY),
    ),
    head="lm_head.",
    buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",  # causal masks
)
