"""BERT (arXiv:1810.04805), with its masked-LM head and its pooler where the tensors have them.

The head for pairs of sentences, `cls.seq_relationship.*`, can't be represented: skip it by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm.hf.family import Family, Key
from lm.hf.keys import ACTIVATIONS, Fields, StrictConfigReader
from lm.hf.table import LINEAR_OUT, TABLE, VECTOR, WeightMapping, linear, norm

if TYPE_CHECKING:
    from lm.models.encoder import Config

POOLER = "pooler.dense"
LAYER = "bert.encoder.layer.{layer}"
# of the multilingual release, and read by nothing
_POOLER_KEYS = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    has_pooler = any(name.endswith(f"{POOLER}.weight") for name in reader.tensors)
    return {"pooler_dim": fields["embed_dim"] if has_pooler else 0}


def _weight_map(model: Config) -> list[WeightMapping]:
    embeddings = {"embedding": "word", "position": "position"}
    if model.num_types:
        embeddings["type"] = "token_type"
    found = [
        WeightMapping(f"{name}.weight", f"bert.embeddings.{hf_name}_embeddings.weight", TABLE)
        for name, hf_name in embeddings.items()
    ]
    for name in ("query", "key", "value"):
        found += linear(f"layers.attention.{name}", f"{LAYER}.attention.self.{name}")
    found += [
        *norm("embedding_norm", "bert.embeddings.LayerNorm"),
        *norm("layers.attention_norm", f"{LAYER}.attention.output.LayerNorm"),
        *norm("layers.mlp_norm", f"{LAYER}.output.LayerNorm"),
        *linear("layers.attention.out", f"{LAYER}.attention.output.dense", LINEAR_OUT),
        *linear("layers.mlp.up", f"{LAYER}.intermediate.dense"),
        *linear("layers.mlp.down", f"{LAYER}.output.dense"),
    ]
    if model.has_head:
        found += linear("transform", "cls.predictions.transform.dense")
        found += norm("transform_norm", "cls.predictions.transform.LayerNorm")
        found.append(WeightMapping("logit_bias", "cls.predictions.bias", VECTOR))
    if model.pooler_dim:
        found += linear("pooler", f"bert.{POOLER}")
    return found


def _aliases(model: Config) -> dict[str, str]:
    if not model.has_head:
        return {}
    return {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


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
    ),
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
    read=_read,
    weight_map=_weight_map,
    aliases=_aliases,
    head="cls.predictions.",
    buffers=r"bert\.embeddings\.position_ids",
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)
