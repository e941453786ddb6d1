"""Layers stacked along a leading axis and scanned: compile time doesn't grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.layers.activation_statistics import COLLECTION

_policies = jax.checkpoint_policies
Carry = TypeVar("Carry")
PROJECTIONS = ("query", "key", "value", "attended", "up", "gate")


Policy: TypeAlias = Callable[..., Any]  # of `jax.checkpoint`


def _on_host(*names: str) -> Policy:
    return _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=names,
        offload_src="device",
        offload_dst="pinned_host",
    )


# Rematerialization policies: which activations of a layer are saved for the backward pass; the rest
# is computed again. `attended`: the residuals of the attention kernel, which else runs twice.
REMAT: dict[str, Policy | None] = {
    "none": None,  # everything is saved
    "dots": _policies.dots_with_no_batch_dims_saveable,  # products with weights
    "projections": _policies.save_only_these_names(*PROJECTIONS),
    "attended": _policies.save_only_these_names("attended"),
    "full": _policies.nothing_saveable,  # only the layer's input
    "offload": _on_host("input"),  # as full, the input on the host
    "offload_attended": _on_host("input", "attended"),
    "offload_projections": _on_host("input", *PROJECTIONS),
}


def stack(
    block: Callable[..., nn.Module], num_layers: int, *, remat: str = "none", unroll: int = 1
) -> Callable[..., nn.Module]:
    """The module of `num_layers` blocks with parameters stacked as [L, ...] under the logical axis
    `layers`.

    A block is called as `block(carry, per_layer, shared) -> (carry, outputs)`; `per_layer` and
    `outputs` have a leading [L]. `unroll` layers make up one iteration; with all of them there is
    no loop left.
    """
    if remat != "none":
        block = nn.remat(block, policy=REMAT[remat], prevent_cse=unroll > 1)  # pyright: ignore
    return nn.scan(
        block,  # pyright: ignore
        variable_axes={"params": 0, "intermediates": 0, COLLECTION: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore
        length=num_layers,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def run(
    layers: nn.Module, block: nn.Module, carry: Carry, per_layer: Any, shared: Any
) -> tuple[Carry, Any]:
    """(carry, outputs [L, ...]) of a stack of layers, each an unbound `block`.

    Unstacked parameters, as of `lm.optim.param_tree.unstack_layers`, take a plain loop, and no
    dropout.
    """
    params = {} if layers.is_initializing() else layers.variables["params"]
    if "0" not in params:
        return layers(carry, per_layer, shared)  # pyright: ignore
    outputs = []
    for i in range(len(params)):
        own = jax.tree.map(lambda x, i=i: x[i], per_layer)
        carry, output = block.apply({"params": params[str(i)]}, carry, own, shared)  # pyright: ignore
        outputs.append(output)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)
