"""BERT (arXiv:1810.04805), with its masked-LM head and its pooler where the tensors have them.

The head for pairs of sentences, `cls.seq_relationship.*`, can't be represented: skip it by name.
"""

from __future__ import annotations

from lm.hf.family import Family, Key, KeyGroup
from lm.hf.keys import ACTIVATIONS, Fields, StrictConfigReader

LAYER = "bert.encoder.layer.{}"
POOLER = "bert.pooler.dense"
EMBEDDINGS = {"embedding": "word", "position": "position", "type": "token_type"}
MODULES = {
    **{name: f"bert.embeddings.{hf_name}_embeddings" for name, hf_name in EMBEDDINGS.items()},
    "embedding_norm": "bert.embeddings.LayerNorm",
    **{f"layers.attention.{n}": f"{LAYER}.attention.self.{n}" for n in ("query", "key", "value")},
    "layers.attention.out": f"{LAYER}.attention.output.dense",
    "layers.attention_norm": f"{LAYER}.attention.output.LayerNorm",
    "layers.mlp.up": f"{LAYER}.intermediate.dense",
    "layers.mlp.down": f"{LAYER}.output.dense",
    "layers.mlp_norm": f"{LAYER}.output.LayerNorm",
    "pooler": POOLER,
    "transform": "cls.predictions.transform.dense",
    "transform_norm": "cls.predictions.transform.LayerNorm",
    "logit_bias": "cls.predictions.bias",
}
# of the multilingual release, and read by nothing
_POOLER_KEYS = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    has_pooler = f"{POOLER}.weight" in reader.tensors
    return {"pooler_dim": fields["embed_dim"] if has_pooler else 0}


FAMILY = Family(
    model_type="bert",
    model="encoder",
    architecture="BertForMaskedLM",
    bare="BertModel",
    prefix="bert.",
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("max_position_embeddings", "max_length"),
        Key("num_hidden_layers", "num_layers"),
        Key("hidden_size", "embed_dim"),
        Key("num_attention_heads", "num_heads"),
        Key("intermediate_size", "mlp_dim"),
        Key("hidden_act", "activation", "gelu", ACTIVATIONS),
        Key("layer_norm_eps", "norm_eps", 1e-12),
        Key("type_vocab_size", "num_types", 2),
        Key("hidden_dropout_prob", "dropout", 0.1),
        Key("attention_probs_dropout_prob", "attention_dropout", 0.1),
        KeyGroup(_read),
    ),
    modules=lambda model: MODULES,
    aliases={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    fields={
        "norm": "layer",
        "norm_placement": "post",
        "norm_bias": True,
        "positions": "learned",
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True),
    },
    expected={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "directionality": "bidi",  # of the first release in TensorFlow
    },
    ignored=tuple(f"pooler_{name}" for name in _POOLER_KEYS),
    head="cls.predictions.",
    buffers=r"bert\.embeddings\.position_ids",
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)
