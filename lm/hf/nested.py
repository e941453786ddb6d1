"""The text model inside of a published model of several kinds of input: the vision beside it is
left out.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from lm.hf.keys import StrictConfigReader


class Nested(NamedTuple):
    """Place of the text model in a model of another `model_type`."""

    family: str  # of the text model
    section: str  # of config.json
    ignored: tuple[str, ...]  # keys beside that section, of the other kinds of input
    # (pattern, replacement) of names of the text model's tensors, of transformers 4 and 5
    renamed: tuple[tuple[str, str], ...]
    left: str  # pattern of names of the other tensors


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


def text_config(tree: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the text model alone, of one whose `model_type` is in `NESTED`; of any
    other, itself.

    Raises:
        ValueError: there are keys beside the text model's that nobody knows.
    """
    nested = NESTED.get(tree.get("model_type", ""))
    if nested is None:
        return tree
    keys = StrictConfigReader(tree)
    text = keys.take(nested.section)
    keys.ignore(*nested.ignored)
    tie = keys.take("tie_word_embeddings", None)
    keys.finish()
    if tie is not None:
        text = {"tie_word_embeddings": tie, **text}
    return {**text, "model_type": nested.family}


def text_names(model_type: str, names: list[str]) -> dict[str, str]:
    """{name in the text model: name in the files} of its tensors."""
    nested = NESTED.get(model_type)
    if nested is None:
        return {name: name for name in names}
    found = {}
    for there in names:
        if re.fullmatch(nested.left, there):
            continue
        name = there
        for pattern, replacement in nested.renamed:
            name = re.sub(pattern, replacement, name)
        found[name] = there
    return found
