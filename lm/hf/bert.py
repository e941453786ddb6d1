"""BERT (arXiv:1810.04805), with its masked-LM head and its pooler where the tensors have them. The
head for pairs of sentences has no place here: `cls.seq_relationship.*` must be skipped by name.
"""

from __future__ import annotations

from typing import Any

from lm.hf.keys import ACTIVATIONS, StrictConfigReader
from lm.hf.table import LINEAR, LINEAR_OUT, TABLE, VECTOR, WeightMapping

MODEL = "encoder"
ARCHITECTURE, BARE = "BertForMaskedLM", "BertModel"
PREFIX = "bert."
BUFFERS = r"bert\.embeddings\.position_ids"
RENAMED = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
POOLER = "pooler.dense.weight"


def from_hf(keys: StrictConfigReader) -> dict[str, Any]:
    keys.expect("position_embedding_type", "absolute")
    keys.expect("is_decoder", False)
    keys.expect("add_cross_attention", False)
    keys.expect("tie_word_embeddings", True)
    keys.expect("directionality", "bidi")  # of the first release in TensorFlow
    keys.ignore(*(f"pooler_{name}" for name in _POOLER))
    embed_dim = keys.take("hidden_size")
    return {
        "vocab_size": keys.take("vocab_size"),
        "max_length": keys.take("max_position_embeddings"),
        "num_layers": keys.take("num_hidden_layers"),
        "embed_dim": embed_dim,
        "num_heads": keys.take("num_attention_heads"),
        "mlp_dim": keys.take("intermediate_size"),
        "activation": keys.translate("hidden_act", ACTIVATIONS, "gelu"),
        "norm": "layer",
        "norm_placement": "post",
        "norm_eps": keys.take("layer_norm_eps", 1e-12),
        "norm_bias": True,
        "positions": "learned",
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True),
        "has_head": keys.has_head("cls.predictions."),
        "num_types": keys.take("type_vocab_size", 2),
        "pooler_dim": embed_dim if any(n.endswith(POOLER) for n in keys.tensors) else 0,
        "dropout": keys.take("hidden_dropout_prob", 0.1),
        "attention_dropout": keys.take("attention_probs_dropout_prob", 0.1),
    }


# of the multilingual release, and read by nothing
_POOLER = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")


def to_hf(model: Any) -> dict[str, Any]:
    names = {value: key for key, value in reversed(ACTIVATIONS.items())}
    return {
        "model_type": "bert",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_length,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.embed_dim,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_size,
        "hidden_act": names.get(model.activation, model.activation),
        "layer_norm_eps": model.norm_eps,
        "type_vocab_size": model.num_types,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
    }


def weight_map(model: Any) -> list[WeightMapping]:
    layer = "bert.encoder.layer.{layer}"
    found = [
        WeightMapping("embedding.weight", "bert.embeddings.word_embeddings.weight", TABLE),
        WeightMapping("position.weight", "bert.embeddings.position_embeddings.weight", TABLE),
        *_norm("embedding_norm", "bert.embeddings.LayerNorm"),
        *_norm("layers.attention_norm", f"{layer}.attention.output.LayerNorm"),
        *_norm("layers.mlp_norm", f"{layer}.output.LayerNorm"),
        *_linear("layers.attention.out", f"{layer}.attention.output.dense", LINEAR_OUT),
        *_linear("layers.mlp.up", f"{layer}.intermediate.dense"),
        *_linear("layers.mlp.down", f"{layer}.output.dense"),
    ]
    if model.has_head:
        found += _linear("transform", "cls.predictions.transform.dense")
        found += _norm("transform_norm", "cls.predictions.transform.LayerNorm")
        found.append(WeightMapping("logit_bias", "cls.predictions.bias", VECTOR))
    for name in ("query", "key", "value"):
        found += _linear(f"layers.attention.{name}", f"{layer}.attention.self.{name}")
    if model.num_types:
        found.append(
            WeightMapping("type.weight", "bert.embeddings.token_type_embeddings.weight", TABLE)
        )
    if model.pooler_dim:
        found += _linear("pooler", f"bert.{POOLER.removesuffix('.weight')}")
    return found


def _linear(name: str, hf_name: str, layout: Any = LINEAR) -> list[WeightMapping]:
    return [
        WeightMapping(f"{name}.weight", f"{hf_name}.weight", layout),
        WeightMapping(f"{name}.bias", f"{hf_name}.bias", VECTOR),
    ]


def _norm(name: str, hf_name: str) -> list[WeightMapping]:
    return [
        WeightMapping(f"{name}.scale", f"{hf_name}.weight", VECTOR),
        WeightMapping(f"{name}.bias", f"{hf_name}.bias", VECTOR),
    ]


def aliases(model: Any) -> dict[str, str]:
    if not model.has_head:
        return {}
    return {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
