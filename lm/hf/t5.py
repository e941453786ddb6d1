"""T5 (arXiv:1910.10683) 1.0, whose states are scaled before the projection by the embedding, and
1.1 (and Flan), with a gated MLP and a projection of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm.hf.family import Family, Key
from lm.hf.keys import ACTIVATIONS as UNGATED
from lm.hf.keys import Fields, Json, StrictConfigReader
from lm.hf.table import LINEAR, LINEAR_OUT, TABLE, WeightMapping, linear, norm

if TYPE_CHECKING:
    from lm.models.encoder_decoder import Config

ACTIVATIONS = {
    **UNGATED,
    # gated-gelu is the one whose function its name does not say
    **{"gated-gelu": "geglu_tanh", "gated-gelu_new": "geglu_tanh", "gated-relu": "reglu"},
    **dict.fromkeys(("gated-silu", "gated-swish"), "swiglu"),
}
HEAD = "lm_head.weight"


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


def _weight_map(model: Config) -> list[WeightMapping]:
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
        found += norm(f"{stack}.layers.mlp_norm", f"{block}.{last}.layer_norm", bias=False)
        names = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
        for name, hf_name in {**names, "down": "wo"}.items():
            path = f"{block}.{last}.DenseReluDense.{hf_name}"
            found += linear(f"{stack}.layers.mlp.{name}", path, bias=False)
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(WeightMapping(f"{stack}.relative.weight", table, TABLE))
        found += norm(f"{stack}.norm", f"{stack}.final_layer_norm", bias=False)
    return found


def _attention(name: str, layer: str, kind: str) -> list[WeightMapping]:
    found = norm(f"{name}_norm", f"{layer}.layer_norm", bias=False)
    for part in ("query", "key", "value", "out"):
        layout = LINEAR_OUT if part == "out" else LINEAR
        found += linear(f"{name}.{part}", f"{layer}.{kind}.{part[0]}", layout, bias=False)
    return found


def _aliases(model: Config) -> dict[str, str]:
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    return dict.fromkeys([*names, *([HEAD] if model.tie_embeddings else [])], "shared.weight")


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
        Key("feed_forward_proj", "activation", "relu", ACTIVATIONS),
        Key("layer_norm_epsilon", "norm_eps", 1e-6),
        Key("relative_attention_num_buckets", "relative_buckets", 32),
        Key("relative_attention_max_distance", "relative_max_distance", 128),
        Key("dropout_rate", ("dropout", "attention_dropout"), 0.1),
    ),
    fields={"norm": "rms", "positions": "relative", "query_scale": 1.0},
    expected={"is_encoder_decoder": True, "is_decoder": False},
    ignored=("dense_act_fn", "is_gated_act"),  # follow from feed_forward_proj
    read=_read,
    write=_write,
    weight_map=_weight_map,
    aliases=_aliases,
    # a table for cross-attention, which has no positions: in the first release, read by nothing
    buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
