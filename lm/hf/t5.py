"""T5 (arXiv:1910.10683) 1.0, whose states are scaled before the projection by the embedding, and
1.1 (and Flan), with a gated MLP and a projection of its own.
"""

from __future__ import annotations

from typing import Any

from lm.hf.keys import ACTIVATIONS as UNGATED
from lm.hf.keys import StrictConfigReader
from lm.hf.table import LINEAR, LINEAR_OUT, TABLE, VECTOR, WeightMapping

MODEL = "encoder_decoder"
ARCHITECTURE, BARE = "T5ForConditionalGeneration", ""
PREFIX = ""
# a table for cross-attention, which has no positions: in the first release, read by nothing
BUFFERS = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
RENAMED = ()
ACTIVATIONS = {
    **UNGATED,
    # gated-gelu is the one whose function its name does not say
    **{"gated-gelu": "geglu_tanh", "gated-gelu_new": "geglu_tanh", "gated-relu": "reglu"},
    **dict.fromkeys(("gated-silu", "gated-swish"), "swiglu"),
}
HEAD = "lm_head.weight"


def from_hf(keys: StrictConfigReader) -> dict[str, Any]:
    keys.expect("is_encoder_decoder", True)
    keys.expect("is_decoder", False)
    keys.ignore("dense_act_fn", "is_gated_act")  # follow from feed_forward_proj
    embed_dim, num_layers = keys.take("d_model"), keys.take("num_layers")
    # transformers 5 says True for whatever it saves, and by the other key which release it is of
    tied = keys.take("tie_word_embeddings", True)
    scaled = keys.take("scale_decoder_outputs", tied)
    decoder_layers = keys.take("num_decoder_layers", None) or num_layers
    dropout = keys.take("dropout_rate", 0.1)
    return {
        "vocab_size": keys.take("vocab_size"),
        "max_length": keys.take("n_positions", 512),  # no more than what it was trained on
        "num_layers": decoder_layers,
        "num_encoder_layers": num_layers,
        "embed_dim": embed_dim,
        "num_heads": keys.take("num_heads"),
        "head_dim": keys.take("d_kv"),
        "mlp_dim": keys.take("d_ff"),
        "activation": keys.translate("feed_forward_proj", ACTIVATIONS, "relu"),
        "norm": "rms",
        "norm_eps": keys.take("layer_norm_epsilon", 1e-6),
        "positions": "relative",
        "relative_buckets": keys.take("relative_attention_num_buckets", 32),
        "relative_max_distance": keys.take("relative_attention_max_distance", 128),
        "query_scale": 1.0,
        "tie_embeddings": tied and (scaled or HEAD not in keys.tensors),
        "logit_scale": embed_dim**-0.5 if scaled else 1.0,
        "dropout": dropout,
        "attention_dropout": dropout,
    }


def to_hf(model: Any) -> dict[str, Any]:
    names = {value: key for key, value in reversed(ACTIVATIONS.items())}
    return {
        "model_type": "t5",
        "vocab_size": model.vocab_size,
        "n_positions": model.max_length,
        "num_layers": model.encoder.num_layers,
        "num_decoder_layers": model.num_layers,
        "d_model": model.embed_dim,
        "num_heads": model.num_heads,
        "d_kv": model.head_size,
        "d_ff": model.mlp_size,
        "feed_forward_proj": names.get(model.activation, model.activation),
        "layer_norm_epsilon": model.norm_eps,
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_max_distance,
        "tie_word_embeddings": model.tie_embeddings,
        "scale_decoder_outputs": model.logit_scale != 1.0,
        "dropout_rate": model.dropout,
        "is_encoder_decoder": True,
    }


def weight_map(model: Any) -> list[WeightMapping]:
    found = [WeightMapping("embedding.weight", "shared.weight", TABLE)]
    gated = any(a == model.activation for key, a in ACTIVATIONS.items() if "gated" in key)
    if not model.tie_embeddings:
        found.append(WeightMapping("head.weight", HEAD, LINEAR))
    for stack in ("encoder", "decoder"):
        block = f"{stack}.block.{{layer}}.layer"
        last = 2 if stack == "decoder" else 1
        found += _attention(f"{stack}.layers.attention", f"{block}.0", "SelfAttention")
        if stack == "decoder":
            found += _attention(f"{stack}.layers.cross_attention", f"{block}.1", "EncDecAttention")
        found.append(_norm(f"{stack}.layers.mlp_norm", f"{block}.{last}.layer_norm"))
        names = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
        for name, hf_name in {**names, "down": "wo"}.items():
            path = f"{block}.{last}.DenseReluDense.{hf_name}.weight"
            found.append(WeightMapping(f"{stack}.layers.mlp.{name}.weight", path, LINEAR))
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(WeightMapping(f"{stack}.relative.weight", table, TABLE))
        found.append(_norm(f"{stack}.norm", f"{stack}.final_layer_norm"))
    return found


def _attention(name: str, layer: str, kind: str) -> list[WeightMapping]:
    found = [_norm(f"{name}_norm", f"{layer}.layer_norm")]
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        layout = LINEAR_OUT if name == "out" else LINEAR
        found.append(
            WeightMapping(f"{name}.{name}.weight", f"{layer}.{kind}.{letter}.weight", layout)
        )
    return found


def _norm(name: str, hf_name: str) -> WeightMapping:
    return WeightMapping(f"{name}.scale", f"{hf_name}.weight", VECTOR)


def aliases(model: Any) -> dict[str, str]:
    found: dict[str, str] = dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"
    )
    return found | {HEAD: "shared.weight"} if model.tie_embeddings else found
