"""T5 (arXiv:1910.10683) 1.0, whose states are scaled before the projection by the embedding, and
1.1 (and Flan), with a gated MLP and a projection of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm.hf.family import Family, Key, KeyGroup
from lm.hf.keys import ACTIVATIONS as UNGATED
from lm.hf.keys import Fields, Json, StrictConfigReader

if TYPE_CHECKING:
    from lm.models.encoder_decoder import Config

GATED = {
    # gated-gelu is the one whose function its name does not say
    **{"gated-gelu": "geglu_tanh", "gated-gelu_new": "geglu_tanh", "gated-relu": "reglu"},
    **dict.fromkeys(("gated-silu", "gated-swish"), "swiglu"),
}
HEAD = "lm_head.weight"
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    # transformers 5 says True for whatever it saves, and by the other key which release it is of
    tied = reader.take("tie_word_embeddings", True)
    scaled = reader.take("scale_decoder_outputs", tied)
    return {
        "tie_embeddings": tied and (scaled or HEAD not in reader.tensors),
        "logit_scale": fields["embed_dim"] ** -0.5 if scaled else 1.0,
    }


def _write(model: Config) -> Json:
    return {
        "tie_word_embeddings": model.tie_embeddings,
        "scale_decoder_outputs": model.logit_scale != 1.0,
        "is_encoder_decoder": True,
    }


def _modules(model: Config) -> dict[str, str]:
    gated = model.activation in GATED.values()
    mlp = {"gate": "wi_0", "up": "wi_1" if gated else "wi", "down": "wo"}
    sublayers = {
        "attention": ("SelfAttention", _ATTENTION),
        "cross_attention": ("EncDecAttention", _ATTENTION),
        "mlp": ("DenseReluDense", mlp),
    }
    found = {"embedding": "shared", "head": "lm_head"}
    for stack, names in (("encoder", ("attention", "mlp")), ("decoder", tuple(sublayers))):
        for i, name in enumerate(names):
            ours, theirs = f"{stack}.layers.{name}", f"{stack}.block.{{}}.layer.{i}"
            kind, parts = sublayers[name]
            found[f"{ours}_norm"] = f"{theirs}.layer_norm"
            found |= {f"{ours}.{part}": f"{theirs}.{kind}.{parts[part]}" for part in parts}
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        found[f"{stack}.relative"] = table
        found[f"{stack}.norm"] = f"{stack}.final_layer_norm"
    return found


FAMILY = Family(
    model_type="t5",
    model="encoder_decoder",
    architecture="T5ForConditionalGeneration",
    bare="",
    prefix="",
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("n_positions", "max_length", 512),  # no more than what it was trained on
        Key("num_layers", "num_encoder_layers"),
        Key("num_decoder_layers", "num_layers", lambda fields: fields["num_encoder_layers"]),
        Key("d_model", "embed_dim"),
        Key("num_heads", "num_heads"),
        Key("d_kv", "head_dim"),
        Key("d_ff", "mlp_dim"),
        Key("feed_forward_proj", "activation", "relu", UNGATED | GATED),
        Key("layer_norm_epsilon", "norm_eps", 1e-6),
        Key("relative_attention_num_buckets", "relative_buckets", 32),
        Key("relative_attention_max_distance", "relative_max_distance", 128),
        Key("dropout_rate", ("dropout", "attention_dropout"), 0.1),
        KeyGroup(_read, _write),
    ),
    modules=_modules,
    aliases=dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD), "shared.weight"
    ),
    fields={"norm": "rms", "positions": "relative", "query_scale": 1.0},
    expected={"is_encoder_decoder": True, "is_decoder": False},
    ignored=("dense_act_fn", "is_gated_act"),  # follow from feed_forward_proj
    # a table for cross-attention, which has no positions: in the first release, read by nothing
    buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
