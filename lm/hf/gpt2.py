"""GPT-2 (github.com/openai/gpt-2): one matrix makes query, key and value, and weights are
[in, out].
"""

from __future__ import annotations

from typing import Any

from lm.hf.keys import ACTIVATIONS, StrictConfigReader
from lm.hf.table import LINEAR, TABLE, TABLE_OUT, VECTOR, WeightMapping

MODEL = "decoder"
ARCHITECTURE, BARE = "GPT2LMHeadModel", "GPT2Model"
PREFIX = "transformer."
BUFFERS = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"  # causal masks
RENAMED = ()


def from_hf(keys: StrictConfigReader) -> dict[str, Any]:
    embed_dim = keys.take("n_embd")
    dropout, of_embedding = keys.take("resid_pdrop", 0.1), keys.take("embd_pdrop", 0.1)
    if dropout != of_embedding:
        keys.say(
            f"note: config.json has embd_pdrop ({of_embedding}) beside resid_pdrop ({dropout}); "
            "config.model.dropout is the latter in both places, for training: nothing else reads it"
        )
    num_heads, num_layers = keys.take("n_head"), keys.take("n_layer")
    length = keys.take("n_positions")
    for name, value in (  # `transformers` takes them for the same sizes
        ("hidden_size", embed_dim),
        ("num_attention_heads", num_heads),
        ("num_hidden_layers", num_layers),
        ("max_position_embeddings", length),
    ):
        keys.expect(name, value)
    tied = keys.take("tie_word_embeddings", True)
    keys.expect("scale_attn_weights", True)
    keys.expect("scale_attn_by_inverse_layer_idx", False)
    keys.expect("add_cross_attention", False)
    keys.ignore("reorder_and_upcast_attn")  # the same scores, with other rounding in float16
    keys.ignore(*(f"summary_{n}" for n in _SUMMARY))
    return {
        "vocab_size": keys.take("vocab_size"),
        "max_length": length,
        "num_layers": num_layers,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "mlp_dim": keys.take("n_inner", 4 * embed_dim),
        "activation": keys.translate("activation_function", ACTIVATIONS, "gelu_new"),
        "norm": "layer",
        "norm_eps": keys.take("layer_norm_epsilon", 1e-5),
        "norm_bias": True,
        "positions": "learned",
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True),
        "tie_embeddings": tied,
        "has_head": tied or keys.has_head("lm_head."),
        "dropout": dropout,
        "attention_dropout": keys.take("attn_pdrop", 0.1),
    }


_SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")


def to_hf(model: Any) -> dict[str, Any]:
    names = {value: key for key, value in reversed(ACTIVATIONS.items())}
    return {
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.max_length,
        "n_embd": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.mlp_size,
        "activation_function": names.get(model.activation, model.activation),
        "layer_norm_epsilon": model.norm_eps,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
    }


def weight_map(model: Any) -> list[WeightMapping]:
    layer = "transformer.h.{layer}"
    found = [
        WeightMapping("embedding.weight", "transformer.wte.weight", TABLE),
        WeightMapping("position.weight", "transformer.wpe.weight", TABLE),
    ]
    for name, hf_name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
        found += _norm(f"layers.{name}", f"{layer}.{hf_name}")
    for part, name in enumerate(("query", "key", "value")):
        for kind, layout in (("weight", TABLE), ("bias", VECTOR)):
            path = f"layers.attention.{name}.{kind}"
            found.append(WeightMapping(path, f"{layer}.attn.c_attn.{kind}", layout, part, 3))
    for path, name, layout in (
        ("attention.out", "attn.c_proj", TABLE_OUT),
        ("mlp.up", "mlp.c_fc", TABLE),
        ("mlp.down", "mlp.c_proj", TABLE),
    ):
        found.append(WeightMapping(f"layers.{path}.weight", f"{layer}.{name}.weight", layout))
        found.append(WeightMapping(f"layers.{path}.bias", f"{layer}.{name}.bias", VECTOR))
    found += _norm("norm", "transformer.ln_f")
    if model.has_head and not model.tie_embeddings:
        found.append(WeightMapping("head.weight", "lm_head.weight", LINEAR))
    return found


def _norm(name: str, hf_name: str) -> list[WeightMapping]:
    return [
        WeightMapping(f"{name}.scale", f"{hf_name}.weight", VECTOR),
        WeightMapping(f"{name}.bias", f"{hf_name}.bias", VECTOR),
    ]


def aliases(model: Any) -> dict[str, str]:
    return {"lm_head.weight": "transformer.wte.weight"} if model.tie_embeddings else {}
