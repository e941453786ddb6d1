"""Gemma 3 with images (arXiv:2503.19786): its text model; what reads images is skipped."""

import dataclasses

from lm.hf import gemma3_text

FAMILY = dataclasses.replace(
    gemma3_text.FAMILY,
    section="text_config",
    ignored_beside=(
        *("vision_config", "mm_tokens_per_image", "image_token_index", "image_token_id"),
        *("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id"),
    ),
    renamed=(  # of transformers 4 and 5
        (r"^(model\.language_model|language_model\.model)\.", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
    other_tensors=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
)
