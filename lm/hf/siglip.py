"""SigLIP (arXiv:2303.15343), and SigLIP 2 (arXiv:2502.14786) of one resolution, whose files are
those of SigLIP.
"""

from __future__ import annotations

from typing import Any

from lm.hf.clip import EXPECTED, TOWERS, text_keys, vision_keys
from lm.hf.family import Family, KeyGroup, Section
from lm.hf.keys import Fields, Json, StrictConfigReader

HEAD = "vision_model.head"
MODULES = {
    **TOWERS,
    "text_projection": "text_model.head",
    "vision.pool.query": f"{HEAD}.probe",
    **{
        f"vision.pool.attention.{name}.{kind}": f"{HEAD}.attention.in_proj_{kind}"
        for kind in ("weight", "bias")
        for name in ("query", "key", "value")
    },
    "vision.pool.attention.out": f"{HEAD}.attention.out_proj",
    "vision.pool.norm": f"{HEAD}.layernorm",
    "vision.pool.mlp.up": f"{HEAD}.mlp.fc1",
    "vision.pool.mlp.down": f"{HEAD}.mlp.fc2",
    "logit_bias": "logit_bias",
}


def _width(reader: StrictConfigReader, fields: Fields) -> Fields:
    return {"embedding_dim": reader.take("projection_size", fields["text.embed_dim"])}


def _padding(reader: StrictConfigReader, fields: Fields) -> Fields:
    given = reader.tree.get("pad_token_id")  # the tokenizer of an import has the last word
    return {"text.pad_id": 1 if given is None else given}


def _write(model: Any) -> Json:
    return {"projection_size": model.embedding_dim, "pad_token_id": model.text.pad_id}


FAMILY = Family(
    model_type="siglip",
    model="clip",
    architecture="SiglipModel",
    bare="SiglipModel",
    prefix="",
    keys=(
        Section(
            "text_config",
            (
                *text_keys(
                    "gelu_pytorch_tanh", 1e-6, ids=32_000, length=64, width=768, heads=12, mlp=3072
                ),
                KeyGroup(_width, _write),
                KeyGroup(_padding),
            ),
            EXPECTED,
        ),
        Section(
            "vision_config",
            vision_keys("gelu_pytorch_tanh", 1e-6, patch=16),
            EXPECTED | {"num_channels": 3, "vision_use_head": True},
        ),
    ),
    modules=lambda model: MODULES,
    ones={"logit_scale": 1, "logit_bias": 1, f"{HEAD}.probe": 2},
    fields={
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        **{f"{name}.positions": "learned" for name in ("vision", "text")},
        "vision.pooling": "attention",
        "vision.patch_bias": True,
        "vision.pre_norm": False,
        "text.is_causal": False,
        "project_images": False,
        "text_projection_bias": True,
        "has_logit_bias": True,
        "init_logit_scale": 10.0,
        "max_logit_scale": None,
    },
    buffers=r"(text|vision)_model\.embeddings\.position_ids",
    image_processor=lambda size: {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": size, "width": size},
        "do_convert_rgb": True,
        "resample": 3,  # bicubic
    },
    objective={"loss": "sigmoid", "begins_with_bos": False},
)
