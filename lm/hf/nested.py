"""The text model inside a published model with several kinds of input; the others are skipped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from lm.hf.keys import Json, StrictConfigReader


class Nested(NamedTuple):
    """The text model in a model of another `model_type`."""

    family: str  # of the text model
    section: str  # of config.json
    ignored: tuple[str, ...]  # keys beside that section, of the other kinds of input
    # (pattern, replacement) of names of the text model's tensors, of transformers 4 and 5
    renamed: tuple[tuple[str, str], ...]
    other_tensors: str  # pattern of names


NESTED = {
    "gemma3": Nested(
        "gemma3_text",
        "text_config",
        (
            *("vision_config", "mm_tokens_per_image", "image_token_index", "image_token_id"),
            *("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id"),
        ),
        (
            (r"^(model\.language_model|language_model\.model)\.", "model."),
            (r"^language_model\.lm_head\.", "lm_head."),
        ),
        r"(model\.)?(vision_tower|multi_modal_projector)\..*",
    )
}


def text_config(tree: Json) -> Json:
    """The text model's config.json, where the `model_type` is in `NESTED`; else `tree` itself.

    Raises:
        ValueError: unknown keys beside the text model's.
    """
    nested = NESTED.get(tree.get("model_type", ""))
    if nested is None:
        return tree
    reader = StrictConfigReader(tree)
    text = reader.take(nested.section)
    reader.ignore(*nested.ignored)
    tie = reader.take("tie_word_embeddings", None)
    reader.finish()
    if tie is not None:
        text = {"tie_word_embeddings": tie, **text}
    return {**text, "model_type": nested.family}


def text_names(model_type: str, names: Iterable[str]) -> dict[str, str]:
    """{name in the text model: name in the files} of its tensors."""
    nested = NESTED.get(model_type)
    if nested is None:
        return {name: name for name in names}
    found = {}
    for file_name in names:
        if re.fullmatch(nested.other_tensors, file_name):
            continue
        name = file_name
        for pattern, replacement in nested.renamed:
            name = re.sub(pattern, replacement, name)
        found[name] = file_name
    return found
