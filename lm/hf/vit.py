"""The vision transformer (arXiv:2010.11929), with its classes or its pooler where it has them."""

from __future__ import annotations

from typing import Any

from lm.hf.clip import vision_keys
from lm.hf.family import Family, Key, KeyGroup
from lm.hf.keys import Fields, Json, StrictConfigReader

LAYER = "vit.encoder.layer.{}"
POOLER = "vit.pooler.dense"
MODULES = {
    "vision.class_token": "vit.embeddings.cls_token",
    "vision.position.weight": "vit.embeddings.position_embeddings",
    "vision.patch": "vit.embeddings.patch_embeddings.projection",
    **{
        f"vision.layers.attention.{name}": f"{LAYER}.attention.attention.{name}"
        for name in ("query", "key", "value")
    },
    "vision.layers.attention.out": f"{LAYER}.attention.output.dense",
    "vision.layers.attention_norm": f"{LAYER}.layernorm_before",
    "vision.layers.mlp.up": f"{LAYER}.intermediate.dense",
    "vision.layers.mlp.down": f"{LAYER}.output.dense",
    "vision.layers.mlp_norm": f"{LAYER}.layernorm_after",
    "vision.norm": "vit.layernorm",
    "pooler": POOLER,
    "head": "classifier",
}


def _read(reader: StrictConfigReader, fields: Fields) -> Fields:
    has_pooler = f"{POOLER}.weight" in reader.tensors
    width = reader.take("pooler_output_size", fields["vision.embed_dim"])
    classes = len(reader.tree.get("id2label") or ())
    return {
        "pooler_dim": width if has_pooler else 0,
        "num_classes": classes or reader.tree.get("num_labels") or 2,
    }


def _write(model: Any) -> Json:
    names = {str(i): f"LABEL_{i}" for i in range(model.num_classes)}
    return {"pooler_output_size": model.pooler_dim or model.vision.embed_dim, "id2label": names}


FAMILY = Family(
    model_type="vit",
    model="vit",
    architecture="ViTForImageClassification",
    bare="ViTModel",
    prefix="vit.",
    keys=(
        *vision_keys("gelu", 1e-12, patch=16),
        Key("hidden_dropout_prob", "dropout", 0.0),
        KeyGroup(_read, _write),
    ),
    modules=lambda model: MODULES,
    ones={"vit.embeddings.cls_token": 2, "vit.embeddings.position_embeddings": 1},
    fields={
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "vision.positions": "learned",
        "vision.pooling": "class_token",
        "vision.patch_bias": True,
        "vision.pre_norm": False,
    },
    expected={
        "attention_probs_dropout_prob": 0.0,
        "num_channels": 3,
        "qkv_bias": True,
        "pooler_act": "tanh",
    },
    ignored=("encoder_stride",),  # of masked image modelling
    head="classifier.",
    image_processor=lambda size: {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": size, "width": size},
        "resample": 2,  # bilinear
    },
    reads_text=False,
)
