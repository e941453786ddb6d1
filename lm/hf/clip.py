"""CLIP (arXiv:2103.00020), as of OpenAI and of LAION: a tower of pictures and one of texts."""

from __future__ import annotations

import math
from typing import Any

from lm.hf.family import Family, Key, KeyGroup, Section
from lm.hf.keys import ACTIVATIONS, Fields, Json, StrictConfigReader

BLOCK = {
    **{f"attention.{n}": f"self_attn.{n[0]}_proj" for n in ("query", "key", "value")},
    "attention.out": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "mlp_norm": "layer_norm2",
}


def tower(name: str, norm: str) -> dict[str, str]:
    """Rows of the blocks of a tower and of the norm after them."""
    layers = {
        f"{name}.layers.{own}": f"{name}_model.encoder.layers.{{}}.{theirs}"
        for own, theirs in BLOCK.items()
    }
    return {**layers, f"{name}.norm": f"{name}_model.{norm}"}


TOWERS = {  # of all models of two towers
    "text.embedding": "text_model.embeddings.token_embedding",
    "text.position": "text_model.embeddings.position_embedding",
    **tower("text", "final_layer_norm"),
    "vision.patch": "vision_model.embeddings.patch_embedding",
    "vision.position": "vision_model.embeddings.position_embedding",
    **tower("vision", "post_layernorm"),
    "logit_scale": "logit_scale",
}
MODULES = {
    **TOWERS,
    "vision.class_token": "vision_model.embeddings.class_embedding",
    "vision.pre_norm": "vision_model.pre_layrnorm",
    "image_projection": "visual_projection",
    "text_projection": "text_projection",
}


def tower_keys(name: str, activation: str, eps: float, **sizes: int) -> tuple[Key, ...]:
    """The keys that both towers have; sizes: defaults of their class in `transformers`."""
    return (
        Key("num_hidden_layers", f"{name}.num_layers", 12),
        Key("hidden_size", f"{name}.embed_dim", sizes["width"]),
        Key("num_attention_heads", f"{name}.num_heads", sizes["heads"]),
        Key("intermediate_size", f"{name}.mlp_dim", sizes["mlp"]),
        Key("hidden_act", f"{name}.activation", activation, ACTIVATIONS),
        Key("layer_norm_eps", f"{name}.norm_eps", eps),
    )


def text_keys(
    activation: str, eps: float, *, ids: int, length: int, **sizes: int
) -> tuple[Key, ...]:
    """The keys of a text tower; ids, length and sizes: defaults of its class."""
    return (
        *tower_keys("text", activation, eps, **sizes),
        Key("vocab_size", "vocab_size", ids),
        Key("max_position_embeddings", "max_length", length),
    )


def vision_keys(activation: str, eps: float, *, patch: int) -> tuple[Key | KeyGroup, ...]:
    """The keys of a vision tower, whose class has the sizes of ViT-B by default."""
    return (
        *tower_keys("vision", activation, eps, width=768, heads=12, mlp=3072),
        square("image_size", "image_size", 224),
        square("patch_size", "vision.patch_size", patch),
    )


def square(key: str, field: str, default: int) -> KeyGroup:
    """A height and width, as one number or as two that are the same."""

    def read(reader: StrictConfigReader, fields: Fields) -> Fields:
        value = reader.take(key, default)
        sides = {*value} if isinstance(value, list) else {value}
        if len(sides) != 1:
            raise ValueError(f"config.json has {key} = {value}: pictures and patches are square")
        return {field: sides.pop()}

    def write(model: Any) -> Json:
        section, _, name = field.rpartition(".")
        return {key: getattr(getattr(model, section) if section else model, name)}

    return KeyGroup(read, write)


def _scale(reader: StrictConfigReader, fields: Fields) -> Fields:
    return {"init_logit_scale": math.exp(reader.take("logit_scale_init_value", 2.6592))}


EXPECTED = {"attention_dropout": 0.0, "dropout": 0.0}
FAMILY = Family(
    model_type="clip",
    model="clip",
    architecture="CLIPModel",
    bare="CLIPModel",
    prefix="",
    keys=(
        Key("projection_dim", "embedding_dim", 512),
        KeyGroup(
            _scale, lambda model: {"logit_scale_init_value": math.log(model.init_logit_scale)}
        ),
        Section(
            "text_config",
            text_keys("quick_gelu", 1e-5, ids=49_408, length=77, width=512, heads=8, mlp=2048),
            EXPECTED,
            ("projection_dim",),  # of the towers by themselves
        ),
        Section(
            "vision_config",
            vision_keys("quick_gelu", 1e-5, patch=32),
            EXPECTED | {"num_channels": 3},
            ("projection_dim",),
        ),
    ),
    modules=lambda model: MODULES,
    fields={
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
        **{f"{name}.positions": "learned" for name in ("vision", "text")},
        "vision.pooling": "class_token",
        "vision.patch_bias": False,
        "vision.pre_norm": True,
        "text.is_causal": True,
        "text.pad_id": None,
        "project_images": True,
        "text_projection_bias": False,
        "has_logit_bias": False,
        "max_logit_scale": 100.0,
    },
    buffers=r"(text|vision)_model\.embeddings\.position_ids",
    image_processor=lambda size: {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_convert_rgb": True,
        "resample": 3,  # bicubic
    },
)
