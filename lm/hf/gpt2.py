"""GPT-2 (github.com/openai/gpt-2): one matrix for query, key and value, and weights [in, out]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm.hf.family import Family, Key
from lm.hf.keys import ACTIVATIONS, Fields, StrictConfigReader
from lm.hf.table import LINEAR, TABLE, TABLE_OUT, VECTOR, WeightMapping, linear, norm

if TYPE_CHECKING:
    from lm.models.decoder import Config

LAYER = "transformer.h.{layer}"
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


def _weight_map(model: Config) -> list[WeightMapping]:
    found = [
        WeightMapping("embedding.weight", "transformer.wte.weight", TABLE),
        WeightMapping("position.weight", "transformer.wpe.weight", TABLE),
        *norm("layers.attention_norm", f"{LAYER}.ln_1"),
        *norm("layers.mlp_norm", f"{LAYER}.ln_2"),
        *linear("layers.attention.out", f"{LAYER}.attn.c_proj", TABLE_OUT),
        *linear("layers.mlp.up", f"{LAYER}.mlp.c_fc", TABLE),
        *linear("layers.mlp.down", f"{LAYER}.mlp.c_proj", TABLE),
        *norm("norm", "transformer.ln_f"),
    ]
    for part, name in enumerate(("query", "key", "value")):
        for kind, layout in (("weight", TABLE), ("bias", VECTOR)):
            path = f"layers.attention.{name}.{kind}"
            found.append(WeightMapping(path, f"{LAYER}.attn.c_attn.{kind}", layout, part, 3))
    if model.has_head and not model.tie_embeddings:
        found.append(WeightMapping("head.weight", "lm_head.weight", LINEAR))
    return found


def _aliases(model: Config) -> dict[str, str]:
    return {"lm_head.weight": "transformer.wte.weight"} if model.tie_embeddings else {}


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
    ),
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
    read=_read,
    write=lambda model: {"embd_pdrop": model.dropout},
    weight_map=_weight_map,
    aliases=_aliases,
    head="lm_head.",
    buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",  # causal masks
)
