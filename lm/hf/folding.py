"""Conversion of other parametrizations to the standard one: factors are multiplied into weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.config.tree import ConfigTree

# modules whose output a factor scales, by the ends of their names
BRANCHES = ("attention.out", "cross_attention.out", "mlp.down", "moe.shared.down", "moe.down")
POST_NORMS = ("attention_post_norm", "cross_attention_post_norm", "mlp_post_norm")


def fold(
    section: ConfigTree, model: Any, leaves: Mapping[str, jax.Array]
) -> tuple[ConfigTree, dict[str, jax.Array]]:
    """(`config.model`, parameters by name) of the same function in the standard parametrization.

    It is the same up to the rounding of one product for each weight. model: the resolved section.

    Raises:
        ValueError: there are no weights that a factor can be multiplied into.
    """
    leaves, scaling = dict(leaves), getattr(model, "scaling", None)
    if (limit := getattr(model, "max_logit_scale", None)) is not None:  # which no family has
        leaves["logit_scale"] = jnp.minimum(leaves["logit_scale"], math.log(limit))
    if scaling is None or model.parametrization == "standard":
        return section, leaves
    query = "query_norm" if model.qk_norm else "query"
    for factor, modules in (
        (scaling.logits, _before_logits(model, leaves) if scaling.logits != 1 else ()),
        (scaling.branch, POST_NORMS if model.norm_placement == "both" else BRANCHES),
        (scaling.scores, (f"attention.{query}", f"cross_attention.{query}")),
    ):
        for name, leaf in leaves.items() if factor != 1 else ():
            module, _, last = name.rpartition(".")
            owners = (f".{module}", f".{name}")  # experts' matrices have no module of their own
            if any(owner.endswith(f".{m}") for owner in owners for m in modules):
                is_plus_one = last == "scale" and model.norm == "rms_plus_one"
                leaves[name] = factor * (1 + leaf) - 1 if is_plus_one else factor * leaf
    section = section.copy_and_resolve_references()
    section.parametrization = "standard"
    return section, leaves


def _before_logits(model: Any, leaves: Mapping[str, jax.Array]) -> tuple[str, ...]:
    """The module of whose output the logits are a linear function."""
    if "head.weight" in leaves:
        return ("head",)
    # norms inside `layers` are those of blocks
    for norm in ("transform_norm", "norm", "decoder.norm"):
        if f"{norm}.scale" in leaves:
            return (norm,)
    raise ValueError(
        f"config.model.parametrization ({model.parametrization}) has a factor on the logits, "
        f"which tied embeddings and norm_placement={model.norm_placement} leave no weights for: "
        "the norm before them also writes to the residual stream"
    )
